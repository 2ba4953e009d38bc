"""The accelerator on a real /dev/kvm, without a guest."""

import errno
import os
from collections.abc import Iterator

import pytest

from pyvirtio._core import GuestMemory, MsixVector
from pyvirtio.accel import kvm
from pyvirtio.accel.kvm import FIRST_MSI_GSI, Kvm
from pyvirtio.errors import ConfigError
from pyvirtio.transports.base import IoAddress

needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")

MESSAGE = (0xFEE0_0000, 0x4021)
MEMORY = GuestMemory.allocate([(0, 1 << 20)])


@pytest.fixture
def accel() -> Iterator[Kvm]:
    accel = Kvm(MEMORY)
    yield accel
    del accel.vm


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


@needs_kvm
def test_an_address_is_taken_once_and_free_after_undo(accel: Kvm, eventfd: int) -> None:
    at = IoAddress("mmio", 0xE000_3000, 0)
    undo = accel.assign_ioeventfd(eventfd, at)
    with pytest.raises(OSError, match="KVM_IOEVENTFD") as refused:
        accel.assign_ioeventfd(eventfd, at)
    assert refused.value.errno == errno.EEXIST
    undo()
    accel.assign_ioeventfd(eventfd, at)()


@needs_kvm
def test_one_port_serves_many_queues_by_datamatch(accel: Kvm, eventfd: int) -> None:
    undo = [accel.assign_ioeventfd(eventfd, IoAddress("pio", 0xC010, 2, queue)) for queue in range(64)]
    for step in undo:
        step()


@needs_kvm
def test_vectors_get_gsis_of_their_own_and_give_them_back(accel: Kvm) -> None:
    first, second, third = MsixVector(), MsixVector(), MsixVector()
    accel.route_msi(first, *MESSAGE)
    accel.route_msi(second, *MESSAGE)
    assert accel.gsi_of(first) == FIRST_MSI_GSI
    assert accel.gsi_of(second) == FIRST_MSI_GSI + 1
    accel.release_msi(first)
    accel.route_msi(third, *MESSAGE)
    assert accel.gsi_of(third) == FIRST_MSI_GSI
    assert accel.gsi_of(first) is None


@needs_kvm
def test_a_rewritten_entry_keeps_its_gsi(accel: Kvm) -> None:
    vector = MsixVector()
    accel.route_msi(vector, *MESSAGE)
    accel.route_msi(vector, MESSAGE[0], 0x4022)
    assert accel.gsi_of(vector) == FIRST_MSI_GSI


class NoEventfd:
    """A vector whose file descriptor KVM refuses as an irqfd."""

    def __init__(self, fd: int) -> None:
        self.fd = fd


@needs_kvm
def test_a_refused_irqfd_gives_its_gsi_back(accel: Kvm) -> None:
    with open("/dev/null") as null, pytest.raises(OSError, match="KVM_IRQFD"):
        accel.route_msi(NoEventfd(null.fileno()), *MESSAGE)  # type: ignore[arg-type]
    vector = MsixVector()
    accel.route_msi(vector, *MESSAGE)
    assert accel.gsi_of(vector) == FIRST_MSI_GSI


@needs_kvm
def test_releasing_what_was_never_routed_is_nothing(accel: Kvm) -> None:
    accel.release_msi(MsixVector())


@needs_kvm
def test_slots_8_apart_share_a_line(accel: Kvm) -> None:
    one, other, apart = accel.intx_line(1), accel.intx_line(9), accel.intx_line(2)
    one.set(True)
    assert other.level or one.level
    assert not apart.level


def test_no_kvm() -> None:
    with pytest.raises(ConfigError, match="/dev/nowhere: there is no KVM on this host"):
        Kvm(MEMORY, "/dev/nowhere")


def test_no_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(kvm, "Vm", refuse)
    with pytest.raises(ConfigError, match="/dev/kvm: not permitted; join the group kvm"):
        Kvm(MEMORY)


def test_something_else_than_kvm() -> None:
    with pytest.raises(ConfigError, match="/dev/null: "):
        Kvm(MEMORY, "/dev/null")
