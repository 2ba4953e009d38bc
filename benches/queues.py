"""Time to bring the queues of a device up and down with ioeventfds: DRIVER_OK, and the reset.

With `/dev/kvm` the eventfds are KVM's, else those of the in-process accelerator. A device with twice the queues
should take twice the time: the figures are per queue.
"""

import resource
import time
from collections.abc import Callable

from measure import Report, arguments, interleaved

from pyvirtio import Device, VirtQueue, queue
from pyvirtio._core import supported
from pyvirtio.accel.kvm import Kvm
from pyvirtio.spec import Status
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.heap import Heap

MIB = 1 << 20


class Many(Device, id=63):
    """Any number of queues that nobody uses."""

    def __init__(self, count: int) -> None:
        self.count = count

    @queue(size=2, count="count")
    def requestq(self, vq: VirtQueue) -> None:
        pass


def bring_up(driver: VirtioDriver) -> float:
    driver.negotiate()
    driver.set_up()
    ready = driver.status | Status.DRIVER_OK
    start = time.perf_counter()
    driver.status = ready
    spent = time.perf_counter() - start
    mode = driver.function.dataplane.notifiers.mode(0)
    assert mode == "ioeventfd", mode
    return spent * 1e6 / len(driver.queues)


def bring_down(driver: VirtioDriver) -> float:
    count = len(driver.queues)
    start = time.perf_counter()
    driver.status = Status(0)
    spent = time.perf_counter() - start
    driver.reset()
    return spent * 1e6 / count


def measured(counts: list[int], repetitions: int, report: Report) -> None:
    # The driver's accesses are made by this process; only the eventfds and interrupts are KVM's.
    with Guest(ioeventfd=True, memory=64 * MIB) as guest:
        guest.heap = Heap(0x1000, guest.border)
        where = "in process"
        if not supported():
            kvm = Kvm(guest.memory)
            guest.accel.assign_ioeventfd = kvm.assign_ioeventfd  # type: ignore[method-assign]
            where = "KVM"
        drivers = {count: guest.plug(Many(count), msix=False, start=False, disable_legacy=True) for count in counts}

        def up_and_down(driver: VirtioDriver, down: dict[str, list[float]], name: str) -> Callable[[], float]:
            def measure() -> float:
                up = bring_up(driver)
                down[name].append(bring_down(driver))
                return up

            return measure

        names = {count: f"{count} queue" + "s" * (count > 1) for count in counts}
        down: dict[str, list[float]] = {name: [] for name in names.values()}
        modes = {names[count]: up_and_down(driver, down, names[count]) for count, driver in drivers.items()}
        report.add(f"DRIVER_OK, per queue ({where})", "us", interleaved(modes, repetitions))
        report.add(f"reset, per queue ({where})", "us", {name: values[1:] for name, values in down.items()})


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--queues", type=int, nargs="+", default=[1, 64, 1024], metavar="N")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report = Report(args.json)
    measured(args.queues, args.repetitions, report)
    report.close()


if __name__ == "__main__":
    main()
