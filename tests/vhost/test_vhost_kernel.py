"""vhost-net: the kernel serves the pairs of queues, and gives them back where it stopped."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import pytest
from fake_vhost import FakeVhost, Pairs
from notified import function_level_reset, modes, notifiers_of

from pyvirtio.dataplane import IoThread
from pyvirtio.spec import Feature, NetFeature
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.driver import Interface
from pyvirtio.testing.queue import HANG, Queue
from pyvirtio.transports.pci import VirtioPci
from pyvirtio.vhost import kernel
from pyvirtio.vhost.kernel import HostMemory, VhostNet
from pyvirtio.vmm.monitor import Controls, Monitor

VHOST, OWN = b"vhost", b"own"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeVhost:
    vhost = FakeVhost()
    monkeypatch.setattr(kernel, "ioctl", vhost.ioctl)
    return vhost


@pytest.fixture
def guest(fake: FakeVhost, guest: Guest) -> Guest:
    """Closed before the fake is."""
    fake.guest = guest
    return guest


def vhost_of(driver: VirtioDriver) -> VhostNet:
    assert driver.function.vhost is not None
    return driver.function.vhost


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def ask(q: Queue) -> bytes:
    buffer = q.add(b"who serves?", 5)
    q.kick()
    return buffer.wait()


def answers(driver: VirtioDriver) -> list[bytes]:
    return [ask(q) for q in driver.queues]


def own_mode(guest: Guest) -> str:
    return "ioeventfd" if guest.ioeventfd else "sync"


@pytest.mark.parametrize("transport", ["modern", "legacy"])
@pytest.mark.parametrize("msix", [True, False], ids=["msi-x", "intx"])
@pytest.mark.parametrize("pairs", [1, 3])
def test_the_kernel_serves_the_pairs_and_we_the_control_queue(
    guest: Guest, fake: FakeVhost, transport: Interface, msix: bool, pairs: int
) -> None:
    driver = guest.plug(Pairs(pairs), transport=transport, msix=msix)
    for _ in range(40):
        assert answers(driver) == [VHOST] * 2 * pairs + [OWN]
    assert modes(driver) == ["vhost"] * 2 * pairs + [own_mode(guest)]
    assert [ring.served for ring in fake.serving] == [40] * 2 * pairs


def test_the_kernel_polls_as_long_as_the_device_says(guest: Guest, fake: FakeVhost) -> None:
    pairs = Pairs(2)
    pairs.vhost_poll_us = 50
    guest.plug(pairs)
    assert [ring.poll_us for ring in fake.rings.values()] == [50] * 4
    guest.plug(Pairs(), name="asleep")
    assert [ring.poll_us for ring in fake.rings.values()][4:] == [0] * 2


def test_an_unmasked_vector_is_signalled_by_the_kernel_itself(guest: Guest, fake: FakeVhost) -> None:
    driver = guest.plug(Pairs())
    msix = driver.function.msix
    assert msix is not None
    vectors = [msix.vectors[index] for index in driver.function.interrupts.queue_vectors[:2]]
    assert [ring.call for ring in fake.serving] == [vector.fd for vector in vectors]
    assert answers(driver)[0] == VHOST
    assert [vq.counters["interrupts"] for vq in driver.function.dataplane.queues[:2]] == [0, 0]


@pytest.mark.parametrize("how", ["entry", "function"])
def test_a_masked_vector_is_pending_and_delivered_on_unmask(guest: Guest, fake: FakeVhost, how: str) -> None:
    driver = guest.plug(Pairs())
    q, table = driver.queues[0], driver.msix
    assert table is not None
    vector = driver.function.interrupts.queue_vectors[0]

    def mask(masked: bool) -> None:
        if how == "entry":
            table.mask(vector, masked)
        else:
            table.control = table.ENABLE | (table.FUNCTION_MASK if masked else 0)

    for _ in range(5):
        before = q.interrupts
        mask(True)
        buffer = q.add(b"?", 5)
        q.kick()
        wait_for(lambda: table.pending(vector))
        assert q.interrupts == before
        mask(False)
        assert buffer.wait() == VHOST
        assert q.interrupts == before + 1
        assert not table.pending(vector)
        assert ask(q) == VHOST


def test_masks_come_and_go_during_traffic(guest: Guest, fake: FakeVhost) -> None:
    driver = guest.plug(Pairs())
    table = driver.msix
    assert table is not None
    for turn in range(300):
        table.mask(driver.function.interrupts.queue_vectors[0], turn % 3 == 0)
        buffer = driver.queues[0].add(b"?", 5)
        driver.queues[0].kick()
        table.mask(driver.function.interrupts.queue_vectors[0], False)
        assert buffer.wait() == VHOST


def test_give_and_take_back_during_traffic(guest: Guest, fake: FakeVhost) -> None:
    """Every buffer is answered once, in order, by one or the other."""
    driver = guest.plug(Pairs(2))
    vhost, seen = vhost_of(driver), list[bytes]()

    def switch() -> None:
        for turn in range(41):
            vhost.enabled = turn % 2 == 1

    turns = threading.Thread(target=switch)
    turns.start()
    while turns.is_alive() or len(seen) < 400:
        buffers = [q.add(b"?", 5) for q in driver.queues[:4]]
        for q in driver.queues[:4]:
            q.kick()
        seen += [buffer.wait() for buffer in buffers]
    turns.join()
    assert set(seen) == {VHOST, OWN}
    assert [ask(q) for q in driver.queues] == [OWN] * 5
    assert modes(driver) == [own_mode(guest)] * 5
    assert fake.serving == []


def test_across_resets_and_new_drivers(guest: Guest, fake: FakeVhost) -> None:
    driver = guest.plug(Pairs())
    for _ in range(20):
        assert answers(driver) == [VHOST, VHOST, OWN]
        driver.function.ioeventfd = not driver.function.ioeventfd
        assert answers(driver) == [VHOST, VHOST, OWN]
        driver.reset()
        assert fake.serving == []
        assert guest.accel.ioeventfds == set()
        driver.start()
    function_level_reset(driver)
    assert fake.serving == []
    assert guest.accel.ioeventfds == set()


def test_a_pause_stops_the_kernel_and_loses_no_kick(guest: Guest, fake: FakeVhost) -> None:
    driver = guest.plug(Pairs())
    for _ in range(10):
        notifiers_of(driver).stop()
        assert fake.serving == []
        buffers = [q.add(b"?", 5) for q in driver.queues]
        for q in driver.queues[:2]:
            q.publish()
        notifiers_of(driver).start()
        assert [buffer.wait() for buffer in buffers[:2]] == [VHOST] * 2
        driver.queues[2].kick()
        assert buffers[2].wait() == OWN


def test_without_bus_mastering_the_kernel_stops(guest: Guest, fake: FakeVhost) -> None:
    driver = guest.plug(Pairs())
    assert answers(driver) == [VHOST, VHOST, OWN]
    command = driver.pci.command
    driver.pci.command = command & ~4
    assert fake.serving == []
    driver.pci.command = command
    assert answers(driver) == [VHOST, VHOST, OWN]


def test_bars_move_while_the_kernel_serves(guest: Guest, fake: FakeVhost) -> None:
    driver = guest.plug(Pairs())
    served = fake.serving
    driver.pci.move_bar(4, driver.pci.bar_address(4) + (1 << 32))
    assert fake.serving == served
    assert answers(driver) == [VHOST, VHOST, OWN]


REQUESTS_FOR_A_RING = 11


@pytest.mark.parametrize("k", range(2 * REQUESTS_FOR_A_RING))
def test_request_k_fails_at_driver_ok(guest: Guest, fake: FakeVhost, caplog: pytest.LogCaptureFixture, k: int) -> None:
    """We serve then, with one warning; the next DRIVER_OK tries again."""
    driver = guest.plug(Pairs(), start=False)
    fake.requests.clear()
    fake.fail_at = k
    driver.start()
    fake.fail_at = -1
    assert fake.serving == []
    assert fake.header == 12
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == f"pairs0: pairq{k // REQUESTS_FOR_A_RING}: no vhost (EFAULT: Bad address); the I/O thread serves"
    assert answers(driver) == [OWN] * 3
    assert vhost_of(driver).enabled
    driver.start()
    assert answers(driver) == [VHOST, VHOST, OWN]


def test_without_multiqueue_the_third_queue_is_ours(guest: Guest, fake: FakeVhost) -> None:
    driver = guest.plug(Pairs(2), features=~int(NetFeature.MQ))
    assert answers(driver) == [VHOST, VHOST, OWN, OWN, OWN]
    driver.features_wanted = ~0
    driver.start()
    assert answers(driver) == [VHOST] * 4 + [OWN]


def test_the_device_may_keep_its_queues_for_a_while(guest: Guest, fake: FakeVhost) -> None:
    """As a network card does while its cable is out."""
    device = Pairs(2)
    driver = guest.plug(device)
    for pairs in (0, 2, 1, 2, 0, 1):
        device.vhost = device.fds[:pairs]
        device.vhost_changed()
        assert answers(driver) == [VHOST] * 2 * pairs + [OWN] * (4 - 2 * pairs) + [OWN]
    vhost_of(driver).enabled = False
    device.vhost_changed()
    assert answers(driver) == [OWN] * 5


def test_what_is_switched_on_and_fails_is_an_error(guest: Guest, fake: FakeVhost) -> None:
    driver = guest.plug(Pairs())
    vhost_of(driver).enabled = False
    fake.requests.clear()
    fake.fail_at = 5
    with pytest.raises(OSError, match="Bad address"):
        vhost_of(driver).enabled = True
    assert answers(driver) == [OWN] * 3
    assert modes(driver) == [own_mode(guest)] * 3
    vhost_of(driver).enabled = True
    assert answers(driver) == [VHOST, VHOST, OWN]


@dataclass
class Machine:
    """As much of a machine as the monitor looks at."""

    devices: list[VirtioPci]
    iothreads: dict[str, IoThread] = field(default_factory=dict)


def test_the_monitor_switches_it(guest: Guest, fake: FakeVhost) -> None:
    driver = guest.plug(Pairs())
    monitor = Monitor(cast(Controls, Machine([driver.function])))
    assert [line.split()[-1] for line in monitor.execute("info queues").splitlines()[1:3]] == ["vhost"] * 2
    assert monitor.execute("set pairs0.vhost off") == ""
    assert answers(driver) == [OWN] * 3
    fake.fail_at = len(fake.requests) + 2
    assert monitor.execute("set pairs0.vhost on") == "set pairs0.vhost on: Bad address\n"
    assert answers(driver) == [OWN] * 3
    assert monitor.execute("set pairs0.vhost on") == ""
    assert answers(driver) == [VHOST, VHOST, OWN]
    known = "only ioeventfd and vhost can be switched while the machine runs"
    assert monitor.execute("set pairs0.vectors 1") == f"set pairs0.vectors: {known}\n"


def test_features_that_the_kernel_lacks(guest: Guest, fake: FakeVhost, caplog: pytest.LogCaptureFixture) -> None:
    fake.features &= ~int(Feature.EVENT_IDX)
    driver = guest.plug(Pairs())
    assert answers(driver) == [OWN] * 3
    assert "vhost lacks the features 0x20000000" in caplog.text
    driver.features_wanted = ~int(Feature.EVENT_IDX)
    driver.start()
    assert answers(driver) == [VHOST, VHOST, OWN]


def test_a_legacy_driver_without_mergeable_buffers_has_the_short_header(guest: Guest, fake: FakeVhost) -> None:
    """The tap must put in front of a frame what the ring is to have, and what the core expects afterwards."""
    driver = guest.plug(Pairs(), transport="legacy")
    assert fake.header == 10
    driver.reset()
    assert fake.header == 12
    assert fake.headers == [10, 12]


def test_a_ring_that_the_kernel_gives_up_breaks_the_device(guest: Guest, fake: FakeVhost) -> None:
    driver = guest.plug(Pairs())
    os.eventfd_write(fake.serving[1].error, 1)
    assert driver.wait_needs_reset() == "pairq1: vhost gave the ring up"
    driver.start()
    assert answers(driver) == [VHOST, VHOST, OWN]


def test_the_kernel_stops_with_a_device_that_breaks(guest: Guest, fake: FakeVhost) -> None:
    driver = guest.plug(Pairs())
    driver.function.dataplane.state.fail("a reason")
    wait_for(lambda: not fake.serving)
    assert driver.wait_needs_reset() == "a reason"
    driver.start()
    assert answers(driver) == [VHOST, VHOST, OWN]


def test_a_ring_must_lie_in_one_region(guest: Guest) -> None:
    memory = HostMemory(guest.memory)
    assert memory.at(guest.border - 16, 16) - memory.at(0, 1) == guest.border - 16
    for address in (guest.border - 8, guest.high - 16):
        with pytest.raises(OSError, match="crosses regions of memory"):
            memory.at(address, 16)
