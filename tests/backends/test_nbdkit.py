"""Plugins of nbdkit in Python, loaded unchanged: the same file serves nbdkit's own tests of ours."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pyvirtio.backends.nbdkit import Nbdkit
from pyvirtio.devices.blk import Blk
from pyvirtio.errors import ConfigError
from pyvirtio.testing import Guest
from pyvirtio.testing.blk import Disk

RAM = '''
"""A RAM disk; `size` and `bad` are its options."""
import errno
import nbdkit

API_VERSION = 2
size, bad, calls = 0, -1, []


def config(key, value):
    global size, bad
    if key == "size":
        size = nbdkit.parse_size(value)
    elif key == "bad":
        bad = int(value)
    else:
        raise RuntimeError("unknown parameter " + key)


def config_complete():
    global disk
    if size == 0:
        raise RuntimeError("size=SIZE is required")
    disk = bytearray(size)


def thread_model():
    return nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS


def open(readonly):
    nbdkit.debug("open: readonly=%d" % readonly)
    return {"readonly": readonly}


def close(h):
    calls.append("close")


def get_size(h):
    return len(disk)


def pread(h, buf, offset, flags):
    if offset <= bad < offset + len(buf):
        nbdkit.set_error(errno.EPERM)
        raise RuntimeError("a bad byte")
    buf[:] = disk[offset:offset + len(buf)]


def pwrite(h, buf, offset, flags):
    end = offset + len(buf)
    disk[offset:end] = buf


def flush(h, flags):
    calls.append("flush")


def trim(h, count, offset, flags):
    disk[offset:offset + count] = bytes(count)


def zero(h, count, offset, flags):
    disk[offset:offset + count] = bytes(count)


def can_trim(h):
    return False
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "ram.py"
    path.write_text(RAM)
    return path


def test_the_plugin_is_one_for_nbdkit(plugin: Path) -> None:
    nbdkit = shutil.which("nbdkit")
    if nbdkit is None:
        pytest.skip("nbdkit is not installed")
    done = subprocess.run([nbdkit, "python", plugin, "--dump-plugin"], capture_output=True, text=True, timeout=60)
    assert "path=" in done.stdout
    assert done.returncode == 0


def test_a_plugin_is_a_disk(guest: Guest, plugin: Path) -> None:
    device = Blk(Nbdkit(plugin, size="1M"))
    disk = Disk(guest.plug(device))
    data = os.urandom(4096)
    disk.write(8, data)
    disk.flush()
    assert disk.read(8, 4096) == data
    disk.write_zeroes(8, 1)
    assert disk.read(8, 4096) == bytes(512) + data[512:]
    assert not device.drive.offers("discard")


def test_an_exception_fails_the_request_with_the_error_that_was_set(guest: Guest, plugin: Path) -> None:
    backend = Nbdkit(plugin, size="1M", bad="5000")
    with pytest.raises(PermissionError):
        backend.preadv([memoryview(bytearray(4096))], 4096)
    disk = Disk(guest.plug(Blk(backend)))
    with pytest.raises(OSError, match="IOERR"):
        disk.read(8, 4096)
    assert disk.read(0, 4096) == bytes(4096)


def test_a_plugin_that_is_read_only(tmp_path: Path) -> None:
    path = tmp_path / "zeroes.py"
    path.write_text(
        "API_VERSION = 2\n"
        "def open(readonly): return 1\n"
        "def get_size(h): return 1024\n"
        "def pread(h, buf, offset, flags): buf[:] = bytes(len(buf))\n"
    )
    disk = Nbdkit(path)
    assert disk.readonly
    assert disk.capacity == 1024
    disk.close()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (None, {}, "No such file"),
        ("def open(readonly): return 1", {}, "API_VERSION is 1; only plugins with API_VERSION = 2"),
        ("API_VERSION = 2", {}, r"the plugin defines no open\(\)"),
        ("API_VERSION = 2", {"size": "1"}, r"takes no option \(given: size\)"),
        ("1 / 0", {}, "ZeroDivisionError"),
        ("API_VERSION = 2\ndef open(r): return 1\ndef get_size(h): return 100", {}, "100 bytes; a disk is"),
        (RAM, {}, "config_complete: RuntimeError: size=SIZE is required"),
        (RAM, {"colour": "red"}, "config: RuntimeError: unknown parameter colour"),
    ],
)
def test_what_is_wrong_with_a_plugin_is_one_line(
    tmp_path: Path, source: str | None, options: dict[str, str], message: str
) -> None:
    path = tmp_path / "plugin.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ConfigError, match=message):
        Nbdkit(path, readonly=False, **options)
