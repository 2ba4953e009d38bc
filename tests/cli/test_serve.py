"""`pyvirtio serve`: what it refuses, what it prints, and how its process begins and ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from serving import Start, programs

from pyvirtio.cli.front_ends import QEMU_NAMESPACE
from pyvirtio.cli.main import main
from pyvirtio.devices import DEVICES
from pyvirtio.devices.console import ConsoleFeature
from pyvirtio.serve.wire import Request
from pyvirtio.testing.blk import Disk
from pyvirtio.testing.plugin import nothing_left_behind
from pyvirtio.testing.vhost_user import MIB, Connection, FrontEnd

DICE = """
from pyvirtio import Device, queue
class Dice(Device, id=4):
    def __init__(self, sides: int = 6) -> None:
        self.sides = sides
    @queue(size=8)
    def requestq(self, vq) -> None:
        for chain in vq:
            chain.write(bytes([self.sides]))
            chain.complete()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "disk.img").write_bytes(bytes(range(256)) * 4 * 1024)
    (tmp_path / "dice.py").write_text(DICE)
    (tmp_path / "a-file").write_text("")
    (tmp_path / "other.qcow2").write_bytes(b"QFI\xfb".ljust(512, b"\0"))
    (tmp_path / "odd.qcow2").write_bytes(b"QFI\xfb".ljust(600, b"\0"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


REFUSED = {
    "": "serve: name a device, such as `blk` or `rng`",
    "gpu --socket-path s": f"unknown device 'gpu' (known: {', '.join(DEVICES)}, FILE.py:CLASS)",
    "rng": "rng0: give its socket, either --socket-path PATH or --fd N",
    "rng --socket-path s --fd 3": "rng0: give its socket, either",
    "rng --socket-path a-file": "a-file: there is a file that is no socket",
    "rng --socket-path nowhere/s": "nowhere/s: No such file or directory",
    f"rng --socket-path {'x' * 200}": "AF_UNIX path too long",
    "rng --fd 0": "fd=0: ",
    "rng,colour=red --socket-path s": "rng0: unknown property 'colour'",
    "blk --socket-path s": "blk0: drive is required",
    "blk --blk-file nowhere.img --socket-path s": "nowhere.img: No such file or directory",
    "blk --blk-file other.qcow2 --socket-path s": "other.qcow2: a qcow2 image, and only raw ones are served",
    "blk --blk-file odd.qcow2 --socket-path s": "odd.qcow2: a qcow2 image, and only raw ones are served",
    "blk --blk-file . --socket-path s": ".: a directory, not a disk image",
    "blk --blk-file /proc/sys/kernel/ostype --socket-path s": "may do, or --read-only with --blk-file)",
    "rng --blk-file disk.img --socket-path s": "for a device with the property 'drive', which rng has not",
    "rng --num-queues 2 --socket-path s": "for a device with the property 'num-queues', which rng has not",
    "rng --socket-path s --print-qemu-args --print-libvirt-xml": "not allowed with argument --print-qemu-args",
    "console --socket-path s": "console0: a console needs a chardev=, or ports=",
    "console,chardev=c0 --socket-path s": "chardev=c0 is not the id of a --chardev",
    "console,chardev=c0 --chardev socket,id=c0,path=nowhere --socket-path s": "c0: nowhere: No such file or directory",
    "rng --socket-path s --iothreads 0": "argument --iothreads: '0' is not allowed: 1 to 256",
    "rng --socket-path s --poll-max-ns often": "poll-max-ns=often is not allowed",
    "rng --socket-path s --sandbox maybe": "argument --sandbox: invalid choice: 'maybe'",
    "blk --blk-file a-file --socket-path s": "a-file: 0 bytes; an image is at least one sector",
    "blk --blk-file disk.img --num-queues 9999 --socket-path s": "num-queues=9999 is not allowed",
    "blk --blk-file disk.img --num-queues 257 --socket-path s": "Blk has 257 queues, at most 256 are allowed",
    "--device rng,id=a,socket-path=s --device rng,id=a,socket-path=t": "id=a is already in use",
    "--device rng,socket-path=s --device rng,socket-path=s": "s: in use: somebody listens there",
    "rng --fd 3 --print-qemu-args": "rng0: what a front-end needs can be printed with --socket-path only",
    "--device rng,socket-path=s --socket-path t": "serve: --socket-path is for a DEVICE that is named without --device",
    "--device rng,socket-path=s --fd 3": "serve: --fd is for a DEVICE",
    "--device rng,socket-path=s --num-queues 2": "serve: --num-queues is for a DEVICE",
    "--device rng,socket-path=s --blk-file disk.img": "serve: --blk-file is for a DEVICE",
    "blk,drive=d --drive file=disk.img,id=d --read-only --socket-path s": "serve: --read-only is for --blk-file",
}


@pytest.mark.parametrize(("line", "message"), REFUSED.items())
def test_a_mistake_is_one_line_and_status_2(
    here: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with nothing_left_behind():
        assert main(["serve", *line.split()]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert not (here / "s").exists()


def test_what_is_served_is_not_lent_to_the_kernel(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = "from pyvirtio.backends.net import NetBackend\nclass Lent(NetBackend):\n    vhost_fds = (0,)\n"
    (here / "lent.py").write_text(network)
    assert main(["serve", "net,netdev=n0", "--socket-path", "s", "--netdev", "lent.py:Lent,id=n0"]) == 2
    told = "n0: vhost=on: the queues of a served device are its front-end's to lend"
    assert capsys.readouterr().err == f"pyvirtio: {told}\n"


@pytest.mark.parametrize(("option", "status"), [("--print-qemu-args", 0), ("--device rng,socket-path=nowhere/s", 2)])
def test_without_serving_no_file_is_made(here: Path, option: str, status: int) -> None:
    before = sorted(here.iterdir())
    networks = f"--netdev pair,id=n0,pcap={here / 'frames'} --chardev file,id=c0,path={here / 'log'}"
    assert main(["serve", *f"net,netdev=n0 --socket-path s {networks} {option}".split()]) == status
    assert sorted(here.iterdir()) == before


def test_capabilities_are_what_qemu_expects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "blk", "--print-capabilities"]) == 0
    assert json.loads(capsys.readouterr().out) == {"type": "block", "features": ["read-only", "blk-file"]}


@pytest.mark.parametrize("line", ["help", "--device help", "rng --device ?"])
def test_the_devices_are_listed(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *line.split()]) == 0
    shown = capsys.readouterr().out.split()
    assert set(DEVICES) <= set(shown)


def test_the_front_ends_side_is_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "blk --blk-file disk.img --num-queues 2 --socket-path s --print-qemu-args"
    assert main(["serve", *line.split()]) == 0
    shown = capsys.readouterr().out
    assert "memory-backend-memfd" in shown
    assert "share=on" in shown
    assert f"-chardev socket,id=blk0,path={here}/s," in shown
    assert "-device vhost-user-blk-pci,num-queues=2,chardev=blk0" in shown


def test_the_domain_of_libvirt_is_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = "blk,drive=d,num-queues=2,socket-path=a&b"
    line = f"--drive file=disk.img,id=d --device {disk} --device rng,socket-path=r --print-libvirt-xml"
    assert main(["serve", *line.split()]) == 0
    domain = ElementTree.fromstring(f"<domain>{capsys.readouterr().out}</domain>")
    assert domain.find("memoryBacking/access[@mode='shared']") is not None
    (source,) = domain.findall("devices/disk[@type='vhostuser']/source")
    assert source.get("path") == f"{here}/a&b"
    arguments = [str(argument.get("value")) for argument in domain.iter(f"{{{QEMU_NAMESPACE}}}arg")]
    chardev = f"socket,id=rng0,path={here}/r,reconnect=1"
    assert arguments == ["-chardev", chardev, "-device", "vhost-user-rng-pci,chardev=rng0"]


@pytest.mark.parametrize("option", ["--print-qemu-args", "--print-libvirt-xml"])
def test_the_front_end_is_to_ask_for_packed_rings_where_they_are_offered(
    here: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    asked = {"--print-qemu-args": "packed=on", "--print-libvirt-xml": "packed='on'"}[option]
    for packed in (False, True):
        what = "blk,packed=on" if packed else "blk"
        assert main(["serve", what, "--blk-file", "disk.img", "--socket-path", "s", option]) == 0
        assert (asked in capsys.readouterr().out) is packed


def test_the_front_ends_side_of_a_network_is_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "serve net,netdev=n --netdev pair,id=n --socket-path s"
    assert main([*line.split(), "--print-qemu-args"]) == 0
    shown = capsys.readouterr().out
    assert "-netdev vhost-user,id=net0-net,chardev=net0,queues=1" in shown
    assert "-device virtio-net-pci,netdev=net0-net" in shown
    assert main([*line.split(), "--print-libvirt-xml"]) == 0
    domain = ElementTree.fromstring(f"<domain>{capsys.readouterr().out}</domain>")
    (source,) = domain.findall("devices/interface[@type='vhostuser']/source")
    assert (source.get("path"), source.get("mode")) == (f"{here}/s", "client")


def test_an_image_that_only_looks_like_another_format_is_served_if_told(start: Start, here: Path) -> None:
    start("--drive", "file=other.qcow2,id=d,format=raw", "--device", "blk,drive=d,socket-path=s")
    with FrontEnd(here / "s") as vm:
        assert Disk(vm.start()).read(0, 512).startswith(b"QFI\xfb")


def test_an_idle_server_is_small(start: Start, here: Path) -> None:
    process = start("blk", "--blk-file", "disk.img", "--num-queues", "4", "--socket-path", "s")
    with FrontEnd(here / "s", memory=MIB) as vm:
        vm.start(["requestq0", "requestq1"])
        status = Path(f"/proc/{process.pid}/status").read_text()
    assert int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) <= 35 * 1024


def test_shared_io_threads(start: Start, here: Path) -> None:
    """Two more threads for each device: one that listens, and one for each front-end."""
    devices = [option for path in "abcd" for option in ("--device", f"rng,socket-path={path}")]
    alone, shared = (
        start(*devices),
        start(*(option.replace("path=", "path=x") for option in devices), "--iothreads", "2"),
    )
    threads = [len(os.listdir(f"/proc/{process.pid}/task")) for process in (alone, shared)]
    assert threads[0] - threads[1] == 2


PASS = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')"
PASS += "; os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"


def test_sockets_that_systemd_passes(here: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here / "s"))
        listener.listen()
        command = [sys.executable, "-c", PASS, str(listener.fileno()), "-m", "pyvirtio", "serve", "dice.py:Dice"]
        process = subprocess.Popen(command, pass_fds=[listener.fileno(), 3], cwd=here)
        assert throw(here / "s") == b"\6"
    process.terminate()
    assert process.wait(30) == 0


def test_more_sockets_than_devices(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "2")
    assert main(["serve", "rng"]) == 2
    assert "systemd passes 1 sockets more than there are devices without one" in capsys.readouterr().err


@pytest.fixture
def start(here: Path) -> Iterator[Start]:
    with programs(here) as start:
        yield start


def throw(path: Path) -> bytes:
    """What the device answers to one request."""
    with FrontEnd(path) as vm:
        vm.start(size=8)
        buffer = vm.requestq.add(writable=1)
        vm.requestq.kick()
        answer: bytes = buffer.wait()
        return answer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_removes_the_socket(start: Start, here: Path, number: signal.Signals) -> None:
    process = start("blk", "--blk-file", "disk.img", "--socket-path", "s")
    with FrontEnd(here / "s") as vm:
        assert Disk(vm.start()).read(0, 512) == bytes(range(256)) * 2
        process.send_signal(number)
        assert process.wait(30) == 0
        vm.wait_hangup()
    assert not (here / "s").exists()


@pytest.mark.parametrize("sandbox", ["on", "off"])
def test_a_console_that_others_connect_to(start: Start, here: Path, sandbox: str) -> None:
    """The sandbox lets a peer come, and go, and another one come."""
    chardev = ("--chardev", "socket,id=c0,path=console,server=on")
    start("console,chardev=c0", *chardev, "--socket-path", "s", "--sandbox", sandbox)
    with FrontEnd(here / "s") as vm:
        vm.start(["receiveq0", "transmitq0"], features=~ConsoleFeature.MULTIPORT, size=8)
        for text in (b"first", b"second"):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(30)
                peer.connect(str(here / "console"))
                peer.send(text)
                buffer = vm.receiveq0.add(writable=16)
                vm.receiveq0.kick()
                assert buffer.wait() == text
                sent = vm.transmitq0.add(text.upper())
                vm.transmitq0.kick()
                assert peer.recv(16) == text.upper()
                assert sent.wait() == b""


def test_a_read_only_image_is_not_written(start: Start, here: Path) -> None:
    start("blk", "--blk-file", "disk.img", "--read-only", "--socket-path", "s")
    with FrontEnd(here / "s") as vm:
        disk = Disk(vm.start())
        assert disk.read(1, 512) == bytes(range(256)) * 2
        with pytest.raises(OSError, match="IOERR"):
            disk.write(0, bytes(512))


def test_faults_of_a_served_disk_outlive_its_front_end(start: Start, here: Path) -> None:
    start("blk", "--blk-file", "disk.img", "--socket-path", "s", "--fault", "blk0:error=8-15,late=1ms")
    for _ in range(2):
        with FrontEnd(here / "s") as vm:
            disk = Disk(vm.start())
            assert disk.read(7, 512) == bytes(range(256)) * 2
            with pytest.raises(OSError, match="IOERR"):
                disk.read(8, 512)


def test_a_stale_socket_is_replaced_and_one_in_use_is_not(
    start: Start, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start("rng", "--socket-path", "s")
    process.kill()
    process.wait()
    assert (here / "s").exists()
    start("rng", "--socket-path", "s")
    assert main(["serve", "rng", "--socket-path", "s"]) == 2
    assert capsys.readouterr().err == "pyvirtio: s: in use: somebody listens there\n"
    connection = Connection(here / "s")
    assert connection.get(Request.GET_QUEUE_NUM) == 1
    connection.close()


def test_several_devices_in_one_process(start: Start, here: Path) -> None:
    start("--device", "dice.py:Dice,sides=7,socket-path=a", "--device", "dice.py:Dice,sides=8,socket-path=b")
    assert (throw(here / "a"), throw(here / "b")) == (b"\7", b"\10")


def test_an_inherited_socket_that_listens(start: Start, here: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here / "s"))
        listener.listen()
        process = start("dice.py:Dice", "--fd", str(listener.fileno()), pass_fds=[listener.fileno()])
    assert [throw(here / "s") for _ in range(2)] == [b"\6", b"\6"]
    process.terminate()
    assert process.wait(30) == 0


def test_with_an_inherited_connection_it_ends_when_the_front_end_goes(start: Start, here: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here / "s"))
        listener.listen()
        connection = Connection(here / "s")
        accepted, _ = listener.accept()
    with accepted:
        process = start("rng", "--fd", str(accepted.fileno()), pass_fds=[accepted.fileno()])
    assert connection.get(Request.GET_QUEUE_NUM) == 1
    connection.close()
    assert process.wait(30) == 0


def test_a_front_end_may_come_back_after_the_server_was_killed(start: Start, here: Path) -> None:
    process = start("blk", "--blk-file", "disk.img", "--socket-path", "s")
    with FrontEnd(here / "s", memory=MIB) as vm:
        disk = Disk(vm.start())
        disk.write(3, b"k" * 512)
        process.kill()
        vm.wait_hangup()
    process.wait()
    start("blk", "--blk-file", "disk.img", "--socket-path", "s")
    with FrontEnd(here / "s") as vm:
        assert Disk(vm.start()).read(3, 512) == b"k" * 512
