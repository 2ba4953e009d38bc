"""Tap interfaces of the host: Linux's Documentation/networking/tuntap.rst."""

import errno
import fcntl
import getpass
import logging
import os
import socket
import struct
from contextlib import ExitStack
from typing import Annotated, Literal

from pyvirtio.backends.net import NetBackend
from pyvirtio.errors import ConfigError
from pyvirtio.properties import Range
from pyvirtio.spec import NetFeature

TUN = "/dev/net/tun"
VHOST_NET = "/dev/vhost-net"
MAX_QUEUES = 256
MAX_NAME = 15
MAX_POLL_US = 1_000_000
ETHERNET_MTU = 1500

# <linux/if_tun.h>
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
TUNSETQUEUE = 0x400454D9
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE = 0x0200, 0x0400
TUN_F_CSUM, TUN_F_USO4, TUN_F_USO6 = 0x01, 0x20, 0x40
OFFLOADS = {
    NetFeature.GUEST_CSUM: TUN_F_CSUM,
    NetFeature.GUEST_TSO4: 0x02,
    NetFeature.GUEST_TSO6: 0x04,
    NetFeature.GUEST_ECN: 0x08,
    NetFeature.GUEST_UFO: 0x10,
    NetFeature.GUEST_USO4: TUN_F_USO4,
    NetFeature.GUEST_USO6: TUN_F_USO6,
}

# <linux/sockios.h>
SIOCGIFMTU, SIOCGIFINDEX = 0x8921, 0x8933
IFREQ = struct.Struct("16sH22x")
IFREQ_INT = struct.Struct("16si20x")

VNET_HEADER = 12
"""Bytes of `struct virtio_net_hdr_v1` in front of each frame, which the core expects."""

log = logging.getLogger("pyvirtio")


