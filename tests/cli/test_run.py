"""`pyvirtio run` as far as it goes without a guest: what it refuses, and what it says it would build."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bzimage import write_bzimage

from pyvirtio.cli.main import main
from pyvirtio.testing.plugin import nothing_left_behind
from pyvirtio.testing.queue import HANG

DISK_SIZE = 1 << 20


@pytest.fixture(autouse=True)
def _baseline() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a kernel and a disk, which is the current one."""
    write_bzimage(tmp_path / "kernel")
    (tmp_path / "disk.img").write_bytes(bytes(DISK_SIZE))
    (tmp_path / "tiny.img").write_bytes(bytes(100))
    (tmp_path / "odd.img").write_bytes(bytes(1000))
    (tmp_path / "text").write_text("no kernel")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dry_run(line: str) -> int:
    return main(["run", "--kernel", "kernel", "--dry-run", *line.split()])


REFUSED = {
    "--device virtio-gpu-pci": "unknown device 'virtio-gpu-pci'",
    "--device virtio-rng-pci,colour=red": "rng0: unknown property 'colour'",
    "--device virtio-rng-pci,ioeventfd=maybe": "rng0: ioeventfd=maybe is not allowed: on or off",
    "--device virtio-rng-pci,vectors=9999": "rng0: vectors=9999 is not allowed: an integer, 0 to 2048",
    "--device virtio-rng-pci,slot=32": "rng0: slot=32 is not allowed: an integer, 1 to 31",
    "--device virtio-rng-pci,slot=3 --device virtio-rng-pci,slot=3": "slot 3 is taken",
    "--device virtio-rng-pci,id=a --device virtio-rng-pci,id=a": "id=a is already in use",
    "--device virtio-rng-pci,iothread=io9": "iothread=io9 is not the id of",
    "--object iothread,id=a --device virtio-rng-pci,iothread=a,iothread-vq-mapping=a":
        "rng0: give either iothread= or iothread-vq-mapping=",
    "--device virtio-blk-pci": "blk0: drive is required",
    "--device virtio-blk-pci,drive=d0": "drive=d0 is not the id of",
    "--device virtio-rng-pci " * 32: "pci: no free slot for rng31: a bus has 31",
    "--drive file=disk.img,id=d --drive file=disk.img,id=d": "id=d is already in use",
    "--drive file=disk.img --drive file=disk.img": "disk.img: in use by another machine or drive",
    "--drive file=disk.img,id=d --device virtio-blk-pci,drive=d --device virtio-blk-pci,drive=d":
        "blk1: drive=d is in use by blk0",
    "--drive id=d": "d: file= is required",
    "--drive file=nowhere.img": "nowhere.img: No such file or directory",
    "--drive file=.": ".: a directory, not a disk image",
    "--drive file=tiny.img": "tiny.img: 100 bytes; an image is at least one sector",
    "--drive file=odd.img": "odd.img: 1000 bytes; an image is at least one sector and whole sectors",
    "--drive file=disk.img,format=qcow2": "drive0: format=qcow2 is not supported: raw",
    "--drive file=disk.img,if=scsi": "drive0: if=scsi is not allowed: virtio or none",
    "--drive file=disk.img,cache=unsafe": "disk.img: cache=unsafe is not allowed: writeback, writethrough, none",
    "--drive file=disk.img,aio=native": "disk.img: aio=native is not allowed: auto, threads, io_uring",
    "--drive file=disk.img,locking=auto": "drive0: locking=auto is not allowed: on or off",
    "--drive file=disk.img,readonly=perhaps": "drive0: readonly=perhaps is not allowed: on or off",
    "--drive file=disk.img,id=d --device virtio-blk-pci,drive=d,queue-size=100": "blk0: queue-size=100: allowed are",
    "--object memory-backend-file,id=m": "unknown type 'memory-backend-file' (known: iothread)",
    "--object iothread": "--object iothread: id= is required",
    "--object iothread,id=io0,poll-max-ns=never": "io0: poll-max-ns=never is not allowed: an integer",
    "--device virtio-rng-pci --fault rng0": "fault rng0: write DEVICE:FAULT[=VALUE][@CHANCE],...",
    "--device virtio-rng-pci --fault rng1:lost": "fault rng1:lost: unknown device 'rng1', did you mean rng0?",
    "--device virtio-rng-pci --fault rng0:lost=3": "lost=3: lost takes no value",
    "--device virtio-rng-pci --fault rng0:torn": "rng0: Rng has no disk that could go wrong",
    "--device virtio-console-pci": "console0: a console needs a chardev=, or ports=",
    "--device virtio-console-pci,chardev=c0": "chardev=c0 is not the id of a --chardev",
    "--chardev null,id=c0 --device virtio-console-pci,ports=c0:c9": "ports=c9 is not the id of a --chardev",
    "--chardev null,id=c0 --device virtio-console-pci,chardev=c0,ports=c0": "chardev c0 is in use by another port",
    "--chardev null,id=c0 --device virtio-console-pci,chardev=c0 --device virtio-console-pci,chardev=c0":
        "console1: chardev c0 is in use by another port",
    "--chardev null": "--chardev: id= is required",
    "--chardev id=c0": "--chardev: backend= is required",
    "--chardev null,id=c0 --chardev null,id=c0": "id=c0 is already in use",
    "--chardev ringbuf,id=c0": "--chardev: unknown backend 'ringbuf' (known: file, null, pty, socket, stdio)",
    "--chardev file,id=c0": "c0: path is required",
    "--chardev file,id=c0,path=nowhere/log": "c0: nowhere/log: No such file or directory",
    "--chardev file,id=c0,path=log,input-path=nothing": "c0: nothing: No such file or directory",
    "--chardev socket,id=c0": "c0: give where it is, either path=PATH or port=NUMBER",
    "--chardev socket,id=c0,path=s": "c0: s: No such file or directory",
    "--chardev socket,id=c0,path=text,server=on": "c0: text: Address already in use",
    f"--chardev socket,id=c0,path={'x' * 200},server=on": "xxx: AF_UNIX path too long",
    "--chardev socket,id=c0,path=s,wait=on": "c0: wait=on is allowed with server=on only",
    "--chardev socket,id=c0,path=s,server=on,reconnect=3": "c0: reconnect=3 is allowed with server=off only",
    "--chardev socket,id=c0,port=99999": "c0: port=99999 is not allowed: an integer, 1 to 65535",
    "--chardev pty,id=c0,path=nowhere/tty": "c0: nowhere/tty: No such file or directory",
    "--chardev stdio,id=c0": "c0: standard input and output are the serial port's; give --serial null or file:PATH",
    "--serial null --chardev stdio,id=c0 --chardev stdio,id=c1": "c1: standard input and output are c0's",
    "-m lots": "argument -m/--memory: lots is not a size such as 512M or 2G",
    "-m 1M": "memory of 1 MiB: kernel kernel and its initrd (0 MiB) need at least 25 MiB",
    "-m 20M": "memory of 20 MiB: kernel kernel and its initrd (0 MiB) need at least 25 MiB",
    "--smp many": "argument --smp: many is not a number of CPUs",
    "--smp 0": "smp 0: allowed are 1 to 128",
    "--kernel nowhere": "kernel nowhere: No such file or directory",
    "--restore nowhere": "snapshot nowhere: No such file or directory",
    "--restore text": "snapshot text: truncated, damaged, or no snapshot (File is not a zip file)",
    "--kernel text": "kernel text: not a bzImage",
    "--kernel .": "kernel .: not a file",
    "--initrd nowhere": "initrd nowhere: No such file or directory",
    "--firmware disk.img": "give what to boot, either --kernel FILE or --firmware FILE",
    "--serial telnet": "argument --serial: telnet: allowed are stdio, null and file:PATH",
    "--no-such-option": "unrecognized arguments: --no-such-option",
}  # fmt: skip


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("line", REFUSED)
def test_mistakes_are_one_line_and_status_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(line) == 2
    captured = capsys.readouterr()
    assert REFUSED[line] in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


