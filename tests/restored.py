"""A device that goes on as if in another process: a fresh one takes its state, while its driver notices nothing."""

from typing import Any

from pyvirtio.device import Device
from pyvirtio.spec import Feature
from pyvirtio.testing import VirtioDriver
from pyvirtio.transports.pci import VirtioPci
from pyvirtio.vmm.snapshot import decode, encode


def saved(driver: VirtioDriver) -> dict[str, Any]:
    """Hold the device and take its state, by way of the form that a snapshot has it in."""
    driver.function.dataplane.notifiers.hold()
    driver.function.dataplane.drain()
    return decode(encode(driver.function.save()))


def restored(driver: VirtioDriver, device: Device, state: dict[str, Any], **properties: Any) -> VirtioPci:
    """Put `device` in the place of the one that `driver` drives, with the state of that."""
    guest, old = driver.guest, driver.function
    guest.bus.remove(old)
    old.close()
    properties.setdefault("ioeventfd", not old.ioeventfd)  # the state has the last word
    properties.setdefault("packed", bool(old.driver.offered & Feature.RING_PACKED))
    properties.setdefault("in_order", bool(old.driver.offered & Feature.IN_ORDER))
    function = VirtioPci(device, guest.accel, name=old.name, iothread=guest.iothread, slot=old.slot, **properties)
    guest.bus.add(function)
    driver.function = function
    function.dataplane.notifiers.hold()
    function.restore(state)
    function.dataplane.notifiers.unhold()
    return function
