"""Tells a KVM that can run Linux from one that cannot."""

from pathlib import Path

import pytest

from pyvirtio.accel.host import linux_capable


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """The root of a host with hardware KVM."""
    for directory in ("dev", "proc", "sys/module/kvm_amd"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "dev/kvm").touch()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu svm nx\n")
    return tmp_path


def test_hardware_kvm_runs_linux(host: Path) -> None:
    assert linux_capable(host) is None


def test_no_kvm_at_all(host: Path) -> None:
    (host / "dev/kvm").unlink()
    assert linux_capable(host) == "there is no /dev/kvm"


def test_a_software_kvm_is_known_by_its_module(host: Path) -> None:
    (host / "sys/module/kvm_pvm").mkdir()
    assert linux_capable(host) == "/dev/kvm is a software KVM (kvm_pvm)"


def test_a_cpu_without_virtualization_has_no_hardware_kvm(host: Path) -> None:
    (host / "proc/cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu nx\n")
    reason = linux_capable(host)
    assert reason is not None
    assert "svm" in reason