OUTPUTS = "--netdev pair,id=n0,pcap=frames --chardev file,id=c0,path=log --chardev pty,id=c1,path=tty"
"""Options that make files."""


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("mistake", "status"), [("", 0), ("--device virtio-gpu-pci", 2), ("--chardev file,id=c2,path=nowhere/log", 2)]
)
def test_a_rehearsal_leaves_files_as_they_were(existing: bool, mistake: str, status: int) -> None:
    if existing:
        for name in ("frames", "log"):
            Path(name).write_text("of an earlier run")
    before = contents()
    assert dry_run(f"{OUTPUTS} {mistake}") == status
    assert contents() == before


def contents() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path().iterdir()}


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "mistake",
    [
        "--device virtio-gpu-pci",
        "--drive file=nowhere.img",
        "--device virtio-net-pci,netdev=n0 --device virtio-net-pci,netdev=n0",
        "--restore text",
        "--debugcon nowhere/debug",
    ],
)
def test_a_machine_that_does_not_start_leaves_no_files(mistake: str) -> None:
    Path("image").write_bytes(bytes(65536))
    before = contents()
    outputs = f"--serial file:serial --debugcon debug {OUTPUTS}"
    assert main(["run", "--firmware", "image", *outputs.split(), *mistake.split()]) == 2
    assert contents() == before


