"""The lab's machine: QEMU (TCG) on the host's files, one start for each command."""

import os
import select
import shlex
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from pyvirtio import _core
from pyvirtio.errors import ConfigError
from pyvirtio.lab import initrd
from pyvirtio.lab.kernel import InstalledKernel, find_kernel, unpack

TIMED_OUT = 124
"""Exit status of a command that took too long, as timeout(1) has it."""
FAILED = 125
"""Exit status of a machine that ended without saying how the command did."""

MODULES = ("virtio_pci", "virtiofs", "virtio_console", "overlay", "kvm_amd")
USEFUL_MODULES = ("tun", "vhost_net")

_VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
_MIB = 1 << 20


@dataclass(frozen=True)
class Lab:
    """A machine with a hardware-like `/dev/kvm` that runs one command on the host's files.

    What the command writes stays in the machine's memory and is lost, except below the directories in `keep`,
    or anywhere if `writable`. `memory` is in bytes, `timeout` in seconds. With several `cpus` a guest of several CPUs
    now and then brings the emulation down: see docs/lab.md.
    """

    cpus: int = 1
    memory: int = 2048 * _MIB
    timeout: float = 600
    writable: bool = False
    keep: Sequence[Path] = ()
    kernel: InstalledKernel = field(default_factory=find_kernel)

    def run(self, command: Sequence[str], output: Callable[[bytes], object]) -> int:
        """Run `command` as root in the caller's directory and environment; return its exit status.

        `output` gets what the command writes, standard output and error merged, as it comes. Standard input
        is empty. Nothing is left behind: no file has a name for longer than it takes to open it, and the
        processes end with this call, or with the calling thread if that is killed. `ConfigError` names what
        is missing.
        """
        if os.geteuid() != 0:
            raise ConfigError("the lab needs root, because it shares all of this host's files: try sudo")
        end_mark = f"\0lab {os.urandom(16).hex()}"
        with ExitStack() as stack:
            stream = Stream(end_mark.encode(), output)
            reader, writer = os.pipe()
            stack.callback(os.close, reader)
            unused_writer = stack.enter_context(open(writer, "wb", 0))
            console = stack.enter_context(_memory_file("console", b""))
            first_files = stack.enter_context(_memory_file("initrd", self._initrd(command, end_mark)))
            host_files = stack.enter_context(_host_files())
            arguments = self._qemu(host_files, first_files, console, writer)
            stack.enter_context(_process(arguments, console, (host_files, first_files, console, writer)))
            unused_writer.close()
            if not stream.read(reader, time.monotonic() + self.timeout):
                output(f"lab: timed out after {self.timeout:g} s\n".encode())
                return TIMED_OUT
            if stream.status is None:
                output(b"lab: the machine ended by itself; its last words:\n" + os.pread(console, _MIB, 0)[-4000:])
                return FAILED
            return stream.status

    def _initrd(self, command: Sequence[str], end_mark: str) -> bytes:
        useful = [name for name in USEFUL_MODULES if self.kernel.has_module(name)]
        settings = {
            "writable": str(int(self.writable)),
            "keep": shlex.join(str(directory.resolve()) for directory in self.keep),
            "end_mark": end_mark.removeprefix("\0"),
        }
        return initrd.build(
            self.kernel,
            files("pyvirtio.lab").joinpath("init.sh").read_text(),
            modules=(*MODULES, *useful),
            files={"etc/settings": _assignments(settings), "etc/command": _script(command, os.environ)},
        )

    def _qemu(self, host_files: int, first_files: int, console: int, output: int) -> list[str]:
        """QEMU's command line; the arguments are file descriptors it inherits."""
        memory = f"memory-backend-memfd,id=memory,size={self.memory // _MIB}M,share=on"
        return [
            _program("qemu-system-x86_64", "qemu-system-x86"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-accel", "tcg,thread=multi,tb-size=512", "-machine", "pc,memory-backend=memory"),
            # Not `max`: that has 5-level paging, with which nested guests of newer kernels crash. They do with
            # cmpxchg16b too, after which QEMU 7.2 has nonsense in the upper half of EFLAGS: Linux 6.12 uses it early.
            *(
                "-cpu",
                "EPYC,+svm,-cx16",
                "-smp",
                str(self.cpus),
                "-m",
                f"{self.memory // _MIB}M",
                "-object",
                memory,
            ),
            *("-bios", "qboot.rom"),  # starts in a tenth of the time of the default firmware
            *("-kernel", str(unpack(self.kernel)), "-initrd", f"/dev/fd/{first_files}", "-append", _append()),
            *("-chardev", f"socket,id=files,fd={host_files}"),
            *("-device", "vhost-user-fs-pci,chardev=files,tag=host,queue-size=1024"),
            *("-chardev", f"file,id=output,path=/dev/fd/{output}", "-device", "virtio-serial-pci"),
            *("-device", "virtserialport,chardev=output", "-device", "virtio-rng-pci"),
            *("-serial", f"file:/dev/fd/{console}"),
        ]


class Stream:
    """The command's output up to the end mark, and the exit status that follows the mark."""

    def __init__(self, end_mark: bytes, output: Callable[[bytes], object]) -> None:
        self.status: int | None = None
        self._end_mark = end_mark
        self._output = output
        self._held = b""

    def read(self, fd: int, deadline: float) -> bool:
        """Pass on what `fd` has until the status or the end of file; False if the deadline came first."""
        while self.status is None:
            ready = select.select([fd], [], [], max(0, deadline - time.monotonic()))[0]
            data = os.read(fd, 65536) if ready else b""
            if not data:
                self._pass_on(self._held)  # what might have become the end mark
                return bool(ready)
            self.feed(data)
        return True

    def feed(self, data: bytes) -> None:
        """Pass `data` on, but hold back what may be the beginning of the end."""
        self._held += data
        before, mark, after = self._held.partition(self._end_mark)
        if mark:
            self._pass_on(before)
            if after.endswith(b"\n"):
                self.status = int(after)
            self._held = mark + after
        else:
            first = self._held.find(self._end_mark[:1], max(0, len(self._held) - len(self._end_mark)))
            ready = first if first >= 0 else len(self._held)
            self._pass_on(self._held[:ready])
            self._held = self._held[ready:]

    def _pass_on(self, data: bytes) -> None:
        if data:
            self._output(data)


def _script(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What the shell in the machine does: the caller's environment and directory, then the command."""
    exports = {name: value for name, value in environment.items() if name.isidentifier()} | {"PYVIRTIO_LAB": "1"}
    directory = shlex.quote(os.getcwd())
    return f"{_assignments(exports, 'export ')}cd {directory} || exit\nexec {shlex.join(command)}\n"


def _assignments(variables: Mapping[str, str], prefix: str = "") -> str:
    return "".join(f"{prefix}{name}={shlex.quote(value)}\n" for name, value in variables.items())


def _append() -> str:
    """The kernel command line: quick, and with the TSC rate it would measure wrongly on a busy host."""
    quick = "quiet mitigations=off nokaslr no_timer_check cryptomgr.notests audit=0 apparmor=0"
    return f"console=ttyS0 panic=-1 {quick} random.trust_cpu=on tsc=reliable tsc_early_khz={_tsc_khz()}"


def _tsc_khz() -> int:
    """The rate of this CPU's time stamp counter, which TCG shows its guest unscaled."""

    def measure() -> float:
        start, ticks = time.monotonic(), _core.tsc()
        time.sleep(0.02)
        end, more_ticks = time.monotonic(), _core.tsc()
        return (more_ticks - ticks) / (end - start) / 1000

    return round(statistics.median(measure() for _ in range(5)))


@contextmanager
def _memory_file(name: str, data: bytes) -> Iterator[int]:
    """A file without a name that processes started with its descriptor open as `/dev/fd/N`."""
    fd = os.memfd_create(name, 0)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _host_files() -> Iterator[int]:
    """A virtiofsd that shares `/`; yields the connection to it."""
    daemon = next(filter(os.path.exists, _VIRTIOFSD), None) or shutil.which("virtiofsd")
    if daemon is None:
        raise ConfigError("no virtiofsd: install the package virtiofsd, or in Debian 12 qemu-system-common")
    # chroot, not the default sandbox: that one needs namespaces, which containers often refuse.
    if "/qemu/" in daemon:
        options = ["-o", "source=/", "-o", "cache=auto", "-o", "sandbox=chroot"]
    else:
        options = ["--shared-dir=/", "--cache=auto", "--sandbox=chroot", *_plain_submounts(daemon)]
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        connection = stack.enter_context(socket.socket(socket.AF_UNIX))
        with tempfile.TemporaryDirectory(prefix="pyvirtio-lab-") as directory:  # nobody else may connect
            listener.bind(f"{directory}/virtiofs")
            listener.listen(1)
            connection.connect(f"{directory}/virtiofs")
        log = stack.enter_context(_memory_file("virtiofsd", b""))
        stack.enter_context(_process([daemon, f"--fd={listener.fileno()}", *options], log, (listener.fileno(),)))
        listener.close()
        yield connection.fileno()


def _plain_submounts(daemon: str) -> list[str]:
    """Keeps newer virtiofsd from announcing submounts: an overlay refuses a directory such as /dev that is one."""
    option = "--no-announce-submounts"
    known = subprocess.run([daemon, "--help"], capture_output=True, text=True, check=False).stdout
    return [option] if option in known else []


@contextmanager
def _process(command: list[str], log: int, inherited: Sequence[int]) -> Iterator[None]:
    """A process without signals from the terminal, that ends with this block or the death of this thread."""
    guard = [_program("setpriv", "util-linux"), "--pdeathsig", "KILL", "--"]
    process = subprocess.Popen(
        guard + command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=inherited,
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ConfigError(f"no {name}: install the package {package}")
    return path
