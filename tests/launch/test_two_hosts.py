"""Two hosts that share nothing but files and a cable: the cluster launcher, and the cable cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megalite.config_file import to_toml
from tests.launch.hosts import Host, missing, two_hosts
from tests.trainer.runs import metrics, tiny, write_dataset

ROOT = Path(__file__).parents[2]
# Steps slow enough to be caught in the middle, and a timeout short enough to be waited for.
OVERRIDES = ("train.steps=60", "checkpoint.every_steps=10", "resilience.comm_timeout_s=8")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := missing():
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("cluster")
    write_dataset(root / "train", seed=1, documents=40)
    write_dataset(root / "valid", seed=2, documents=10)
    (root / "tiny.toml").write_text(to_toml(tiny(root, *OVERRIDES)))
    return root


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts(folder) as pair:
        (folder / "hosts").write_text("".join(f"{host.address} slots=1\n" for host in pair))
        yield pair


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "megalite", "train", str(folder / "tiny.toml"), "run_dir=alone"]
    subprocess.run(command, cwd=folder, env=_environment(folder), check=True, capture_output=True)
    return metrics(folder / "alone")


def _environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        "PYTHONPATH": f"{ROOT}:{ROOT}/kernels",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=2 -o ServerAliveCountMax=3",
    }


def _start(
    folder: Path,
    host: Host,
    run: str,
    *overrides: str,
    before: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
) -> subprocess.Popen[str]:
    """The cluster launcher, started on `host`, with what comes `before` it and more `options`."""
    words = ["--hostfile", "hosts", "--interface", "eth0", *options]
    words += [str(folder / "tiny.toml"), f"run_dir={run}"]
    return subprocess.Popen(
        host.command("env", "-C", str(folder), *before, str(ROOT / "launch/cluster.sh"), *words, *overrides),
        env=_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while not ((run / "metrics.jsonl").exists() and len(metrics(run)) >= step):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{run.name} does not get to step {step}: {process.communicate()[0]}")
        time.sleep(0.02)


def _same_curve(run: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    assert len(run) == len(reference)
    for a, b in zip(run, reference, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def _nothing_runs(hosts: tuple[Host, Host], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while any(host.processes("megalite") for host in hosts):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_two_hosts_give_the_curve_of_one_process(
    folder: Path, hosts: tuple[Host, Host], alone: list[dict[str, Any]]
) -> None:
    # A value with quotes, brackets and spaces must survive ssh, pdsh and the launcher.
    sources = f'data.sources=[{{ path = "{folder}/train", weight = 1 }}]'
    process = _start(folder, hosts[0], "two", sources)
    _wait_for_step(process, folder / "two", 1)
    for host in hosts:
        assert len(host.processes("-u -m megalite --local_rank=0 train")) == 1
    peers = hosts[1].run("ss", "-Htn", "state", "established", f"dst {hosts[0].address}")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert len([line for line in peers.splitlines() if ":22 " not in line]) >= 2, peers  # store and gloo
    _same_curve(metrics(folder / "two"), alone)


def test_two_hosts_are_checked(folder: Path, hosts: tuple[Host, Host]) -> None:
    process = _start(folder, hosts[0], "checked", "mesh.tp=2", options=("--check",))
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 0, output
    assert "dp 1 × pp 1 × tp 2" in output
    assert "all agree" in output
    assert not (folder / "checked").exists()


def test_a_cut_cable_ends_the_run_and_the_same_command_continues_it(
    folder: Path, hosts: tuple[Host, Host], alone: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    exits = folder / "exits.jsonl"
    monkeypatch.setenv("MEGALITE_EXIT_FILE", str(exits))
    process = _start(folder, hosts[0], "cut")
    _wait_for_step(process, folder / "cut", 15)
    hosts[1].run("ip", "link", "set", "eth0", "down")
    cut = time.monotonic()
    try:
        output = process.communicate(timeout=60)[0]
        took = time.monotonic() - cut
        assert process.returncode not in (0, 2, 77), output
        assert "HangError: " in output, output
        assert "Traceback" not in output, output
        assert took < 30, output
        assert _nothing_runs(hosts, within_s=30)
        assert [json.loads(line)["code"] for line in exits.read_text().splitlines()] == [76, 76]
    finally:
        hosts[1].run("ip", "link", "set", "eth0", "up")
    process = _start(folder, hosts[0], "cut")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "continuing cut at step" in output
    _same_curve(metrics(folder / "cut"), alone)


def test_a_stopped_launcher_lets_both_hosts_save(folder: Path, hosts: tuple[Host, Host]) -> None:
    process = _start(folder, hosts[0], "stopped", "train.steps=5000", "checkpoint.every_steps=0")
    _wait_for_step(process, folder / "stopped", 5)
    inside = hosts[0].run("pgrep", "-of", "bin/deepspeed").split()[0]
    hosts[0].run("kill", f"-{signal.SIGTERM.value}", inside)
    output = process.communicate(timeout=60)[0]
    assert _nothing_runs(hosts, within_s=30), output
    assert len(list((folder / "stopped/checkpoints").glob("step_*"))) == 1, output


def test_a_stopped_supervisor_waits_for_both_hosts_and_leaves_with_75(
    folder: Path, hosts: tuple[Host, Host]
) -> None:
    run = folder / "supervised"
    supervise = (sys.executable, str(ROOT / "launch/supervise.py"), "--run-dir", str(run), "--")
    process = _start(
        folder, hosts[0], str(run), "train.steps=5000", "checkpoint.every_steps=0", before=supervise
    )
    _wait_for_step(process, run, 5)
    inside = hosts[0].run("pgrep", "-of", "launch/supervise.py").split()[0]
    hosts[0].run("kill", f"-{signal.SIGTERM.value}", inside)
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 75, output
    assert "left with 75, stopped after a save" in output
    assert _nothing_runs(hosts, within_s=30), output
    assert len(list((run / "checkpoints").glob("step_*"))) == 1, output