def test_nothing_to_boot(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dry-run"]) == 2
    assert "give what to boot" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("size", [100, 65537, 9 << 20])
def test_a_file_that_is_no_firmware(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    Path("image").write_bytes(bytes(size))
    assert main(["run", "--firmware", "image"]) == 2
    assert f"firmware image: {size} bytes; an image is a multiple of 64 KiB up to 8 MiB" in capsys.readouterr().err


class NoKvm:
    """What opening a /dev/kvm gives that is not there."""

    def __init__(self, device: str) -> None:
        raise FileNotFoundError(2, "No such file or directory")


@pytest.mark.usefixtures("here")
def test_no_kvm_at_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvirtio.accel.kvm.Vm", NoKvm)
    Path("image").write_bytes(bytes(1 << 16))
    assert main(["run", "--firmware", "image"]) == 2
    assert capsys.readouterr().err == "pyvirtio: /dev/kvm: there is no KVM on this host (or not in this container)\n"


@pytest.mark.usefixtures("here")
def test_linux_on_a_software_kvm_names_the_lab(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvirtio.cli.run.linux_capable", lambda: "/dev/kvm is a software KVM")
    assert main(["run", "--kernel", "kernel"]) == 2
    error = capsys.readouterr().err
    assert "/dev/kvm is a software KVM" in error
    assert "pyvirtio lab -- " in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("here")
def test_a_mistake_in_the_options_comes_before_what_the_host_lacks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvirtio.cli.run.linux_capable", lambda: "/dev/kvm is a software KVM")
    assert main(["run", "--kernel", "kernel", "--drive", "file=/nowhere.img"]) == 2
    assert capsys.readouterr().err == "pyvirtio: /nowhere.img: No such file or directory\n"


@pytest.mark.usefixtures("here")
def test_dry_run_shows_what_would_be_built(capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "-m 1G --smp 2 --object iothread,id=io0 --drive file=disk.img,id=d0,readonly=on "
        "--device virtio-blk-pci,drive=d0,num-queues=2,iothread=io0 --device virtio-rng-pci,id=dice,ioeventfd=on"
    )
    assert dry_run(line + " --json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["memory"], shown["cpus"]) == (1 << 30, 2)
    blk, rng = shown["devices"]
    assert (blk["device"], blk["slot"], blk["type"]) == ("blk0", 1, "Blk")
    assert blk["queues"] == {"requestq0": 256, "requestq1": 256}
    assert (blk["vectors"], blk["ioeventfd"], blk["iothread"]) == (3, True, "io0")
    assert blk["backend"] == "disk.img (1M, read-only)"
    assert {bar["space"] for bar in blk["bars"]} == {"I/O", "memory"}
    assert (rng["device"], rng["ioeventfd"], rng["backend"]) == ("dice", True, None)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_it_waits_for_a_peer_leaves_nothing_behind(number: signal.Signals) -> None:
    before = sorted(Path().iterdir())
    command = "run --kernel kernel --dry-run --chardev socket,id=c0,path=s,server=on,wait=on"
    with subprocess.Popen([sys.executable, "-m", "pyvirtio", *command.split()], stderr=subprocess.PIPE) as program:
        assert program.stderr
        assert program.stderr.readline() == b"waiting for connection on s (c0)\n"
        program.send_signal(number)
        assert program.wait(HANG) == 128 + number
    assert sorted(Path().iterdir()) == before


@pytest.mark.usefixtures("here")
def test_what_is_for_programs_is_not_mixed_with_messages(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("--chardev pty,id=c0 --json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["devices"] == []
    assert "(label c0)" in captured.err


@pytest.mark.usefixtures("here")
def test_dry_run_shows_networks(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    networks = "--netdev pair,id=left --netdev pair,id=right,peer=left,pcap=frames --netdev pair,id=spare"
    line = f"{networks} --device virtio-net-pci,netdev=left --device virtio-net-pci,netdev=right,id=other"
    assert dry_run(line + " --json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(net["device"], net["type"], net["backend"]) for net in shown["devices"]] == [
        ("net0", "Net", "pair"),
        ("other", "Net", "pair"),
    ]
    assert not Path("frames").exists()
    assert caplog.messages == ["spare: no device is on this network; give one netdev=spare"]
    for netdev, message in (
        ("left", "net1: netdev=left is in use by net0"),
        ("right", "net1: netdev=right is not the id of a --netdev (there are: left)"),
        ("left,host-mtu=67", "net1: host-mtu=67 is not allowed: an integer, 68 to 65535"),
    ):
        line = f"--netdev pair,id=left --device virtio-net-pci,netdev=left --device virtio-net-pci,netdev={netdev}"
        assert dry_run(line) == 2
        assert capsys.readouterr().err == f"pyvirtio: {message}\n"


@pytest.mark.usefixtures("here")
def test_dry_run_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("--device virtio-rng-pci") == 0
    shown = capsys.readouterr().out
    assert "kernel: 1 CPU, 512M of memory" in shown
    assert "rng0" in shown


def test_closed_standard_files_are_not_taken_by_a_disk() -> None:
    code = (
        "import os, sys; from pyvirtio.cli.run import _fill_standard_fds; _fill_standard_fds();"
        "print(*map(os.readlink, ('/proc/self/fd/0', '/proc/self/fd/1')), file=sys.stderr)"
    )
    closing = ["sh", "-c", 'exec "$@" <&- >&-', "sh"]
    done = subprocess.run([*closing, sys.executable, "-c", code], stderr=subprocess.PIPE, check=True, text=True)
    assert done.stderr == "/dev/null /dev/null\n"


def devices(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [device["device"] for device in json.loads(capsys.readouterr().out)["devices"]]


@pytest.mark.usefixtures("here")
def test_a_drive_that_no_device_names_is_a_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("--drive file=disk.img --json") == 0
    assert devices(capsys) == ["blk0"]
    assert dry_run("--drive file=disk.img,if=none --json") == 0
    assert devices(capsys) == []
    assert dry_run("--drive file=disk.img,id=d --device virtio-blk-pci,drive=d,id=mine --json") == 0
    assert devices(capsys) == ["mine"]


def test_device_help_lists_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--device", "help"]) == 0
    assert "virtio-blk-pci" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "text", "known"),
    [("--device", "virtio-blk-pci,help", "num-queues"), ("--object", "iothread,help", "poll-max-ns")],
)
def test_help_lists_the_properties(option: str, text: str, known: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", option, text]) == 0
    assert known in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_faults_are_switched_on_and_logged_with_their_seed(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert dry_run("--drive file=disk.img --fault blk0:late=5ms@1%,seed=3 --fault blk0:flip") == 0
    assert "blk0: faults: late=5ms@1%,flip,seed=3" in caplog.text


def test_faults_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--fault", "help"]) == 0
    shown = capsys.readouterr().out
    assert "lost-interrupt" in shown
    assert "A used entry never comes." in shown
