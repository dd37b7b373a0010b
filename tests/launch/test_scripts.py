"""The launch scripts: what they say to a question and to a mistake, and what they start."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalite.config_file import to_toml
from tests.trainer.runs import metrics, tiny, write_dataset

LAUNCH = Path(__file__).parents[2] / "launch"
CONFIG = str(LAUNCH.parent / "configs/quickstart.toml")
SCRIPTS = ("local_cpu.sh", "cluster.sh", "slurm.sbatch")


def _run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        ["bash", str(LAUNCH / command[0]), *command[1:]],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )


def _tool(folder: Path, name: str, text: str) -> None:
    """A program of this name in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def _is_one_line(done: subprocess.CompletedProcess[str], words: str) -> bool:
    return done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_an_example_and_the_shell_can_read_it(script: str, tmp_path: Path) -> None:
    done = _run(script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"launch/{script}") == 2  # the usage and an example
    assert "#" not in done.stdout
    assert "run_dir=" in done.stdout
    assert subprocess.run(["bash", "-n", str(LAUNCH / script)]).returncode == 0
    assert script.endswith(".sbatch") or (LAUNCH / script).stat().st_mode & stat.S_IXUSR


def test_mistakes_are_one_line_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two hosts\na slots=2\nb slots=many\n")
    for command, words in [
        (["local_cpu.sh"], "local_cpu: no config file given"),
        (["local_cpu.sh", "-n", "two", CONFIG], "not 'two'"),
        (["local_cpu.sh", "-n"], "-n needs a number"),
        (["local_cpu.sh", "--gpus", CONFIG], "unknown option --gpus"),
        (["local_cpu.sh", CONFIG, "modle.num_heads=3"], "did you mean model?"),
        (["cluster.sh", CONFIG], "cluster: --hostfile is missing"),
        (["cluster.sh", "--hostfile", "none", CONFIG], "no hostfile none"),
        (["cluster.sh", "--hostfile"], "--hostfile needs a value"),
        (["cluster.sh", "--hostfile", "hosts"], "no config file given"),
        (
            ["cluster.sh", "--hostfile", "hosts", CONFIG],
            "hosts:3: 'b slots=many' is not HOST slots=PROCESSES",
        ),
        (["slurm.sbatch", CONFIG], "slurm: not inside a Slurm job"),
        (["demo_spike", "--fast"], "demo_spike: unknown option --fast"),
        (["quickstart", "book.txt"], "quickstart: unknown argument book.txt"),
        (["quickstart", "--text"], "--text needs a file or a folder"),
        (["quickstart", "--text", "no/such"], "that is there, not 'no/such'"),
    ]:
        done = _run(*command, cwd=tmp_path)
        assert _is_one_line(done, words), (command, done)
    inside = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    assert _is_one_line(_run("slurm.sbatch", CONFIG, cwd=tmp_path, **inside), "no launch/supervise.py in")


def test_what_scripts_install_is_an_extra_that_exists() -> None:
    """pip warns of another and goes on."""
    setup = (LAUNCH.parent / "setup.py").read_text()
    extras = [
        line.split()[1]
        for script in ("quickstart", "test", "demo_spike")
        for line in (LAUNCH / script).read_text().splitlines()
        if line.startswith("prepare ")
    ]
    assert len(extras) == 3
    assert [extra for extra in extras if f'"{extra}": [' not in setup] == []


@pytest.mark.slow
def test_local_cpu_counts_cores_not_threads(tmp_path: Path) -> None:
    """`nproc` answers with OMP_NUM_THREADS, which guides tell people to set to 1."""
    _tool(tmp_path / "tools", "nproc", "echo ${OMP_NUM_THREADS:-8}")
    path = f"{tmp_path / 'tools'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    batch = ("train.global_batch_size=6", "train.micro_batch_size=1")
    done = _run("local_cpu.sh", CONFIG, *batch, cwd=tmp_path, PATH=path)
    assert _is_one_line(done, "is not a multiple of train.micro_batch_size=1 × 4 data-parallel processes"), (
        done
    )


@pytest.mark.slow
def test_local_cpu_trains_with_overrides(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", seed=1, documents=40)
    write_dataset(tmp_path / "valid", seed=2, documents=10)
    (tmp_path / "tiny.toml").write_text(to_toml(tiny(tmp_path, "train.steps=6")))
    done = _run("local_cpu.sh", "-n", "2", "tiny.toml", "run_dir=a b", "train.steps=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "a b")) == 4
    assert '"processes": 2' in (tmp_path / "a b/ledger.jsonl").read_text()


@pytest.mark.slow
def test_local_cpu_checks(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", seed=1, documents=40)
    (tmp_path / "tiny.toml").write_text(to_toml(tiny(tmp_path, "data.validation=[]")))
    done = _run("local_cpu.sh", "-n", "2", "--check", "tiny.toml", "mesh.tp=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dp 1 × pp 1 × tp 2" in done.stdout
    assert done.stdout.endswith("all agree\n")


def _slurm(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    """A job of tiny.toml with stand-ins for srun, which starts two tasks and treats signals as srun does (it
    hands USR1 to the tasks and kills them on TERM), and for scontrol."""
    write_dataset(tmp_path / "train", seed=1, documents=40)
    write_dataset(tmp_path / "valid", seed=2, documents=10)
    (tmp_path / "tiny.toml").write_text(to_toml(tiny(tmp_path, "train.steps=100000", "optim.warmup_steps=3")))
    tools = tmp_path / "tools"
    _tool(
        tools,
        "srun",
        """
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids+=($!); done
trap 'kill -KILL "${pids[@]}"' TERM
trap 'kill -USR1 "${pids[@]}"; caught=1' USR1
worst=0
for pid in "${pids[@]}"; do
    code=0; wait "$pid" || code=$?
    while [ "${caught:-}" ]; do caught=; code=0; wait "$pid" || code=$?; done
    [ "$code" -le "$worst" ] || worst=$code
done
exit "$worst" """,
    )
    _tool(
        tools, "scontrol", f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >>{tmp_path}/asked; fi'
    )
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(LAUNCH.parent), "SLURM_NTASKS": "2"}
    return subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sbatch"), *words],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "SLURM_JOB_NODELIST": "here", **job},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_slurm_job_checks(tmp_path: Path) -> None:
    process = _slurm(tmp_path, "--check", "tiny.toml", "run_dir=run", "mesh.pp=2")
    printed, said = process.communicate(timeout=90)
    assert process.returncode == 0, said
    assert printed.endswith("all agree\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_slurm_job_that_is_signalled_saves_and_goes_back_to_the_queue(tmp_path: Path) -> None:
    run = tmp_path / 'a "b" c\\é'
    process = _slurm(tmp_path, "tiny.toml", f"run_dir={run}")
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)  # to the batch shell alone, as --signal=B: does
    said = process.communicate(timeout=150)[1]
    assert process.returncode == 75, said
    assert (tmp_path / "asked").read_text() == f"requeue {os.getpid()}\n"
    assert len(list((run / "checkpoints").glob("step_*"))) == 1
    assert (run / "exits.jsonl").exists()  # where the supervisor looks for it
