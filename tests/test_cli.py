"""The command as users start it: alone, under torchrun, under the deepspeed launcher."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megalite.cli import main
from megalite.config_file import to_toml
from megalite.trainer import Trainer
from tests.ranks import join_ranks, spawn_ranks
from tests.trainer.runs import metrics, tiny, write_dataset

CONFIGS = Path(__file__).parent.parent / "configs"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    write_dataset(root / "train", seed=1, documents=40)
    write_dataset(root / "valid", seed=2, documents=10)
    path = root / "tiny.toml"
    path.write_text(to_toml(tiny(root, "train.steps=6", "train.eval_every_steps=3", "log.every_steps=2")))
    return path


def _run(*command: str, cwd: Path, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def _train_signalled_at_start(config: str, run_dir: str) -> None:
    """The command, told to stop while its trainer is being built."""
    build = Trainer.__init__

    def signalled(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        build(*args)

    Trainer.__init__ = signalled  # type: ignore[assignment, method-assign]
    sys.exit(main(["train", config, f"run_dir={run_dir}"]))


def test_a_signal_during_the_start_saves_the_first_step(config: Path, tmp_path: Path) -> None:
    processes = spawn_ranks(_train_signalled_at_start, 2, str(config), str(tmp_path / "run"))
    assert join_ranks(processes, timeout_s=60) == [75, 75]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000001"]


def test_a_terminal_without_our_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    assert main(["train", str(CONFIGS / "quickstart.toml"), "--dry-run"]) == 0
    sys.stdout.flush()
    assert b"dp 1 ? pp 1 ? tp 1" in terminal.getvalue()


@pytest.mark.parametrize("command", ["train", "data show data", "data ingest x --to y"])
def test_a_working_folder_that_was_removed(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main([*command.split(), *([str(CONFIGS / "quickstart.toml")] if command == "train" else [])]) == 2
    told = "the working folder is gone (No such file or directory); cd to one that is there"
    assert capsys.readouterr().err == f"megalite: ConfigError: {told}\n"


@pytest.mark.slow
def test_train_from_another_directory(config: Path, tmp_path: Path) -> None:
    done = _run(sys.executable, "-m", "megalite", "train", str(config), "run_dir=here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 6/6  loss" in done.stderr
    assert "tokens/s" in done.stderr
    run = tmp_path / "here"
    assert (run / "config.toml").exists()
    assert (run / "tokenizer.json").exists()
    assert (run / "checkpoints/step_00000006/manifest.json").exists()
    keys = {
        "step",
        "position",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "tokens_per_s",
        "mfu",
        "goodput",
        "step_s",
        "events",
    }
    assert all(keys <= record.keys() for record in metrics(run))
    assert [json.loads(line)["event"] for line in (run / "ledger.jsonl").read_text().splitlines()] == [
        "start"
    ]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
                "-m",
                "megalite",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [
                "deepspeed",
                "--num_gpus",
                "2",
                "--master_port",
                "29611",
                "--module",
                "megalite",
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["torchrun", "deepspeed"],
)
def test_launchers_give_the_curve_of_one_process(config: Path, tmp_path: Path, launcher: list[str]) -> None:
    if launcher[0] == "deepspeed":
        launcher = [str(Path(sys.executable).parent / "deepspeed"), *launcher[1:]]
    assert (
        _run(sys.executable, "-m", "megalite", "train", str(config), "run_dir=one", cwd=tmp_path).returncode
        == 0
    )
    done = _run(*launcher, "train", str(config), "run_dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert done.stderr.count("step 6/6") == 1 or done.stdout.count("step 6/6") == 1  # one rank speaks


def _command(arguments: list[str]) -> None:
    raise SystemExit(main(arguments))


def test_a_lost_peer_ends_the_others_with_76(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    endless = ["train.steps=1000000", "optim.schedule=constant", "checkpoint.every_steps=0"]
    processes = spawn_ranks(_command, 2, ["train", str(config), f"run_dir={run}", *endless])
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not ((run / "metrics.jsonl").exists() and metrics(run)):
        time.sleep(0.02)
    pid = processes[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert join_ranks(processes, timeout_s=20) == [76, -9]


@pytest.mark.slow
def test_a_second_call_continues_and_a_third_finds_nothing_to_do(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megalite", "train", str(config), "run_dir=again"]
    assert _run(*command, "train.steps=3", cwd=tmp_path).returncode == 0
    done = _run(*command, cwd=tmp_path)
    assert done.returncode == 0
    assert "continuing again at step 3 of 6" in done.stderr
    assert "note: train.steps was 3 when step 3 was saved and is now 6" in done.stderr
    assert len(metrics(tmp_path / "again")) == 6
    done = _run(*command, cwd=tmp_path)
    assert done.returncode == 0
    assert "at step 6 of 6, so nothing is left to do" in done.stderr
    assert len(metrics(tmp_path / "again")) == 6


def test_dry_run_needs_no_data_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.chdir(tmp_path)
    assert main(["train", str(CONFIGS / "8b.toml"), "--dry-run", "run_dir=elsewhere"]) == 0
    out = capsys.readouterr().out
    for words in (
        "8,030,261,248",
        "FLOPs a token    51.470 G strict, 57.913 G non-causal",
        "hidden_size = 4096",
        'run_dir = "elsewhere"',
    ):
        assert words in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_what_is_offloaded(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["mesh.zero_engine=deepspeed", "mesh.offload=cpu", "train.recompute=full", "train.compile=false"]
    for stage, words in ((2, "(optimizer in host memory)"), (3, "(optimizer and weights in host memory)")):
        assert main(["train", str(CONFIGS / "8b.toml"), "--dry-run", *keys, f"mesh.zero_stage={stage}"]) == 0
        assert words in capsys.readouterr().out


def test_mistakes_are_one_line_and_exit_2(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.chdir(tmp_path)
    for arguments, words in [
        (["train", str(config), "modle.num_heads=3"], "unknown key modle; did you mean model?"),
        (["train", "nowhere.toml"], "no config file nowhere.toml"),
        (["train"], "no config file given"),
        (["train", str(config), "data.sources=[{path='gone'}]"], f"no dataset folder gone in {tmp_path}"),
        (["generate", "gone", "--prompt", "x"], "gone"),
        (
            ["train", str(config), "--dry-run", "data.skip=[[5, 2]]"],
            "data: skip has [5, 2]; give [first, after]",
        ),
        (["data", "show", "a" * 5000], "is longer than the system takes"),
        (["train", str(config), f"run_dir={'a' * 300}"], "is longer than the system takes"),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("megalite: ")
        assert error.count("\n") == 1
        assert words in error
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_its_code_where_a_supervisor_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exits = tmp_path / "exits.jsonl"
    monkeypatch.setenv("MEGALITE_EXIT_FILE", str(exits))
    monkeypatch.setenv("RANK", "3")
    assert main(["train", "--keys"]) == 0
    assert not exits.exists()
    assert main(["train", "nowhere.toml"]) == 2
    with pytest.raises(SystemExit):
        main(["train", "--no-such-option"])
    records = [json.loads(line) for line in exits.read_text().splitlines()]
    assert [(record["rank"], record["code"]) for record in records] == [("3", 2), ("3", 2)]
    monkeypatch.setenv("MEGALITE_EXIT_FILE", str(tmp_path / "no/such/folder"))
    assert main(["train", "nowhere.toml"]) == 2  # what cannot be written changes nothing


def test_a_port_in_use_is_said_at_once(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        launcher = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in launcher.items():
            monkeypatch.setenv(name, value)
        assert main(["train", str(config), f"run_dir={tmp_path / 'run'}"]) == 76
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}: the port is in use" in error
    assert error.count("megalite: ") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_do_not_meet_end_with_76(config: Path, tmp_path: Path) -> None:
    lonely = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, "-m", "megalite", "train", str(config), "resilience.comm_timeout_s=1"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**ENVIRONMENT, **lonely}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 76
    said = [line for line in done.stderr.splitlines() if line.startswith("megalite: ")]
    assert len(said) == 1
    assert "did not find each other within 1 s at 127.0.0.1:1" in said[0]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_console_that_goes_away_does_not_end_the_run(config: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "megalite", "train", str(config), "run_dir=run", "log.every_steps=1"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, stderr=writing, timeout=60)
    os.close(writing)
    assert done.returncode == 0
    assert len(metrics(tmp_path / "run")) == 6


class _Gone(io.RawIOBase):
    """A terminal or a pipe whose other end has left, or a file on a full disk."""

    def __init__(self, number: int) -> None:
        self._number = number

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._number == errno.EIO

    def fileno(self) -> int:
        return os.open(os.devnull, os.O_WRONLY)  # one that the end of a command may do with as it likes

    def write(self, data: Any) -> int:
        raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE, errno.ENOSPC])
def test_work_goes_on_when_nobody_watches(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A bar, a line while it works, a line of what is wrong: none may end a command, nor change its code."""
    monkeypatch.setattr(
        sys, "stderr", io.TextIOWrapper(io.BufferedWriter(_Gone(number)), line_buffering=True)
    )
    assert main(["train", str(config), f"run_dir={tmp_path / 'run'}", "log.every_steps=1"]) == 0
    assert len(metrics(tmp_path / "run")) == 6
    (tmp_path / "text").write_text("some words to learn from\n" * 100)
    words = ["--text", str(tmp_path / "text"), "--vocab-size", "270"]
    assert main(["data", "tokenize", *words, "--to", str(tmp_path / "data")]) == 0
    assert main(["data", "verify", str(tmp_path / "data")]) == 0
    assert main(["train", str(config), "train.steps=0"]) == 2


