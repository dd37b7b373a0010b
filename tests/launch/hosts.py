"""Two hosts on one machine: namespaces of their own for network, processes, mounts and host name.

A veth pair joins them, called eth0 at both ends; each runs an sshd that lets the other in. All that a
host consists of ends with its first process, and that ends when this process closes its stdin.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOOLS = ("unshare", "nsenter", "ip", "pdsh", "ssh", "ssh-keygen", "sshd")
_UNSHARE = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--mount-proc", "--kill-child"]
# bash, not sleep: the first process of a namespace must reap what the others leave. /run is hidden, since
# sshd wants a folder there.
_BOOT = """
mount -t tmpfs tmpfs /run && mkdir /run/sshd && hostname "$1" && ip link set lo up && echo up
while read -r _; do :; done
"""


class Host:
    """One of the two hosts."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._boot = subprocess.Popen(
            [*_UNSHARE, "bash", "-c", _BOOT, "boot", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._boot.stdout is not None
        assert self._boot.stdout.readline() == b"up\n"
        children = Path(f"/proc/{self._boot.pid}/task/{self._boot.pid}/children").read_text().split()
        self.pid = int(children[0])

    def command(self, *words: str) -> list[str]:
        """The command line that runs `words` on this host."""
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", "--pid", "--uts", "--", *words]

    def run(self, *words: str) -> str:
        """Run a command on this host; what it prints."""
        return subprocess.run(self.command(*words), check=True, capture_output=True, text=True).stdout

    def processes(self, word: str) -> list[str]:
        """Command lines of processes on this host that hold `word`."""
        listed = self.run("ps", "-eww", "-o", "args=").splitlines()
        return [line for line in listed if word in line and not line.startswith("ps ")]

    def close(self) -> None:
        """End every process on this host."""
        assert self._boot.stdin is not None
        self._boot.stdin.close()
        self._boot.wait(10)


def missing() -> str:
    """Why there cannot be two hosts here, or nothing."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if absent:
        return f"needs {', '.join(absent)}"
    tried = subprocess.run([*_UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/run"], capture_output=True)
    return "needs the right to create namespaces" if tried.returncode else ""


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Both hosts with sshd running; `folder`/bin/ssh gets from one to the other without questions."""
    hosts: list[Host] = []
    try:
        hosts.append(Host("host1", "10.99.0.1"))
        hosts.append(Host("host2", "10.99.0.2"))
        one, two = hosts
        # In the network of the first host but with our process numbers, by which the second is named.
        inside = ["nsenter", "--target", str(one.pid), "--net"]
        cable = f"ip link add eth0 type veth peer name eth0 netns {two.pid}"
        subprocess.run([*inside, *cable.split()], check=True, capture_output=True)
        for host in hosts:
            host.run(*f"ip addr add {host.address}/24 dev eth0".split())
            host.run("ip", "link", "set", "eth0", "up")
        _write_ssh_files(folder)
        for host in hosts:
            _start_sshd(folder, host)
        yield one, two
    finally:
        for host in hosts:
            host.close()


def _write_ssh_files(folder: Path) -> None:
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f"]
    for name in ("user_key", "host1_key", "host2_key"):
        subprocess.run([*keygen, str(folder / name)], check=True)
    config = {
        "IdentityFile": folder / "user_key",
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": folder / "known_hosts",
        "StrictHostKeyChecking": "accept-new",
        "LogLevel": "ERROR",
    }
    (folder / "ssh_config").write_text("".join(f"{key} {value}\n" for key, value in config.items()))
    (folder / "bin").mkdir()
    # ssh looks for its files in the home folder of the user database, whatever HOME says.
    shim = folder / "bin/ssh"
    shim.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    shim.chmod(0o755)


def _start_sshd(folder: Path, host: Host) -> None:
    config = {
        "ListenAddress": host.address,
        "HostKey": folder / f"{host.name}_key",
        "AuthorizedKeysFile": folder / "user_key.pub",
        "PermitRootLogin": "yes",
        "UsePAM": "no",
        "StrictModes": "no",
        "PidFile": "none",
    }
    path = folder / f"{host.name}_sshd"
    path.write_text("".join(f"{key} {value}\n" for key, value in config.items()))
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    host.run(str(sshd), "-f", str(path))
    deadline = time.monotonic() + 5
    while not host.run("ss", "-Hltn", f"src {host.address}:22") and time.monotonic() < deadline:
        time.sleep(0.02)
