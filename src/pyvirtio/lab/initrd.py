"""A first root file system for Linux: busybox, kernel modules, an init script and what it needs."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from pyvirtio.errors import ConfigError
from pyvirtio.lab.cpio import Archive
from pyvirtio.lab.kernel import InstalledKernel, read_module

_SUFFIXES = (".xz", ".zst", ".gz")


def build(
    kernel: InstalledKernel, init: str, *, modules: Iterable[str] = (), files: Mapping[str, str] | None = None
) -> bytes:
    """An initrd whose `/init` is the shell script `init`.

    `/modules/order` lists the files beside it in load order. `files` are text files by path, in a directory
    of this archive such as `etc`. The script may call any busybox applet by its name once /proc is mounted
    (`/bin/busybox mount -t proc proc /proc`): busybox's shell runs them from its own executable.
    """
    archive = Archive()
    for directory in ("bin", "dev", "etc", "mnt", "modules", "proc", "sys", "tmp"):
        archive.directory(directory)
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3)
    archive.file("bin/busybox", _busybox(), executable=True)
    archive.symlink("bin/sh", "busybox")
    archive.file("init", init.encode(), executable=True)
    for path, text in (files or {}).items():
        archive.file(path, text.encode())
    _add_modules(archive, kernel.module_order(modules))
    return archive.finish()


def _add_modules(archive: Archive, order: list[Path]) -> None:
    names = [file.name.removesuffix(file.suffix) if file.suffix in _SUFFIXES else file.name for file in order]
    for file, name in zip(order, names, strict=True):
        archive.file(f"modules/{name}", read_module(file))
    archive.file("modules/order", "".join(f"{name}\n" for name in names).encode())


def _busybox() -> bytes:
    """A busybox that needs no shared libraries; a dynamic one names its loader near its start."""
    executable = Path("/bin/busybox")
    data = executable.read_bytes() if executable.exists() else b""
    if not data or b"/ld-linux" in data[:4096]:
        raise ConfigError("no static busybox in /bin: install the package busybox-static")
    return data
