"""The lint watches Linux's own drivers: what they do against the specification, if anything.

Most kicks exit here, so that the lint sees each of them, and one CPU drives all devices.
"""

from typing import Any

import pytest
from website import Website

from pyvirtio.backends.block import Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.net import Net
from pyvirtio.devices.rng import Rng
from pyvirtio.lint import Lint
from pyvirtio.testing.linux import LinuxGuest

MIB = 1 << 20
HOW: dict[str, dict[str, Any]] = {
    "modern": {"disable_legacy": True},
    "eventfds": {"ioeventfd": True},
    "legacy-eventfds": {"disable_modern": True, "ioeventfd": True},
    "packed": {"packed": True, "ioeventfd": True},
    "intx": {"disable_legacy": True, "vectors": 0},
    "flags": {"event_idx": False, "indirect_desc": False},
    "legacy": {"disable_modern": True},
}
BOUND = r"""printf '#!/bin/sh\nif [ "$1" = bound ]; then ip addr add $ip/24 dev $interface; fi\n' >/tmp/bound"""


@pytest.mark.vm(modules=("virtio_pci", "virtio_blk", "virtio_rng", "virtio_net"))
def test_the_drivers_of_linux_are_clean(vm: LinuxGuest) -> None:
    lint = Lint()
    vm.machine.virtio_pci = lint.virtio_pci
    for name, properties in HOW.items():
        vm.plug(Blk(Memory(2 * MIB), serial=name), name, **{"ioeventfd": False, **properties})
    vm.plug(Rng(), ioeventfd=False)
    vm.plug(Net(Website(page="It works.\n")), ioeventfd=False)
    vm.boot()
    vm.mark("booted")
    for disk in vm.run("ls /dev/vd?").split():
        vm.run(f"dd if=/dev/urandom of={disk} bs=64k count=16 oflag=direct 2>/dev/null")
        vm.run(f"dd if={disk} of=/dev/null bs=4k count=64 2>/dev/null && blkdiscard {disk}")
    vm.run("head -c 100 /dev/hwrng >/dev/null")
    vm.run(f"ip link set eth0 up && {BOUND} && chmod +x /tmp/bound && udhcpc -i eth0 -n -q -s /tmp/bound 2>/dev/null")
    assert vm.run("wget -q -O - http://10.0.0.1/") == "It works."
    vm.run("rmmod virtio_blk virtio_rng virtio_net && insmod /modules/virtio_blk.ko && insmod /modules/virtio-rng.ko")
    assert len(vm.run("ls /dev/vd?").split()) == len(HOW)
    assert "error" not in vm.dmesg(since="booted").lower()
    assert [str(violation) for violation in lint.take()] == []
