"""Two hosts on one machine: namespaces of network and name, joined by a cable; or only two directories."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 20.0


@dataclass(frozen=True, slots=True)
class Host:
    """Where processes can be started.

    Attributes:
        name: of the host.
        folder: working directory of its processes.
        holder: process that holds its namespaces; 0: those of this process.
        address: at which the other host reaches it.
    """

    name: str
    folder: Path
    holder: int
    address: str

    @property
    def place(self) -> tuple[str, int]:
        return str(self.folder), self.holder


@contextlib.contextmanager
def two_directories(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two working directories, of which the second is further down; all else is this host's."""
    yield _host("one", folder, 0, "127.0.0.1"), _host("two", folder / "further", 0, "127.0.0.1")


@contextlib.contextmanager
def two_namespaces(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts with names and networks of their own.

    Raises:
        OSError, subprocess.CalledProcessError: where this is not allowed.
    """
    with _held() as one, _held() as two:
        run("nsenter", "-t", f"{one}", "-n", *f"ip link add wire type veth peer name wire netns {two}".split())
        hosts = _host("one", folder, one, "10.77.0.1"), _host("two", folder / "further", two, "10.77.0.2")
        for host in hosts:
            inside = ("nsenter", "-t", f"{host.holder}", "-n", "-u")
            run(*inside, "hostname", host.name)
            run(*inside, *f"ip addr add {host.address}/24 dev wire".split())
            for device in ("lo", "wire"):
                run(*inside, *f"ip link set {device} up".split())
        yield hosts


def allowed() -> bool:
    """Whether two hosts can be had here; it is tried."""
    try:
        with tempfile.TemporaryDirectory() as folder, two_namespaces(Path(folder)):
            return True
    except (OSError, subprocess.SubprocessError, TimeoutError):
        return False


def _host(name: str, folder: Path, holder: int, address: str) -> Host:
    here = folder / name
    here.mkdir(parents=True)
    return Host(f"host-{name}", here, holder, address)


@contextlib.contextmanager
def _held() -> Iterator[int]:
    """A process with namespaces of its own."""
    command = ("unshare", "--net", "--uts", "sleep", "infinity")
    holder = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline, before = time.monotonic() + PATIENCE, Path("/proc/self/ns/uts").readlink()
        while Path(f"/proc/{holder.pid}/ns/uts").readlink() == before:
            if holder.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError("no namespaces")
            time.sleep(0.01)
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "LC_ALL": "C"})
