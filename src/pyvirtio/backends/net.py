"""Network backends: where the frames of a network device go, and where those for it come from."""

import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pyvirtio.errors import ConfigError
from pyvirtio.spec import NetFeature

Framing = Literal["tap", "datagram", "stream"]


def nowhere(frames: Iterable[bytes]) -> int:
    """Where frames go while no device is there."""
    return 0


class NetBackend:
    """A network. Either it opens file descriptors, and the core moves the frames without Python, or it is Python.

    With file descriptors it sets `fds`, one for each queue pair, and says how to talk to them:

    - `framing` is "tap" (one frame for each read and write), "datagram" (one for each message of a socket), or
      "stream" (a 4-byte big-endian length before each frame);
    - with `vnet_header` a 12-byte `struct virtio_net_hdr` (virtio 1.3, 5.1.6) stands before each frame, whatever
      the driver negotiated. Only then are checksum and segmentation offloads offered to the driver.

    They must be non-blocking, and stay the backend's: the core keeps duplicates.

    A backend in Python defines `send(frame)`, which gets each Ethernet frame of the guest as bytes, on the I/O thread
    of the queue it was sent on; for frames to the guest it calls `inject`. It sees no headers and offers no offloads.
    """

    named_by: ClassVar[str] = "a --netdev"
    framing: Framing = "tap"
    fds: Sequence[int] = ()
    vnet_header: bool = False
    uso: bool = False
    """Whether UDP segments may be left to it as well; with a header TCP segments always may."""
    mtu: int | None = None
    """The largest payload of a frame, in bytes, if the network has a limit worth telling the driver."""
    identity: str = ""
    """What tells this network from others of the host: a part of the addresses that are made for its devices."""
    pcap: int | None = None
    """File descriptor of a capture file: the core writes the frames of both directions to it."""

    vhost_fds: Sequence[int] = ()
    """One `/dev/vhost-net` for each of `fds`, if the kernel is to move the frames instead of the core."""
    vhost_poll_us: int = 0
    """How long vhost looks for more frames before it sleeps and has to be notified, in microseconds."""

    def __str__(self) -> str:
        return type(self).__name__.lower()

    @property
    def queue_pairs(self) -> int:
        """How many queue pairs a device on this network can have at most."""
        return max(1, len(self.fds))

    def inject(self, frames: Iterable[bytes]) -> int:
        """Send frames to the guest, from any thread; return how many were queued for it.

        The queue is bounded: what it does not hold is dropped and counted by the device, as is everything while
        no driver is up.
        """
        return self._inject(frames)

    def connect(self, inject: Callable[[Iterable[bytes]], int]) -> None:
        """A device took this backend: `inject` leads to it until `disconnect`."""
        self._inject = inject

    def disconnect(self) -> None:
        self._inject = nowhere

    _inject: Callable[[Iterable[bytes]], int] = staticmethod(nowhere)

    def set_offload(self, features: NetFeature) -> None:
        """The driver takes frames with these of the guest's offloads (VIRTIO_NET_F_GUEST), and no others."""

    def set_queue_pairs(self, count: int) -> None:
        """The driver uses the first `count` queue pairs: frames for it may come on these only."""

    def close(self) -> None:
        """Release what the backend holds of the host."""


class Pair(NetBackend):
    """One end of a cable between two devices; who makes the other end names this one as its peer.

    Offloads go through as they are: a segment larger than a frame for a driver that did not agree to them is
    dropped by its device. While the other end takes nothing, a driver waits.
    """

    framing = "datagram"
    vnet_header = True
    uso = True

    def __init__(self, peer: Annotated["Pair | None", "the other end, if that was made before"] = None) -> None:
        if peer is None:
            end, self._loose_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        elif peer._loose_end is None:
            raise ConfigError("peer: a cable has two ends, and this one has both")
        else:
            end, peer._loose_end = peer._loose_end, None
        end.setblocking(False)
        self.fds = [end.detach()]

    _loose_end: socket.socket | None = None

    @classmethod
    def ends(cls) -> tuple[Self, Self]:
        one = cls()
        return one, cls(one)

    def close(self) -> None:
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)
        if self._loose_end is not None:
            self._loose_end.close()
