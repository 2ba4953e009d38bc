"""The network of an ordinary user: `passt` translates between the guest's frames and sockets of the host."""

import logging
import os
import re
import shutil
import socket
import subprocess
import threading
from dataclasses import dataclass
from typing import Annotated

from pyvirtio.backends.net import NetBackend
from pyvirtio.errors import ConfigError

END_SECONDS = 5
FORWARD = re.compile(r"(tcp|udp|):([^:]*):([0-9]+)-:([0-9]+)")
MAX_PORT = 65535

log = logging.getLogger("pyvirtio")


class Passt(NetBackend):
    """Connections to wherever the user running this may connect, without privileges (package `passt`).

    The guest has the host's addresses, by DHCP and NDP; its gateway's address leads to the host itself. The process
    ends with this. Ends it earlier, an error is logged, and the guest is without a network.
    """

    framing = "stream"

    def __init__(
        self,
        *,
        hostfwd: Annotated[str, "a port of the host that leads to the guest, tcp::2222-:22; may be repeated"] = "",
    ) -> None:
        """`hostfwd` has any number of them, with commas in between."""
        program = shutil.which("passt")
        if program is None:
            raise ConfigError("there is no passt: install the package passt")
        wanted = [_parsed(text) for text in filter(None, hostfwd.split(","))]
        for forward in wanted:
            forward.check()
        forwards = [word for forward in wanted for word in forward.words]
        self._closing = False
        self._said = os.memfd_create("passt", os.MFD_CLOEXEC)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.fds = [ours.detach()]
        with theirs:
            self._process = subprocess.Popen(
                [program, "--foreground", "--quiet", "--fd", str(theirs.fileno()), *forwards],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                start_new_session=True,  # a Ctrl-C on the terminal is for the guest
            )
        self._supervisor = threading.Thread(target=self._supervise, name="pyvirtio passt", daemon=True)
        self._supervisor.start()

    def __str__(self) -> str:
        return "user (passt)"

    def close(self) -> None:
        if not self.fds:
            return
        self._closing = True
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._supervisor.join()
        fds, self.fds = [*self.fds, self._said], []
        for fd in fds:
            os.close(fd)

    def _supervise(self) -> None:
        status = self._process.wait()
        if not self._closing:
            log.error("passt ended with status %d: %s", status, self._last_words() or "it did not say why")

    def _last_words(self) -> str:
        lines = os.pread(self._said, 1 << 16, 0).decode(errors="replace").splitlines()
        # Without a syslog, versions of 2023 complain about that after each line.
        return next((line for line in reversed(lines) if line and "syslog" not in line), "")


@dataclass(frozen=True)
class Forward:
    """A port of the host that leads to one of the guest."""

    text: str
    """As the user gave it."""
    protocol: str
    address: str
    port: int
    to: int

    @property
    def words(self) -> list[str]:
        """For passt."""
        flag = "-u" if self.protocol == "udp" else "-t"
        return [flag, (f"{self.address}/" if self.address else "") + f"{self.port}:{self.to}"]

    def check(self) -> None:
        """`ConfigError` if the port cannot be had now; passt would end, but only once the machine runs."""
        kind = socket.SOCK_DGRAM if self.protocol == "udp" else socket.SOCK_STREAM
        with socket.socket(socket.AF_INET, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.address, self.port))
            except OSError as error:
                raise ConfigError(f"hostfwd={self.text}: {error.strerror}") from None


def _parsed(text: str) -> Forward:
    """One of QEMU's `hostfwd`."""
    match = FORWARD.fullmatch(text)
    if match is None:
        raise ConfigError(f"hostfwd={text} is not allowed: [tcp|udp]:[ADDRESS]:PORT-:PORT, such as tcp::2222-:22")
    protocol, address, *ports = match.groups()
    for port in ports:
        if not 1 <= int(port) <= MAX_PORT:
            raise ConfigError(f"hostfwd={text}: port {port} is not allowed: 1 to {MAX_PORT}")
    return Forward(text, protocol, address, *map(int, ports))