class Tap(NetBackend):
    """A tap interface, made if it is missing and that is permitted. Its addresses and routes are the host's business.

    What this makes goes away with it. With `vhost_fds` the kernel's vhost-net moves the frames.
    """

    framing = "tap"
    vnet_header = True
    attached: int
    """Queues that the host may send on."""

    def __init__(
        self,
        *,
        ifname: Annotated[str, "name of the interface; the host chooses one unless given"] = "",
        queues: Annotated[int, "queue pairs; for more than 1 a multi_queue interface", Range(1, MAX_QUEUES)] = 1,
        vhost: Annotated[bool, "let the kernel's vhost-net move the frames, if there is one"] = False,
        vhostforce: Annotated[bool, "vhost=on, and an error if there is none"] = False,
        poll_us: Annotated[int, "with vhost: microseconds that it polls before it sleeps", Range(0, MAX_POLL_US)] = 0,
        script: Annotated[Literal["no"], "no script configures the interface"] = "no",
        downscript: Annotated[Literal["no"], "nor afterwards"] = "no",
    ) -> None:
        if len(ifname.encode()) > MAX_NAME:
            raise ConfigError(f"ifname={ifname}: {len(ifname.encode())} bytes, at most {MAX_NAME} are allowed")
        with ExitStack() as undo:
            undo.callback(self.close)
            self.ifname = ifname
            self._open(queues)
            self.mtu = self._unusual_mtu()
            self.uso = self._offers(TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6)
            self.attached = queues
            if vhost or vhostforce:
                self.vhost_fds = self._open_vhost(force=vhostforce)
            elif poll_us:
                raise ConfigError(f"poll-us={poll_us} is allowed with vhost=on only")
            self.vhost_poll_us = poll_us
            undo.pop_all()

    def __str__(self) -> str:
        queues = f", {len(self.fds)} queues" if len(self.fds) > 1 else ""
        return f"tap {self.ifname}{queues}{', vhost' if self.vhost_fds else ''}"

    def set_offload(self, features: NetFeature) -> None:
        flags = sum(flag for feature, flag in OFFLOADS.items() if feature in features)
        fcntl.ioctl(self.fds[0], TUNSETOFFLOAD, flags)

    def set_queue_pairs(self, count: int) -> None:
        """The host spreads its frames over the queues that are attached."""
        while self.attached < count:
            fcntl.ioctl(self.fds[self.attached], TUNSETQUEUE, IFREQ.pack(b"", IFF_ATTACH_QUEUE))
            self.attached += 1
        while self.attached > count:
            fcntl.ioctl(self.fds[self.attached - 1], TUNSETQUEUE, IFREQ.pack(b"", IFF_DETACH_QUEUE))
            self.attached -= 1

    def close(self) -> None:
        fds, self.fds, self.vhost_fds = [*self.fds, *self.vhost_fds], [], []
        for fd in fds:
            os.close(fd)

    def _open(self, queues: int) -> None:
        multi_queue = queues > 1
        for _ in range(queues):
            self.fds = [*self.fds, _open_tun()]
            try:
                self._set_interface(self.fds[-1], multi_queue)
            except OSError as error:
                multi_queue = self._accept_multi_queue(error, queues)
            fcntl.ioctl(self.fds[-1], TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER))

    def _set_interface(self, fd: int, multi_queue: bool) -> None:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if multi_queue else 0)
        answer = fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(self.ifname.encode(), flags))
        self.ifname = IFREQ.unpack(answer)[0].rstrip(b"\0").decode()

    def _accept_multi_queue(self, error: OSError, queues: int) -> bool:
        """One queue of a multi-queue interface will do; for what else went wrong `ConfigError`."""
        if error.errno == errno.EINVAL and _exists(self.ifname):
            try:
                self._set_interface(self.fds[-1], queues == 1)
            except OSError:
                raise ConfigError(f"ifname={self.ifname}: the interface is no tap of ours to use") from None
            if queues == 1:
                return True
            raise ConfigError(f"queues={queues}: the interface {self.ifname} was made without multi_queue")
        raise ConfigError(self._why(error)) from None

    def _why(self, error: OSError) -> str:
        if error.errno == errno.E2BIG:
            return f"ifname={self.ifname}: all queues of the interface are in use"
        if error.errno == errno.EBUSY:
            return f"ifname={self.ifname}: the interface is in use"
        if error.errno != errno.EPERM:
            return f"ifname={self.ifname}: {error.strerror}"
        if _exists(self.ifname):
            return f"ifname={self.ifname}: not permitted: the interface is another user's"
        if not self.ifname:
            return "not permitted to make an interface: name one that exists with ifname="
        make = f"ip tuntap add {self.ifname} mode tap user {getpass.getuser()}"
        return f"ifname={self.ifname}: there is no such interface, and it may not be made; root may: {make}"

    def _unusual_mtu(self) -> int | None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
            answer = fcntl.ioctl(query, SIOCGIFMTU, IFREQ_INT.pack(self.ifname.encode(), 0))
        mtu = int(IFREQ_INT.unpack(answer)[1])
        return None if mtu == ETHERNET_MTU else mtu

    def _offers(self, flags: int) -> bool:
        try:
            fcntl.ioctl(self.fds[0], TUNSETOFFLOAD, flags)
        except OSError:
            return False
        fcntl.ioctl(self.fds[0], TUNSETOFFLOAD, 0)
        return True

    def _open_vhost(self, *, force: bool) -> list[int]:
        with ExitStack() as undo:
            fds = []
            try:
                for _ in self.fds:
                    fds.append(os.open(VHOST_NET, os.O_RDWR | os.O_CLOEXEC))
                    undo.callback(os.close, fds[-1])
            except OSError as error:
                if force:
                    raise ConfigError(f"vhostforce=on: {VHOST_NET}: {error.strerror}") from None
                log.warning(
                    "%s: no vhost (%s: %s); frames go through this process", self.ifname, VHOST_NET, error.strerror
                )
                return []
            undo.pop_all()
            return fds


def _open_tun() -> int:
    try:
        return os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{TUN}: {error.strerror}") from None


def _exists(ifname: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        try:
            fcntl.ioctl(query, SIOCGIFINDEX, IFREQ_INT.pack(ifname.encode(), 0))
        except OSError:
            return False
    return True
