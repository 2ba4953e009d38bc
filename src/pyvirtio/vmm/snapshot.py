"""A machine that stands still as a file, and the file as a machine again, in another process (docs/snapshot.md).

The file is a ZIP archive, stored: `machine.json` says what the machine is and holds the state of its parts; `memory` is
the RAM without what is zero, in the order of the extents in `machine.json`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

from pyvirtio._core import GuestMemory
from pyvirtio.errors import ConfigError, GuestError
from pyvirtio.properties import show_size
from pyvirtio.vmm.firmware import Firmware

if TYPE_CHECKING:
    from pyvirtio.transports.pci import VirtioPci
    from pyvirtio.vmm.boot import LinuxBoot
    from pyvirtio.vmm.machine import Machine

VERSION = 1
"""Of the format, the state of each part included: a change of any of them is another version."""
KIND = "pyvirtio snapshot"
STATE, MEMORY = "machine.json", "memory"
PIECE = 64 * 1024
"""Bytes of memory that are stored, or left out because all of them are zero."""
ZEROES = bytes(PIECE)
MAX_STATE = 64 << 20
"""Bytes of `machine.json`; that of a large machine has a few million."""

Extent = tuple[int, int]
"""Guest address and length of RAM that is stored."""


def write(machine: Machine, path: Path) -> None:
    """Write `machine`, in which nothing runs, to `path`. On an error there is no such file, or still the one before."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: not a file")
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            with ZipFile(file, "w") as archive:
                with archive.open(MEMORY, "w", force_zip64=True) as memory:
                    extents = [_store(memory, address, data) for address, data in nonzero(machine.memory)]
                archive.writestr(STATE, encode(_contents(machine, merge(extents))))
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def read(machine: Machine, path: Path) -> None:
    """Fill `machine`, which has not booted. `ConfigError` for a file that is no snapshot of such a machine."""
    with _opened(path, _description(machine)) as (archive, contents):
        with archive.open(MEMORY) as memory:
            for address, length in contents["extents"]:
                _load(machine.memory, memory, address, length)
            if memory.read(1):
                raise ValueError("more memory than it says")
        machine.load(contents["state"])


def check(path: Path, machine: dict[str, Any]) -> None:
    """`ConfigError` for a file that is no snapshot of what `describe` describes; its memory and state are not read."""
    with _opened(path, machine):
        pass


@contextmanager
def _opened(path: Path, machine: dict[str, Any]) -> Iterator[tuple[ZipFile, dict[str, Any]]]:
    """The file and what its `machine.json` says. All that is wrong with it becomes a `ConfigError`."""
    try:
        with ZipFile(path) as archive:
            _check_size(archive)
            contents = decode(archive.read(STATE))
            _check(contents, machine)
            yield archive, contents
    except ConfigError as error:
        raise ConfigError(f"snapshot {path}: {error}") from error
    except (OSError, RuntimeError, GuestError) as error:
        raise ConfigError(f"snapshot {path}: {getattr(error, 'strerror', None) or error}") from error
    except (ArithmeticError, AttributeError, BadZipFile, EOFError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"snapshot {path}: truncated, damaged, or no snapshot ({error})") from error


def describe(boot: LinuxBoot | Firmware, memory: GuestMemory, smp: int, devices: list[VirtioPci]) -> dict[str, Any]:
    """What a snapshot and the machine that it is restored in must have in common."""
    return {
        "memory": show_size(sum(size for _, size, _, _ in memory.regions)),
        "CPUs": smp,
        "firmware": hashlib.sha256(boot.image).hexdigest() if isinstance(boot, Firmware) else None,
        "devices": ", ".join(f"{f.name} ({type(f.device).__name__}, slot {f.slot})" for f in devices),
    }


def _description(machine: Machine) -> dict[str, Any]:
    return describe(machine.boot, machine.memory, machine.smp, machine.devices)


def _check_size(archive: ZipFile) -> None:
    """The file may be a stranger's, and small for what it would be in memory."""
    for name in (STATE, MEMORY):
        if archive.getinfo(name).compress_type != ZIP_STORED:
            raise ValueError(f"{name} is compressed")
    if (size := archive.getinfo(STATE).file_size) > MAX_STATE:
        raise ValueError(f"{STATE} has {size} bytes, at most {MAX_STATE} are allowed")


def _check(contents: dict[str, Any], ours: dict[str, Any]) -> None:
    if contents["kind"] != KIND:
        raise ValueError(f"it is a {contents['kind']}")
    if contents["version"] != VERSION:
        raise ConfigError(f"has version {contents['version']} of the format, this is version {VERSION}")
    for what, is_ours in ours.items():
        if (wanted := contents["machine"][what]) != is_ours:
            raise ConfigError(f"{what} of that machine: {wanted or 'none'}; of this one: {is_ours or 'none'}")


def _contents(machine: Machine, extents: list[Extent]) -> dict[str, Any]:
    return {
        "kind": KIND,
        "version": VERSION,
        "machine": _description(machine),
        "extents": extents,
        "state": machine.save(),
    }


def encode(contents: dict[str, Any]) -> bytes:
    """As JSON, in which bytes are `{"hex": ...}`."""
    return json.dumps(contents, default=lambda value: {"hex": bytes(value).hex()}).encode()


def decode(text: bytes) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads(
        text, object_hook=lambda d: bytes.fromhex(d["hex"]) if d.keys() == {"hex"} else d
    )
    return contents


def nonzero(memory: GuestMemory) -> Iterator[tuple[int, bytes]]:
    """The RAM in pieces with their addresses; pieces that were never touched, or are zero, are left out."""
    for start, size, fd, offset in memory.regions:
        at, end = offset, offset + size
        while (at := _data_from(fd, at, end)) < end:
            at -= (at - offset) % PIECE
            data = os.pread(fd, min(PIECE, end - at), at)
            if data != ZEROES[: len(data)]:
                yield start + at - offset, data
            at += len(data)


def _data_from(fd: int, at: int, end: int) -> int:
    """Where the file has data again, or `end`."""
    try:
        return min(os.lseek(fd, at, os.SEEK_DATA), end)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return end


def merge(extents: list[Extent]) -> list[Extent]:
    """The same, with one extent for those that touch."""
    merged: list[Extent] = []
    for address, length in extents:
        if merged and sum(merged[-1]) == address:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((address, length))
    return merged


def _store(file: IO[bytes], address: int, data: bytes) -> Extent:
    file.write(data)
    return address, len(data)


def _load(memory: GuestMemory, file: IO[bytes], address: int, length: int) -> None:
    while length > 0:
        data = file.read(min(length, PIECE))
        if not data:
            raise EOFError("less memory than it says")
        memory.write(address, data)
        address, length = address + len(data), length - len(data)
