"""`--netdev`: the networks that devices name by their ids."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pyvirtio.backends.net import NetBackend, Pair
from pyvirtio.cli.classes import Catalogue, make
from pyvirtio.cli.options import parse, print_properties, print_table, take, take_id, wants_help
from pyvirtio.cli.outputs import Outputs
from pyvirtio.errors import ConfigError
from pyvirtio.properties import Property, bind_each, properties_of

KINDS = {
    "tap": "pyvirtio.backends.tap:Tap",
    "user": "pyvirtio.backends.passt:Passt",
    "stream": "pyvirtio.backends.sockets:Stream",
    "dgram": "pyvirtio.backends.sockets:Dgram",
    "pair": "pyvirtio.backends.net:Pair",
}
OnClose = Callable[[Callable[[], object]], object]
CATALOGUE = Catalogue("--netdev", "network", NetBackend, KINDS, "pyvirtio.networks")
REPEATABLE = ("hostfwd",)
HELP = """\
a network for netdev=ID of a device; `help` lists the kinds, `KIND,help` its properties"""


class Capture:
    """What every network takes besides its own properties."""

    def __init__(self, *, pcap: Annotated[Path | None, "write all frames to this capture file"] = None) -> None:
        self.path = pcap


@dataclass
class Netdev:
    """One `--netdev`. `used_by` is the name of its device."""

    id: str
    backend: NetBackend
    used_by: str | None = None
    option: ClassVar[str] = "netdev"


def show_help(texts: list[str]) -> bool:
    """Print the tables that the options ask for with `help`; whether there were any."""
    asked = [options for options in map(_parse, texts) if wants_help(options)]
    for options in asked:
        kind = options.get("type", "help")
        if kind in ("help", "?"):
            print_table("--netdev", ("kind", "what it is"), CATALOGUE.rows())
        else:
            print_properties(f"--netdev {kind}", properties(kind))
    return bool(asked)


def properties(kind: str) -> list[Property]:
    return [*properties_of(CATALOGUE.find(kind)), *properties_of(Capture)]


def open_netdevs(texts: list[str], outputs: Outputs, on_close: OnClose) -> dict[str, Netdev]:
    """The networks by id; `on_close` is told how to close each."""
    netdevs: dict[str, Netdev] = {}
    for text in texts:
        netdev = _open(_parse(text), netdevs, outputs, on_close)
        netdevs[netdev.id] = netdev
    return netdevs


def _open(options: dict[str, str], netdevs: dict[str, Netdev], outputs: Outputs, on_close: OnClose) -> Netdev:
    kind = take(options, "type", "--netdev")
    cls = CATALOGUE.find(kind)
    name = take_id(options, netdevs, f"--netdev {kind}")
    pairs = {netdev.id: netdev.backend for netdev in netdevs.values() if isinstance(netdev.backend, Pair)}
    own, capture = bind_each((cls, Capture), options, name, {Pair: pairs})
    backend = make(cls, own, name)
    on_close(backend.close)
    try:
        _capture(backend, Capture(**capture), outputs, on_close)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    return Netdev(name, backend)


def _capture(backend: NetBackend, capture: Capture, outputs: Outputs, on_close: OnClose) -> None:
    if capture.path is None:
        return
    if backend.vhost_fds:
        raise ConfigError("pcap: with vhost the frames do not come by here; vhost=off captures them")
    try:
        fd = os.open(outputs.path(capture.path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"pcap={capture.path}: {error.strerror}") from None
    on_close(lambda: os.close(fd))
    backend.pcap = fd


def _parse(text: str) -> dict[str, str]:
    return parse(text, implied="type", repeatable=REPEATABLE)
