"""Boot of Debian's kernel: userspace exits, and time and memory from process start to the guest's init.

Needs a KVM that runs Linux: `pyvirtio lab -- python benches/boot.py` where the host's does not; what counts there
are the exits and the memory, its times are those of an emulated machine.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from measure import Report, Samples, arguments

from pyvirtio.accel.host import linux_capable

KIB = 1024


def resident() -> dict[str, float]:
    """MiB of this process, by kind; guest memory is the shared kind."""
    status = Path("/proc/self/status").read_text()
    found = re.findall(r"^Rss(Anon|File|Shmem):\s+(\d+) kB", status, re.MULTILINE)
    return {kind: int(kib) / KIB for kind, kib in found}


def boot(started: float) -> dict[str, float]:
    """Boot one guest; what it took since `started` (a monotonic time)."""
    from pyvirtio.testing.linux import LinuxGuest

    with LinuxGuest() as guest:
        built = time.monotonic()
        guest.boot(timeout=600)
        up = time.monotonic()
        exits, memory = guest.machine.exits, resident()
        guest.type("poweroff -f")
        guest.wait()
    return {
        "s to a machine that can start": built - started,
        "s to the guest's init": up - started,
        "MiB besides guest memory": memory["Anon"] + memory["File"],
        **{f"exits: {kind}": count for kind, count in exits.items()},
    }


def main() -> int:
    parser = arguments(__doc__, repetitions=3)
    parser.add_argument("--started", type=float, help="measure this process; for the processes that are measured")
    args = parser.parse_args()
    if unfit := linux_capable():
        print(f"{unfit}; use: pyvirtio lab -- python benches/boot.py", file=sys.stderr)
        return 2
    if args.started is not None:
        print(json.dumps(boot(args.started)))
        return 0
    samples: Samples = {}
    for _ in range(args.repetitions):
        command = [sys.executable, __file__, "--started", str(time.monotonic())]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=900).stdout
        for name, value in json.loads(output.splitlines()[-1]).items():
            samples.setdefault(name, []).append(value)
    report = Report(args.json)
    report.add("boot of Linux", "", samples)
    report.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
