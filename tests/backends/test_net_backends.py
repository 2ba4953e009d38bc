"""What network backends are on their own, without a device."""

import os
import socket

import pytest

from pyvirtio.backends.net import NetBackend, Pair
from pyvirtio.errors import ConfigError
from pyvirtio.testing.plugin import nothing_left_behind


def test_the_ends_of_a_pair_carry_whole_messages_and_never_block() -> None:
    with nothing_left_behind():
        one, other = Pair.ends()
        assert (one.queue_pairs, one.framing, one.vnet_header) == (1, "datagram", True)
        os.write(one.fds[0], b"first")
        os.write(one.fds[0], b"second")
        assert [os.read(other.fds[0], 100) for _ in range(2)] == [b"first", b"second"]
        with pytest.raises(BlockingIOError):
            os.read(other.fds[0], 100)
        for end in (one, other, other):
            end.close()


def test_an_end_notices_that_the_other_is_closed() -> None:
    one, other = Pair.ends()
    other.close()
    with pytest.raises(BrokenPipeError), socket.socket(fileno=os.dup(one.fds[0])) as end:
        end.send(b"anybody?")
    one.close()


def test_a_cable_has_two_ends() -> None:
    with nothing_left_behind():
        one = Pair()
        other = Pair(peer=one)
        for end in (one, other):
            with pytest.raises(ConfigError, match="a cable has two ends"):
                Pair(peer=end)
        other.close()
        one.close()
        Pair().close()


def test_frames_for_a_backend_without_a_device_go_nowhere() -> None:
    assert NetBackend().inject([b"frame"]) == 0
