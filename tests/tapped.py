"""A driver in this process of a network device on a real tap interface, and the host's end of that."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from own_network import ip

from pyvirtio.backends.tap import Tap
from pyvirtio.devices.net import Net
from pyvirtio.testing import Guest
from pyvirtio.testing.driver import Interface
from pyvirtio.testing.net import Nic
from pyvirtio.testing.queue import HANG

ETHERTYPE = 0x88B5


@contextmanager
def tapped(
    *, ioeventfd: bool = True, transport: Interface = "modern", features: int = ~0, msix: bool = True, **tap: Any
) -> Iterator[tuple[Nic, socket.socket]]:
    """The driver's card, and a socket that sends and receives the host's frames; `tap` are properties of the tap."""
    with Guest(ioeventfd=ioeventfd) as guest:
        net = Net(Tap(ifname="tap7", **tap))
        driver = guest.plug(net, transport=transport, features=features, msix=msix)
        ip("link set tap7 addrgenmode none")  # or IPv6 has something to say
        ip("link set tap7 up")
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE)) as host:
            host.bind(("tap7", ETHERTYPE))
            host.settimeout(HANG)
            yield Nic(driver, driver.features), host
