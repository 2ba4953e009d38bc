"""`--drive`: disks of every driver, and a user's own."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyvirtio.backends.block import File, Memory
from pyvirtio.cli.drives import BACKENDS, Drive, open_drives, show_help
from pyvirtio.cli.main import main
from pyvirtio.errors import ConfigError

TAPE = '''
from typing import Annotated
from pyvirtio import BlockBackend
from pyvirtio.properties import Size

class Tape(BlockBackend):
    """A disk that counts."""

    def __init__(self, capacity: Annotated[Size, "bytes"], fill: Annotated[int, "byte"] = 0) -> None:
        self.capacity = capacity
        self.fill = fill

    def pread(self, length: int, offset: int) -> bytes:
        return bytes([self.fill]) * length

class Broken(BlockBackend):
    def __init__(self) -> None:
        raise RuntimeError("no tape")

class Sizeless(BlockBackend):
    def pread(self, length: int, offset: int) -> bytes: ...

class Deaf(BlockBackend):
    capacity = 512
'''
PLUGIN = """
API_VERSION = 2
options = {}
def config(key, value): options[key] = value
def open(readonly): return 1
def get_size(h): return int(options["disk_size"])
def pread(h, buf, offset, flags): buf[:] = bytes(len(buf))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    (tmp_path / "tape.py").write_text(TAPE)
    (tmp_path / "plugin.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def drive(text: str, stack: ExitStack) -> Drive:
    (found,) = open_drives([text], stack.callback).values()
    return found


@pytest.mark.usefixtures("here")
def test_a_drive_is_a_file_unless_it_names_a_driver(stack: ExitStack) -> None:
    assert isinstance(drive("file=disk.img,id=d0", stack).backend, File)
    memory = drive("driver=memory,capacity=1M,id=d1", stack)
    assert (memory.id, memory.backend.capacity) == ("d1", 1 << 20)
    assert isinstance(memory.backend, Memory)


@pytest.mark.usefixtures("here")
def test_drives_share_an_image_if_none_of_them_takes_the_lock(stack: ExitStack) -> None:
    for name in ("d0", "d1"):
        drive(f"file=disk.img,locking=off,id={name}", stack)
    drive("file=disk.img,locking=on,id=d2", stack)
    with pytest.raises(ConfigError, match="in use by another machine"):
        drive("file=disk.img,id=d3", stack)


@pytest.mark.usefixtures("here")
def test_a_drive_of_a_users_class(stack: ExitStack) -> None:
    backend = drive("driver=tape.py:Tape,capacity=64k,fill=7,id=d0", stack).backend
    assert backend.pread(2, 0) == b"\7\7"  # type: ignore[attr-defined]
    assert backend.readonly


@pytest.mark.usefixtures("here")
def test_a_plugin_of_nbdkit_gets_the_options_that_are_not_ours(stack: ExitStack) -> None:
    backend = drive("driver=nbdkit,plugin=plugin.py,disk_size=1024", stack).backend
    assert backend.capacity == 1024


REFUSED = {
    "driver=tape": "--drive: unknown driver 'tape' (known: memory, null, nbd, nbdkit, fsspec, FILE.py:CLASS)",
    "driver=tape.py:Tope": "tape.py: unknown driver class 'Tope', did you mean Tape?",
    "driver=tape.py:Tape": "drive0: capacity is required: a size such as 512 or 64k",
    "driver=tape.py:Tape,capacity=much": "drive0: capacity=much is not allowed",
    "driver=tape.py:Tape,capacity=100": "drive0: Tape.capacity is 100; it has to be a multiple of 512 bytes",
    "driver=tape.py:Broken": "drive0: Broken.__init__ raised RuntimeError: no tape (tape.py:",
    "driver=tape.py:Sizeless": "drive0: Sizeless.capacity is None; it has to be a multiple of 512 bytes, at least one",
    "driver=tape.py:Deaf": "drive0: Deaf defines neither pread(length, offset) nor preadv(buffers, offset)",
    "driver=memory,capacity=1M,colour=red": "drive0: unknown property 'colour'",
    "driver=memory,capacity=100": "drive0: Memory: 100 bytes; a disk is whole sectors of 512 bytes",
    "file=nbd:unix:nowhere": "drive0: nbd:unix:nowhere: No such file or directory",
    "file=nbd://": "drive0: nbd://: an NBD server is",
    "driver=nbdkit,plugin=nowhere.py": "drive0: nowhere.py: No such file or directory",
    "driver=fsspec,url=gopher://x": "drive0: gopher://x: Protocol not known: gopher",
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("text", "message"), REFUSED.items())
def test_a_mistake_is_one_line(text: str, message: str, stack: ExitStack) -> None:
    with pytest.raises(ConfigError) as caught:
        drive(text, stack)
    assert str(caught.value).startswith(message)


def test_help_lists_drivers_and_properties(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_help(["help", "driver=nbd,help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in BACKENDS)
    assert "nbd+unix" in shown
    assert main(["run", "--drive", "help"]) == 0
    assert main(["serve", "blk", "--drive", "driver=memory,help"]) == 0
    assert "bytes of the disk" in capsys.readouterr().out