@pytest.mark.slow
def test_standard_files_that_are_closed(config: Path, tmp_path: Path) -> None:
    """As a daemon's are. What torch says of its own is not to land in the run's first files."""
    command = f"{sys.executable} -m megalite train {config} run_dir=run <&- >&- 2>&-"
    assert _run("bash", "-c", command, cwd=tmp_path).returncode == 0
    assert len(metrics(tmp_path / "run")) == 6


@pytest.mark.parametrize("command", ["data show {} --documents 9", "plan --draw gpipe", "train --keys"])
def test_an_output_without_room_is_said_in_one_line(config: Path, tmp_path: Path, command: str) -> None:
    words = command.format(config.parent / "train")
    done = _run("bash", "-c", f"{sys.executable} -m megalite {words} >/dev/full", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "megalite: No space left on device: the output is not whole\n"


def test_a_dataset_is_no_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(config.parent / "train"), "--prompt", "x"]) == 2
    assert capsys.readouterr().err.endswith("train is a dataset; give a run folder or a checkpoint\n")


def test_a_reader_of_documents_who_has_seen_enough(config: Path, tmp_path: Path) -> None:
    show = f"{sys.executable} -m megalite data show {config.parent / 'train'} --documents 1000 --tokens 1000"
    assert _run("bash", "-c", f"set -o pipefail; {show} | head -n1", cwd=tmp_path).returncode == 0


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for words in (
        "torchrun --standalone --nproc-per-node 2",
        "deepspeed --module megalite",
        "--dry-run",
        "75 stopped after a save",
    ):
        assert words in text
    assert main(["train", "--keys"]) == 0
    assert "optim.weight_decay" in capsys.readouterr().out
    assert main([]) == 2


def test_help_is_quick_because_torch_is_not_imported() -> None:
    code = "import sys, megalite.cli as c; c.main(['train', '--keys']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    code = (
        "import sys, megalite.cli as c; c.main([]); sys.exit(bool({'pyarrow', 'pydantic'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.slow
def test_training_does_not_import_the_compiler_it_does_not_use(config: Path, tmp_path: Path) -> None:
    train = f"c.main(['train', {str(config)!r}, 'run_dir=run', 'train.precision=bf16'])"
    unused = "{'torch._dynamo', 'sympy'} & {*sys.modules}"
    code = f"import sys, megalite.cli as c; assert {train} == 0; assert not {unused}"
    done = _run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
