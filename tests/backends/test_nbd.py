"""The NBD client: against qemu-nbd and nbdkit, and against servers that do not behave."""

import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyvirtio.backends.nbd import ACK, GO, INFO, SEND_FLUSH, UNSUPPORTED, Address, Nbd
from pyvirtio.bench.servers import is_listened_at
from pyvirtio.devices.blk import Blk
from pyvirtio.errors import ConfigError
from pyvirtio.testing import Guest
from pyvirtio.testing.blk import Disk

SIZE = 4 << 20
GUARD = 30.0


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


class Servers:
    """NBD servers as processes, ended with the test."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory, self.stack = directory, stack
        self.image = directory / "disk.img"
        self.image.write_bytes(bytes(SIZE))
        self.path = directory / "nbd.sock"

    def start(self, *command: str) -> "subprocess.Popen[bytes]":
        """Run a server, and return when it listens."""
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        deadline = time.monotonic() + GUARD
        while not is_listened_at(self.path):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        return process

    def qemu(self, *options: str) -> "subprocess.Popen[bytes]":
        command = [program("qemu-nbd"), "-k", str(self.path), "-f", "raw", "-t", "--discard=unmap", *options]
        return self.start(*command, str(self.image))

    def nbdkit(self, *plugin: str) -> "subprocess.Popen[bytes]":
        return self.start(program("nbdkit"), "-f", "-U", str(self.path), *plugin)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(tmp_path, stack)


@pytest.mark.parametrize("server", ["qemu-nbd", "nbdkit"])
def test_a_disk_on_a_server_is_read_and_written(guest: Guest, servers: Servers, server: str) -> None:
    if server == "qemu-nbd":
        servers.qemu("-x", "disk one")
        uri = f"nbd:unix:{servers.path}:exportname=disk one"
    else:
        servers.nbdkit("memory", str(SIZE))
        uri = f"nbd+unix:///?socket={servers.path}"
    device = Blk(Nbd(uri))
    disk = Disk(guest.plug(device))
    assert device.config.capacity == SIZE // 512
    data = os.urandom(128 << 10)
    disk.write(8, data)
    disk.flush()
    assert disk.read(8, len(data)) == data
    disk.write_zeroes(8, 2)
    disk.discard(16, 8)
    assert disk.read(8, 2048) == bytes(1024) + data[1024:2048]
    if server == "qemu-nbd":
        assert servers.image.read_bytes()[10 * 512 : 12 * 512] == data[1024:2048]


def test_requests_larger_than_the_server_takes_are_split(servers: Servers) -> None:
    servers.nbdkit(
        "--filter=blocksize-policy", "memory", str(SIZE), "blocksize-maximum=64k", "blocksize-error-policy=error"
    )
    disk = Nbd(f"nbd:unix:{servers.path}")
    data = os.urandom(1 << 20)
    disk.pwrite(data, 512)
    assert disk.pread(len(data), 512) == data
    disk.close()


def test_a_read_only_export_is_a_read_only_disk(servers: Servers) -> None:
    servers.qemu("-r")
    disk = Nbd(f"nbd:unix:{servers.path}")
    assert disk.readonly
    disk.close()


def test_an_error_of_the_server_fails_that_request_only(servers: Servers) -> None:
    servers.nbdkit("--filter=error", "memory", str(SIZE), "error-pwrite=ENOSPC", "error-pwrite-rate=100%")
    disk = Nbd(f"nbd:unix:{servers.path}")
    with pytest.raises(OSError, match="No space left"):
        disk.pwrite(bytes(512), 0)
    assert disk.pread(512, 0) == bytes(512)
    disk.close()


def test_a_server_that_comes_back_is_connected_to_again(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvirtio.backends.nbd.PATIENCE", 0)
    process = servers.qemu()
    disk = Nbd(f"nbd:unix:{servers.path}")
    disk.pwrite(b"a" * 512, 0)
    process.kill()
    process.wait()
    servers.path.unlink()
    with pytest.raises(OSError):  # noqa: PT011
        disk.pread(512, 0)
    with pytest.raises(OSError):  # noqa: PT011
        disk.pread(512, 0)
    servers.qemu()
    assert disk.pread(512, 0) == b"a" * 512
    with pytest.raises(OSError, match="writes that were not flushed"):
        disk.flush()  # type: ignore[attr-defined]
    disk.flush()  # type: ignore[attr-defined]
    disk.close()


def test_an_export_that_is_not_there(servers: Servers) -> None:
    servers.qemu("-x", "this")
    with pytest.raises(ConfigError, match="refuses export 'that'"):
        Nbd(f"nbd:unix:{servers.path}:exportname=that")


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        Nbd(f"nbd:unix:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    ("text", "where", "export"),
    [
        ("nbd://host", ("host", 10809), ""),
        ("nbd://host:1234/a%20disk", ("host", 1234), "a disk"),
        ("nbd://[::1]:9/x", ("::1", 9), "x"),
        ("nbd+unix:///x?socket=/tmp/s", "/tmp/s", "x"),
        ("nbd:unix:/tmp/s", "/tmp/s", ""),
        ("nbd:host:10:exportname=x:y", ("host", 10), "x:y"),
    ],
)
def test_addresses(text: str, where: object, export: str) -> None:
    assert Address.parse(text) == Address(where, export)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["nbd:", "nbd://", "nbd+unix:///x", "http://host", "nbd://host:port", "nbd:unix:"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="an NBD server is"):
        Address.parse(text)


Script = Callable[[socket.socket], object]


class Liar:
    """A server that says what a test wants."""

    def __init__(self, directory: Path, script: Script) -> None:
        self.path = directory / "liar"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._script = script
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(GUARD)
            self._script(connection)

    def __enter__(self) -> str:
        return f"nbd:unix:{self.path}"

    def __exit__(self, *_: object) -> None:
        self._thread.join(GUARD)
        self._listener.close()


HELLO = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)


def reply(kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, GO, kind, len(data)) + data


def export(size: int, flags: int = 1 | SEND_FLUSH) -> bytes:
    return reply(INFO, struct.pack(">HQH", 0, size, flags)) + reply(ACK)


def greet(connection: socket.socket, answer: bytes) -> None:
    """The handshake, up to the answer to the first option."""
    connection.sendall(HELLO)
    read(connection, 4)
    read_option(connection)
    connection.sendall(answer)


def read(connection: socket.socket, length: int) -> bytes:
    data = connection.recv(length, socket.MSG_WAITALL)
    assert len(data) == length
    return data


def read_option(connection: socket.socket) -> None:
    _, _, length = struct.unpack(">8sII", read(connection, 16))
    if length:
        read(connection, length)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (lambda c: c.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "does not speak the fixed newstyle"),
        (lambda c: c.sendall(HELLO[:10]), "closed the connection"),
        (lambda c: greet(c, reply(ACK, bytes(1)) [:-1] + bytes(1)), "0 bytes; a disk is whole sectors"),
        (lambda c: greet(c, struct.pack(">QIII", 1, GO, ACK, 0)), "a reply of 0 bytes to an option"),
        (lambda c: greet(c, struct.pack(">QIII", 0x3E889045565A9, GO, INFO, 1 << 31)), "a reply of 2147483648 bytes"),
        (lambda c: greet(c, reply(1 << 31 | 6, b"go away")), "refuses export '': go away"),
        (lambda c: greet(c, export(1000)), "1000 bytes; a disk is whole sectors of 512 bytes"),
    ],
)  # fmt: skip
def test_a_server_that_makes_no_sense_is_one_line(tmp_path: Path, script: Script, message: str) -> None:
    with Liar(tmp_path, script) as uri, pytest.raises(ConfigError, match=message):
        Nbd(uri)


def test_an_old_server_is_asked_by_export_name(tmp_path: Path) -> None:
    def script(connection: socket.socket) -> None:
        greet(connection, reply(UNSUPPORTED))
        read_option(connection)
        connection.sendall(struct.pack(">QH", SIZE, 1))

    with Liar(tmp_path, script) as uri:
        disk = Nbd(uri)
        assert disk.capacity == SIZE
        assert not disk.offers("flush")
        disk.close()


@pytest.mark.parametrize(
    "answer",
    [struct.pack(">IIQ", 0x12345678, 0, 1), struct.pack(">IIQ", 0x67446698, 0, 99), b"short"],
    ids=["magic", "cookie", "short"],
)
def test_an_answer_that_makes_no_sense_fails_the_request(tmp_path: Path, answer: bytes) -> None:
    def script(connection: socket.socket) -> None:
        greet(connection, export(SIZE))
        read(connection, 28)
        connection.sendall(answer)

    with Liar(tmp_path, script) as uri:
        disk = Nbd(uri)
        with pytest.raises(OSError, match=r"no question|closed the connection"):
            disk.pread(512, 0)
        disk.close()
