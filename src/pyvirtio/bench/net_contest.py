"""Contests of network cards: ours and DPDK's, with the same behind them."""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pyvirtio.bench.frames import FrameLoad
from pyvirtio.bench.net import NetTarget
from pyvirtio.bench.servers import NATIVE, PYTHON, program, serve, started

TESTPMD = "dpdk-testpmd"
SOURCE = "source"
NETWORKS = {"sink": ("tx", "rxonly"), SOURCE: ("rx", "txonly"), "echo": ("both", "macswap")}
"""What is behind the cards: the direction in which frames go, and testpmd's name for what it does then."""
MEMORY = 256
"""MiB that DPDK gets, none of it in huge pages."""
BUFFERS = 8192
SELDOM = 60000
"""Seconds between two of testpmd's reports; without any it waits for a key."""


@dataclass(frozen=True)
class NetContest:
    """One kind of network behind the cards of all servers. A source sends frames of one size."""

    network: str
    load: FrameLoad
    points: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.network}-{max(self.points)}" if self.network == SOURCE else self.network

    @property
    def ours(self) -> tuple[str, ...]:
        return (PYTHON,) if self.network == SOURCE else (NATIVE, PYTHON)

    def connected(self, server: str, directory: Path, stack: ExitStack) -> NetTarget:
        path = directory / f"{self.name}-{server}.sock"
        arguments = self._testpmd(path) if server == TESTPMD else self._serve(server, path)
        pid = stack.enter_context(started(arguments, path))
        return stack.enter_context(NetTarget(path, self.load, max(self.points), pid))

    def _serve(self, server: str, path: Path) -> list[str]:
        size = f",frame-size={max(self.points)}" if self.network == SOURCE else ""
        packed = "on" if self.load.packed else "off"
        device = f"{server.capitalize()}{self.network.capitalize()}"
        options = f"num-queues={self.load.num_queues},packed={packed}{size}"
        return serve(f"pyvirtio.bench.networks:{device},{options}", path)

    def _testpmd(self, path: Path) -> list[str]:
        _, mode = NETWORKS[self.network]
        queues = self.load.num_queues
        cores = f"(0-{queues})@(0-{(os.cpu_count() or 1) - 1})"  # one for commands, and the rest wherever there is room
        return [
            program(TESTPMD, "dpdk-dev"),
            "--no-huge", "--no-pci", "-m", str(MEMORY), "--lcores", cores, "--log-level", "*:error",
            "--file-prefix", f"pyvirtio-{path.stem}-{os.getpid()}",
            "--vdev", f"net_vhost0,iface={path},queues={queues}",
            "--", "--auto-start", "--stats-period", str(SELDOM), "--forward-mode", mode, "--no-flush-rx",
            "--total-num-mbufs", str(BUFFERS), "--rxq", str(queues), "--txq", str(queues),
            "--nb-cores", str(queues), "--port-topology", "loop", "--txpkts", str(max(self.points)),
        ]  # fmt: skip
