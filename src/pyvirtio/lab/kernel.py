"""The Linux kernels installed in `/boot`: their modules in load order, and unpacked for a fast start."""

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pyvirtio.errors import ConfigError

_UNPACKERS = {
    b"\x02\x21": ("lz4", "-dc"),
    b"\x28\xb5": ("zstd", "-dc"),
    b"\x1f\x8b": ("gzip", "-dc"),
    b"\xfd7": ("xz", "-dc"),
}
_SUFFIXES = {".xz": "xz", ".zst": "zstd", ".gz": "gzip"}


@dataclass(frozen=True)
class InstalledKernel:
    """One installed kernel: `image` is its bzImage, `modules` its directory below `/lib/modules`."""

    version: str
    image: Path
    modules: Path

    def module_order(self, names: Iterable[str]) -> list[Path]:
        """The files of these modules and of all they depend on, in load order; what is built in has no file.

        `ConfigError` for a module the kernel does not have.
        """
        dependencies = self._dependencies()
        files = {module_name(file): file for file in dependencies}
        builtin = self._builtin()
        order: dict[str, None] = {}

        def add(file: str) -> None:
            for dependency in reversed(dependencies[file]):
                add(dependency)
            order[file] = None

        for name in map(module_name, names):
            if name in files:
                add(files[name])
            elif name not in builtin:
                raise ConfigError(f"kernel {self.version} has no module {name}")
        return [self.modules / file for file in order]

    def has_module(self, name: str) -> bool:
        """Whether the module can be loaded or is built in."""
        names = {module_name(file) for file in self._dependencies()} | self._builtin()
        return module_name(name) in names

    def _dependencies(self) -> dict[str, list[str]]:
        lines = (self.modules / "modules.dep").read_text().splitlines()
        return {file: needed.split() for file, _, needed in (line.partition(":") for line in lines)}

    def _builtin(self) -> set[str]:
        return {module_name(line) for line in (self.modules / "modules.builtin").read_text().split()}


def module_name(file: str) -> str:
    """The name of a module as `lsmod` shows it, from its file name or another spelling."""
    return Path(file).name.partition(".ko")[0].replace("-", "_")


def find_kernel(version: str | None = None, root: Path = Path("/")) -> InstalledKernel:
    """That version, else the newest cloud kernel (small, boots fastest), else the newest with modules."""
    found = [
        InstalledKernel(name, _readable(image), root / "lib/modules" / name)
        for image in (root / "boot").glob("vmlinuz-*")
        if (root / "lib/modules" / (name := image.name.removeprefix("vmlinuz-")) / "modules.dep").exists()
        and version in (None, name)
    ]
    if not found and version:
        raise ConfigError(f"kernel {version}: no /boot/vmlinuz-{version} with its modules in /lib/modules")
    if not found:
        raise ConfigError("no kernel in /boot: install the package linux-image-cloud-amd64")
    return max(found, key=lambda kernel: ("cloud" in kernel.version, _numbers(kernel.version)))


def read_module(file: Path) -> bytes:
    """The module itself; distributions store it compressed or not."""
    tool = _SUFFIXES.get(file.suffix)
    if tool is None:
        return file.read_bytes()
    if not shutil.which(tool):
        raise ConfigError(f"{file} needs {tool}: install the package {tool.replace('xz', 'xz-utils')}")
    return subprocess.run([tool, "-dc", file], stdout=subprocess.PIPE, check=True).stdout


def unpack(kernel: InstalledKernel) -> Path:
    """The kernel as an ELF file that PVH firmware starts, kept in the user's cache directory.

    Unpacking itself under emulation is the slowest part of a kernel's start. Where that cannot be done here
    the answer is the bzImage, which starts too.
    """
    cached = _cache() / f"vmlinux-{kernel.version}"
    if cached.exists() and cached.stat().st_mtime >= kernel.image.stat().st_mtime:
        return cached
    payload = _payload(kernel.image.read_bytes())
    tool = _UNPACKERS.get(payload[:2])
    if tool is None or not shutil.which(tool[0]):
        return kernel.image
    # lz4's end mark is missing in kernels: the tool complains after it has written everything.
    vmlinux = subprocess.run(tool, input=payload, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    if not vmlinux.startswith(b"\x7fELF"):
        return kernel.image
    cached.parent.mkdir(parents=True, exist_ok=True)
    unfinished = cached.with_name(f"{cached.name}.{os.getpid()}")
    unfinished.write_bytes(vmlinux)
    unfinished.rename(cached)
    return cached


def _payload(image: bytes) -> bytes:
    """The compressed kernel in a bzImage: Linux's boot protocol, fields setup_sects and payload_offset."""
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    return image[start : start + length]


def _readable(image: Path) -> Path:
    """The image, or the copy that set-up made of one that only root may read, as on Ubuntu."""
    copy = _cache() / image.name
    return copy if not os.access(image, os.R_OK) and copy.exists() else image


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyvirtio"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
