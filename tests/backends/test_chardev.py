"""Character devices by themselves: nothing blocks, nothing is left behind, and what cannot be opened is one line."""

import os
import pty
import select
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyvirtio.backends.chardev import Chardev, File, Null, Pty, Socket
from pyvirtio.bench.servers import is_listened_at
from pyvirtio.errors import ConfigError
from pyvirtio.testing.plugin import nothing_left_behind
from pyvirtio.testing.queue import HANG


@pytest.fixture(autouse=True)
def _baseline() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def opened() -> Iterator[list[Chardev]]:
    """What is put here is closed after the test."""
    chardevs: list[Chardev] = []
    yield chardevs
    for chardev in chardevs:
        chardev.close()
        chardev.close()
    chardevs.clear()


def until(chardev: Chardev, condition: Callable[[], bool]) -> None:
    """Sleep on the chardev as an I/O thread does."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        if select.select([chardev.fileno()], [], [], 0.1)[0]:
            chardev.handle()


def read(chardev: Chardev, count: int) -> bytes:
    data = b""

    def more() -> bool:
        nonlocal data
        data += chardev.read(count - len(data))
        return len(data) == count

    until(chardev, more)
    return data


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


def connect(path: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(HANG)
    peer.connect(str(path))
    return peer


def test_a_server_talks_to_one_peer_after_the_other(tmp_path: Path, opened: list[Chardev]) -> None:
    server = Socket(path=tmp_path / "s", server=True)
    opened.append(server)
    assert not server.connected
    with connect(tmp_path / "s") as first, connect(tmp_path / "s") as second:
        second.send(b"second")
        first.send(b"first")
        until(server, lambda: server.connected)
        assert read(server, 5) == b"first"
        assert server.write(b"hello") == 5
        assert first.recv(5) == b"hello"
        first.close()
        assert read(server, 6) == b"second"
    until(server, lambda: server.read(1) == b"" and not server.connected)
    server.close()
    assert not (tmp_path / "s").exists()


def test_a_peer_that_takes_nothing_does_not_block(tmp_path: Path, opened: list[Chardev]) -> None:
    server = Socket(path=tmp_path / "s", server=True)
    opened.append(server)
    with connect(tmp_path / "s") as peer:
        until(server, lambda: server.connected)
        sent = 0
        while written := server.write(bytes(4096)):
            sent += written
        received = 0
        while received < sent:
            received += len(peer.recv(1 << 20))
        until(server, lambda: server.write(b"more") == 4)


def test_over_tcp(opened: list[Chardev]) -> None:
    port = free_port()
    opened.append(server := Socket("s", port=port, server=True))
    opened.append(client := Socket("c", port=port))
    until(server, lambda: server.connected)
    client.write(b"over tcp")
    assert read(server, 8) == b"over tcp"


def test_a_client_comes_back(tmp_path: Path, opened: list[Chardev]) -> None:
    client = Socket(path=tmp_path / "s", reconnect=1)
    opened.append(client)
    assert not client.connected
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
            listener.listen()
            until(client, lambda: client.connected)
            listener.accept()[0].close()
        (tmp_path / "s").unlink()
        until(client, lambda: client.read(1) == b"" and not client.connected)


def test_a_host_that_does_not_answer_keeps_nobody_waiting(opened: list[Chardev]) -> None:
    """An I/O thread tries to reconnect, and has other devices too."""

    def make() -> None:
        opened.append(Socket(port=listener.getsockname()[1], reconnect=1))

    with socket.create_server(("localhost", 0), backlog=0) as listener, ExitStack() as others:
        for _ in range(4):  # from the second on they get no answer
            other = others.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(listener.getsockname())
        thread = threading.Thread(target=make, daemon=True)
        thread.start()
        thread.join(HANG / 2)
        assert opened
        (client,) = opened
        assert not client.connected
        others.close()
        listener.accept()[0].close()
        until(client, lambda: client.connected)


def test_a_server_may_wait_for_its_first_peer(
    tmp_path: Path, opened: list[Chardev], capsys: pytest.CaptureFixture[str]
) -> None:
    def come() -> None:
        while not is_listened_at(tmp_path / "s"):
            time.sleep(0.001)
        peers.append(connect(tmp_path / "s"))

    peers: list[socket.socket] = []
    thread = threading.Thread(target=come)
    thread.start()
    opened.append(server := Socket("c0", path=tmp_path / "s", server=True, wait=True))
    assert server.connected
    thread.join()
    peers.pop().close()
    assert capsys.readouterr().err == f"waiting for connection on {tmp_path}/s (c0)\n"


def test_a_file_is_replaced_or_continued(tmp_path: Path, opened: list[Chardev]) -> None:
    path = tmp_path / "log"
    for append, contents in ((False, b"one"), (True, b"oneone"), (False, b"one")):
        file = File(path, append=append)
        opened.append(file)
        assert file.write(b"one") == 3
        assert file.read(10) == b""
        assert path.read_bytes() == contents


def test_a_pipe_that_nobody_reads(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe: a pipe that nobody reads"):
        File(tmp_path / "pipe")


def test_a_full_disk_is_told_once_and_the_guest_goes_on(
    opened: list[Chardev], caplog: pytest.LogCaptureFixture
) -> None:
    full = File(Path("/dev/full"), "c0")
    opened.append(full)
    assert [full.write(b"lost"), full.write(b"lost")] == [4, 4]
    assert caplog.messages == ["c0: No space left on device"]


def test_null(opened: list[Chardev]) -> None:
    opened.append(null := Null())
    assert (null.read(10), null.write(b"gone")) == (b"", 4)


def test_a_pseudo_terminal_is_opened_and_left(tmp_path: Path, opened: list[Chardev]) -> None:
    opened.append(chardev := Pty("c0", path=tmp_path / "tty"))
    assert chardev.write(bytes(1 << 20)) == 1 << 20, "discarded: nobody has it open"
    for _ in range(2):
        with open(os.open(tmp_path / "tty", os.O_RDWR | os.O_NOCTTY), "r+b", buffering=0) as terminal:
            terminal.write(b"typed")
            assert read(chardev, 5) == b"typed"
            termios.tcsetwinsize(terminal.fileno(), (43, 132))
            assert chardev.size == (132, 43)
            assert chardev.write(b"printed") == 7
            assert os.read(terminal.fileno(), 7) == b"printed"
    chardev.close()
    assert not (tmp_path / "tty").is_symlink()


STDIO = """
import select
from pyvirtio.backends.chardev import Stdio
stdio = Stdio()
print(stdio.size, flush=True)
while True:
    data = stdio.read(100)
    if data == b"":
        if stdio.input is None:
            break
        select.select([stdio.fileno()], [], [])
        stdio.handle()
    elif stdio.write(data.upper()) and b"q" in data:
        break
stdio.close()
"""


def test_standard_input_and_output_stay_as_they_are() -> None:
    """Other programs share the pipes: they must not find them non-blocking."""
    with subprocess.Popen([sys.executable, "-c", STDIO], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin
        assert program.stdout
        assert program.stdout.readline() == b"None\n"
        program.stdin.write(b"typed")
        program.stdin.flush()
        assert program.stdout.read(5) == b"TYPED"
        assert os.get_blocking(program.stdin.fileno())
        assert os.get_blocking(program.stdout.fileno())
        program.stdin.close()
        assert program.wait(HANG) == 0


def test_a_terminal_is_raw_for_as_long_as_it_takes() -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    before = termios.tcgetattr(slave)
    with subprocess.Popen([sys.executable, "-c", STDIO], stdin=slave, stdout=slave) as program:
        said = b""
        while not said.endswith(b"\n"):
            said += os.read(master, 100)
        assert said == b"(80, 24)\r\n"
        assert not termios.tcgetattr(slave)[3] & (termios.ECHO | termios.ICANON)
        os.write(master, b"xq")
        assert os.read(master, 10) == b"XQ"
        assert program.wait(HANG) == 0
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)
