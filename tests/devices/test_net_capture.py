"""Capture files of network devices."""

import os
import struct
from pathlib import Path

import pytest
from wire import Wire, counters, plug

from pyvirtio.backends.net import NetBackend
from pyvirtio.devices.net import Net
from pyvirtio.testing import Guest
from pyvirtio.testing.net import frame


def test_frames_of_both_directions_are_captured(guest: Guest, tmp_path: Path) -> None:
    wire = Wire()
    path = tmp_path / "frames.pcap"
    with path.open("wb") as file:
        wire.pcap = file.fileno()
        nic = plug(guest, wire)
    nic.send(frame(32, 100)).wait()
    nic.post(512, 4)
    wire.put(frame(33, 1300))
    nic.receive()
    assert read_capture(path) == [frame(32, 100), frame(33, 1300)]


def test_a_capture_that_cannot_be_written_does_not_stop_the_traffic(guest: Guest) -> None:
    network = NetBackend()
    reading, network.pcap = os.pipe()
    nic = plug(guest, network)
    os.close(reading)
    os.close(network.pcap)
    for number in range(2):
        nic.send(frame(number)).wait()
    assert counters(nic)["tx_frames"] == 2
    assert counters(nic)["pcap_missed"] == 2


def test_a_capture_that_cannot_begin_is_an_error() -> None:
    network = NetBackend()
    with open("/dev/full", "wb", buffering=0) as full:
        network.pcap = full.fileno()
        with pytest.raises(OSError, match="No space left"):
            Net(network)


def read_capture(path: Path) -> list[bytes]:
    """The frames of a pcap file of Ethernet."""
    data = path.read_bytes()
    magic, major, minor, _, _, _, link = struct.unpack("<IHHIIII", data[:24])
    assert (magic, major, minor, link) == (0xA1B2C3D4, 2, 4, 1)
    frames, at = [], 24
    while at < len(data):
        _, micros, captured, length = struct.unpack("<IIII", data[at : at + 16])
        assert captured == length
        assert micros < 1_000_000
        frames.append(data[at + 16 : at + 16 + captured])
        at += 16 + captured
    return frames
