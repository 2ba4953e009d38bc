"""Fixtures of the tests on `/dev/kvm`, software KVM included."""

from collections.abc import Iterator

import pytest
from freestanding import Cpu, KvmGuest, Recorder

from pyvirtio._core import GuestMemory, Vm, supported


@pytest.fixture(autouse=True, scope="session")
def _kvm() -> None:
    missing = supported()
    if missing:
        pytest.skip(f"/dev/kvm: {missing}")


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory.allocate([(0, 1 << 20)])


@pytest.fixture
def vm(memory: GuestMemory) -> Vm:
    """A VM with memory and interrupt controllers, and nothing else."""
    machine = Vm()
    machine.create_irqchip()
    machine.set_memory(memory)
    return machine


@pytest.fixture
def bus() -> Recorder:
    return Recorder()


@pytest.fixture
def cpu(vm: Vm, memory: GuestMemory, bus: Recorder) -> Cpu:
    return Cpu(vm, memory, bus)


@pytest.fixture
def machine() -> Iterator[KvmGuest]:
    with KvmGuest() as guest:
        yield guest
