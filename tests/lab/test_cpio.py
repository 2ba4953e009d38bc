"""The archives are what busybox's cpio reads."""

import stat
import subprocess
from pathlib import Path

from pyvirtio.lab.cpio import Archive


def unpack(archive: Archive, directory: Path) -> None:
    command = ["busybox", "cpio", "-idm"]
    subprocess.run(command, input=archive.finish(), cwd=directory, check=True, capture_output=True, timeout=30)


def test_files_directories_and_links_come_out_as_they_went_in(tmp_path: Path) -> None:
    archive = Archive()
    archive.directory("bin")
    archive.file("bin/tool", b"#!/bin/sh\n", executable=True)
    archive.file("bin/odd", b"12345")
    archive.symlink("bin/other", "tool")
    unpack(archive, tmp_path)

    assert sorted(path.name for path in (tmp_path / "bin").iterdir()) == ["odd", "other", "tool"]
    assert (tmp_path / "bin/odd").read_bytes() == b"12345"
    assert (tmp_path / "bin/other").readlink() == Path("tool")
    assert stat.S_IMODE((tmp_path / "bin/tool").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "bin/odd").stat().st_mode) == 0o644


def test_a_device_node_keeps_its_numbers() -> None:
    archive = Archive()
    archive.character_device("dev/console", 5, 1)
    header = archive.finish()[6:110]
    fields = [int(header[at : at + 8], 16) for at in range(0, len(header), 8)]
    assert stat.S_ISCHR(fields[1])
    assert fields[9:11] == [5, 1]


def test_every_entry_starts_on_a_multiple_of_four() -> None:
    archive = Archive()
    for length in range(5):
        archive.file("x" * (length + 1), b"y" * length)
    data = archive.finish()
    starts = [at for at in range(len(data)) if data.startswith(b"070701", at)]
    assert len(starts) == 6
    assert all(at % 4 == 0 for at in starts)
