"""Disks in file objects."""

import io
from pathlib import Path
from typing import BinaryIO

import fsspec
import pytest

from pyvirtio.backends.fileobj import FileObject, Url
from pyvirtio.devices.blk import Blk
from pyvirtio.errors import ConfigError
from pyvirtio.testing import Guest
from pyvirtio.testing.blk import Disk

SIZE = 64 << 10


class Slow(io.BytesIO):
    """Gives and takes at most 100 bytes at once, as raw files may."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, 100))

    def write(self, data: object) -> int:
        return super().write(bytes(data)[:100])  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", ["bytes", "slow", "file", "fsspec"])
def test_a_file_object_is_a_disk(guest: Guest, kind: str, tmp_path: Path) -> None:
    file: BinaryIO
    if kind == "file":
        (tmp_path / "disk").write_bytes(bytes(SIZE))
        file = (tmp_path / "disk").open("r+b")
    elif kind == "fsspec":
        fsspec.filesystem("memory").pipe("/disk", bytes(SIZE))
        file = fsspec.open("memory://disk", "r+b").open()
    else:
        file = (Slow if kind == "slow" else io.BytesIO)(bytes(SIZE))
    disk = Disk(guest.plug(Blk(FileObject(file))))
    data = bytes(range(256)) * 4
    disk.write(3, data)
    disk.flush()
    assert disk.read(2, 2048) == bytes(512) + data + bytes(512)


def test_what_cannot_be_written_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with (tmp_path / "disk").open("rb") as file:
        assert FileObject(file).readonly


def test_a_url_is_opened_by_fsspec(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x" * SIZE)
    disk = Url(f"file://{tmp_path / 'disk'}")
    assert disk.readonly
    assert disk.pread(512, 512) == b"x" * 512
    disk.close()
    with pytest.raises(ConfigError, match="nowhere"):
        Url(f"file://{tmp_path / 'nowhere'}")
    with pytest.raises(ConfigError, match="Protocol not known: gopher"):
        Url("gopher://disk")


def test_a_size_that_no_disk_has() -> None:
    with pytest.raises(ConfigError, match="100 bytes; a disk is whole sectors"):
        FileObject(io.BytesIO(bytes(100)))
