"""Back-ends to compare, each a process of its own on the same storage."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from pyvirtio.errors import ConfigError, ProtocolError

QSD = "qemu-storage-daemon"
NBDKIT = "nbdkit"
NATIVE, PYTHON = "native", "python"
"""Our two: the core does the I/O, or a method in Python for each request."""
MEMORY = "memory"
"""The storage that is a RAM disk written in Python."""
START = 30.0
"""Seconds that a server may take until its socket is there."""
END = 5.0
"""Seconds that it may take to end when it is told to."""
MIB = 1 << 20
NULL_SIZE = 1 << 30


@dataclass(frozen=True)
class Storage:
    """What a disk is made of: a file, memory or nothing; `direct` goes past the page cache."""

    name: str
    file: Path | None = None
    direct: bool = False

    def of(self, server: str) -> Self:
        """The same, with a file for this server alone."""
        file = self.file and self.file.with_name(f"{self.file.stem}-{server}{self.file.suffix}")
        return replace(self, file=file)

    @contextmanager
    def made(self, size: int) -> Iterator[None]:
        """The file is there, of random data, as long as this lasts."""
        if self.file is None:
            yield
            return
        try:
            with self.file.open("xb") as file:
                for _ in range(size // MIB):
                    file.write(os.urandom(MIB))
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(f"{self.file}: {error.strerror or error}") from error
        try:
            yield
        finally:
            self.file.unlink()


def command(server: str, storage: Storage, num_queues: int, socket_path: Path) -> list[str]:
    """What starts a server on a disk of `storage`."""
    if server == QSD:
        return [program(QSD, "qemu-system-common"), *_qsd(storage, num_queues, socket_path)]
    if server == NBDKIT:
        plugin = Path(__file__).with_name("nbdkit_memory.py")
        nbdkit = program(NBDKIT, "nbdkit, nbdkit-plugin-python")
        return [nbdkit, "--foreground", "--unix", str(socket_path), "python", str(plugin)]
    queues = f"num-queues={num_queues}"
    if storage.file is None:
        disk = "PythonMemory" if storage.name == MEMORY else "PythonNull" if server == PYTHON else "NativeNull"
        return serve(f"pyvirtio.bench.disks:{disk},size={NULL_SIZE},{queues}", socket_path)
    path = str(storage.file).replace(",", ",,")
    if server == PYTHON:
        return serve(f"pyvirtio.bench.disks:PythonFile,path={path},{queues}", socket_path)
    cache = "none" if storage.direct else "writeback"
    drive = f"file={path},id=disk,cache={cache}"
    return [*serve(f"blk,drive=disk,queue-size=1024,{queues}", socket_path), "--drive", drive]


def serve(device: str, socket_path: Path) -> list[str]:
    """What starts one of ours."""
    return [sys.executable, "-m", "pyvirtio", "serve", "--socket-path", str(socket_path), device]


def _qsd(storage: Storage, num_queues: int, socket_path: Path) -> list[str]:
    if storage.file is None:
        node = f"driver=null-co,size={NULL_SIZE}"
    else:
        path = str(storage.file).replace(",", ",,")
        node = f"driver=file,filename={path},aio=io_uring,locking=off,cache.direct={'on' if storage.direct else 'off'}"
    export = "type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,writable=on"
    return [
        "--blockdev", f"{node},node-name=disk",
        "--export", f"{export},addr.path={str(socket_path).replace(',', ',,')},num-queues={num_queues}",
    ]  # fmt: skip


def program(name: str, packages: str) -> str:
    """Where it is."""
    found = shutil.which(name)
    if found is None:
        raise ConfigError(f"bench: {name} is not installed (Debian: {packages})")
    return found


@contextmanager
def started(arguments: list[str], socket_path: Path) -> Iterator[int]:
    """Runs a server until the end of the block; its process id, once its socket is there."""
    with subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + START
            while not is_listened_at(socket_path):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ProtocolError(f"{Path(arguments[0]).name} did not start")
                time.sleep(0.01)
            yield process.pid
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(END)
    except subprocess.TimeoutExpired:
        process.kill()


def is_listened_at(path: Path) -> bool:
    """Not found out by a connection: some serve one front-end only, and would take that for it."""
    accepts = "00010000"  # __SO_ACCEPTCON
    sockets = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    return any(columns[3] == accepts and columns[-1] == str(path) for columns in sockets)
