"""Finds kernels, puts their modules in load order and unpacks them."""

import gzip
import lzma
import struct
from pathlib import Path

import pytest

from pyvirtio.errors import ConfigError
from pyvirtio.lab.kernel import InstalledKernel, find_kernel, read_module, unpack

DEPENDENCIES = """\
kernel/virtio.ko.xz:
kernel/virtio_ring.ko.xz: kernel/virtio.ko.xz
kernel/virtio-pci.ko.xz: kernel/virtio_ring.ko.xz kernel/virtio.ko.xz
kernel/virtio_blk.ko.xz: kernel/virtio_ring.ko.xz kernel/virtio.ko.xz
"""


def install(root: Path, version: str, image: bytes = b"") -> InstalledKernel:
    """Put a kernel where a distribution's package would."""
    modules = root / "lib/modules" / version
    modules.mkdir(parents=True)
    (modules / "modules.dep").write_text(DEPENDENCIES)
    (modules / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    (root / "boot").mkdir(exist_ok=True)
    (root / "boot" / f"vmlinuz-{version}").write_bytes(image)
    return InstalledKernel(version, root / "boot" / f"vmlinuz-{version}", modules)


def bzimage(payload: bytes) -> bytes:
    """The parts of Linux's boot protocol that say where the payload is."""
    image = bytearray(1024)
    image[0x1F1] = 1
    struct.pack_into("<II", image, 0x248, 16, len(payload))
    return bytes(image) + bytes(16) + payload


def test_a_module_comes_after_all_it_depends_on(tmp_path: Path) -> None:
    order = install(tmp_path, "6.1.0-1").module_order(["virtio_pci", "virtio_blk", "ext4"])
    assert [file.name for file in order] == [
        "virtio.ko.xz",
        "virtio_ring.ko.xz",
        "virtio-pci.ko.xz",
        "virtio_blk.ko.xz",
    ]


def test_an_unknown_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kernel 6\.1\.0-1 has no module nvme"):
        install(tmp_path, "6.1.0-1").module_order(["nvme"])


def test_the_newest_cloud_kernel_is_taken(tmp_path: Path) -> None:
    for version in ("6.1.0-9-cloud-amd64", "6.1.0-10-cloud-amd64", "6.12.0-1-amd64"):
        install(tmp_path, version)
    (tmp_path / "boot/vmlinuz-6.20.0-cloud-amd64").touch()  # its modules are not installed
    assert find_kernel(root=tmp_path).version == "6.1.0-10-cloud-amd64"
    assert find_kernel("6.12.0-1-amd64", tmp_path).version == "6.12.0-1-amd64"


def test_a_missing_kernel_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="linux-image-cloud-amd64"):
        find_kernel(root=tmp_path)
    with pytest.raises(ConfigError, match=r"/boot/vmlinuz-1\.2\.3"):
        find_kernel("1.2.3", tmp_path)


def test_compressed_modules_are_read(tmp_path: Path) -> None:
    (tmp_path / "plain.ko").write_bytes(b"code")
    (tmp_path / "packed.ko.xz").write_bytes(lzma.compress(b"code"))
    assert read_module(tmp_path / "plain.ko") == b"code"
    assert read_module(tmp_path / "packed.ko.xz") == b"code"


def test_the_kernel_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernel = install(tmp_path, "6.1.0-1", bzimage(gzip.compress(b"\x7fELF kernel")))
    first = unpack(kernel)
    assert first.read_bytes() == b"\x7fELF kernel"
    written = first.stat().st_mtime_ns
    assert unpack(kernel) == first
    assert first.stat().st_mtime_ns == written
    assert list(first.parent.iterdir()) == [first]


def test_a_kernel_packed_in_an_unknown_way_starts_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernel = install(tmp_path, "6.1.0-1", bzimage(b"what is this"))
    assert unpack(kernel) == kernel.image
