"""Contests of disks: ours and others on the same storage."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pyvirtio.bench.load import DiskLoad
from pyvirtio.bench.nbd import NbdTarget
from pyvirtio.bench.servers import MEMORY, NATIVE, NBDKIT, PYTHON, Storage, command, started
from pyvirtio.bench.target import Target


@dataclass(frozen=True)
class DiskContest:
    """One storage under loads of several depths, served by all of the servers."""

    storage: Storage
    load: DiskLoad
    points: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.storage.name

    @property
    def ours(self) -> tuple[str, ...]:
        """What a method in Python gets need not be aligned, as O_DIRECT wants it; and a RAM disk is for Python only."""
        if self.storage.name == MEMORY:
            return (PYTHON,)
        return (NATIVE,) if self.storage.direct else (NATIVE, PYTHON)

    def connected(self, server: str, directory: Path, stack: ExitStack) -> Target | NbdTarget:
        path = directory / f"{self.name}-{server}.sock"
        storage = self.storage.of(server)
        stack.enter_context(storage.made(self.load.size))
        arguments = command(server, storage, self.load.num_queues, path)
        pid = stack.enter_context(started(arguments, path))
        if server == NBDKIT:
            return stack.enter_context(NbdTarget(path, self.load, pid))
        return stack.enter_context(Target(path, self.load, max(self.points), pid))
