"""What Linux's block and network drivers do with each fault, in one guest; writes the tables of docs/faults.md.

    pyvirtio lab --keep docs -- .venv/bin/python tools/fault_report.py

Needs a KVM that runs Linux, which the lab has. Without `--write` it prints the table only. `--kernel` chooses the
guest's kernel, `--root` where it was unpacked to if it is not installed.
"""

import argparse
import hashlib
import random
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import fault_net
from fault_net import Call

from pyvirtio.backends.block import Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.errors import ConfigError
from pyvirtio.faults import parse
from pyvirtio.lab.kernel import InstalledKernel, find_kernel
from pyvirtio.testing.linux import GuestFailed, LinuxGuest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "faults.md"
END = "<!-- end -->"
SIZE = 4 << 20
SEED = 1

AT_BOOT = ["slow-reset=300ms", "refuse=EVENT_IDX", "assign=0:ENOSPC"]
RUNNING = [
    "late=20ms@20%", "reorder@30%", "duplicate@10%", "lost@10%", "short", "length=4294967295", "lost-interrupt@20%",
    "spurious", "needs-reset=20", "storm=200ms", "error=64-127", "read-error@10%", "write-error@10%", "torn@50%",
    "flip@20%",
]  # fmt: skip

FUNCTIONS = r"""
# try NODE: 4 readers at once, then a writer; each says how it ended.
try() {
    (
        for q in 0 1 2 3; do
            ( dd if=/dev/$1 of=/tmp/$1.$q bs=4k skip=$((q * 16)) count=16 iflag=direct; echo read $? ) &
        done
        wait
        echo sum $(cat /tmp/$1.0 /tmp/$1.1 /tmp/$1.2 /tmp/$1.3 | sha256sum)
        dd if=/etc/data of=/dev/$1 bs=4k seek=512 count=32 oflag=direct
        echo write $?
    ) >/tmp/$1.out 2>/dev/null &
}
again() {
    ( dd if=/dev/$1 of=/dev/null bs=4k skip=256 count=4 iflag=direct; echo again $? ) >/tmp/$1.again 2>/dev/null &
}
# said: what the kernel said, each kind of line once.
said() {
    dmesg | sed 's/^\[[^]]*\] //' | awk '{
        kind = $0; gsub(/(sector|logical block|id|flags|phys_seg) [0-9a-fx]+/, "", kind)
        if (!(kind in seen)) { seen[kind] = 1; print }
    }'
}
nodes() { for d in /sys/block/vd*; do echo ${d##*/} $(cat $d/serial) $(basename $(readlink $d/device)); done; }
"""


@dataclass
class Trial:
    """One fault on one disk, and what became of it."""

    fault: str
    blk: Blk = field(init=False)
    data: bytes = field(init=False)
    node: str = ""
    virtio: str = ""
    log: str = ""
    out: list[str] = field(default_factory=list)
    again: str = ""

    def __post_init__(self) -> None:
        memory = Memory(SIZE)
        memory.data[:] = random.Random(self.fault).randbytes(SIZE)
        self.data = bytes(memory.data)
        self.memory = memory
        self.blk = Blk(memory, serial=self.fault.partition("@")[0][:20])

    def switch_on(self) -> None:
        faults, _ = parse(self.fault)
        self.blk.faults.add(*faults, seed=SEED)

    def row(self) -> str:
        return f"| `{self.fault}` | {self.reads()} | {self.writes()} | {self.afterwards()} | {self.messages()} |"

    def reads(self) -> str:
        ended = [line.split()[1] for line in self.out if line.startswith("read")]
        if not self.node:
            return "no disk"
        if len(ended) < 4:
            return f"{4 - len(ended)} of 4 readers hang"
        if any(status != "0" for status in ended):
            return f"{sum(status != '0' for status in ended)} of 4 readers get an error"
        right = hashlib.sha256(self.data[: 64 * 4096]).hexdigest()
        return "right" if any(line.split()[1:2] == [right] for line in self.out) else "**wrong data, no error**"

    def writes(self) -> str:
        ended = [line.split()[1] for line in self.out if line.startswith("write")]
        if not ended:
            return "-" if not self.node or "hang" in self.reads() else "hangs"
        if ended != ["0"]:
            return "an error"
        stored = self.memory.data[512 * 4096 : 544 * 4096]
        return "right" if stored == DATA else "**lost, no error**"

    def afterwards(self) -> str:
        """Whether the disk works once the fault is off."""
        if not self.node:
            return "-"
        return {"again 0": "works", "": "hangs"}.get(self.again, "errors")

    def messages(self) -> str:
        """What the kernel said about it: each kind of line once."""
        found: dict[str, str] = {}
        for line in self.log.splitlines():
            text = line.strip()
            if self.virtio and re.search(rf"\b({self.node}|{self.virtio})\b", text) and not re.search(BOOT, text):
                text = text.replace(self.node, "vdX").replace(self.virtio, "virtioN")
                found.setdefault(re.sub(r"\d+", "N", text), text)
        return "<br>".join(f"`{text}`" for text in list(found.values())[:2]) or "nothing"


BOOT = "logical blocks|default/read/poll queues"
"""What the driver says of every disk when it finds it."""
DATA = bytes(32 * 4096)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/faults.md")
    parser.add_argument("--seconds", type=float, default=20, help="how long I/O may take before it counts as hung")
    parser.add_argument(
        "--kernel", metavar="VERSION", help="as `uname -r` says it; unless given the newest cloud kernel"
    )
    parser.add_argument("--root", type=Path, default=Path("/"), help="where its boot and lib/modules are")
    args = parser.parse_args()
    try:
        kernel = find_kernel(args.kernel, args.root)
    except ConfigError as error:
        parser.error(str(error))
    trials = [Trial(fault) for fault in [*AT_BOOT, *RUNNING]]
    calls = [Call(fault, number) for number, fault in enumerate(fault_net.FAULTS)]
    alone = [Call(fault, len(calls) + number) for number, fault in enumerate(fault_net.ALONE)]
    version = run(kernel, trials, calls, args.seconds)
    for call in alone:
        run_alone(kernel, call, args.seconds)
    calls += alone
    text = table(trials, calls, version)
    print(text)
    if args.write:
        write(text, version)
    return 0


def write(text: str, version: str) -> None:
    """Put the tables in the place of those of the same kernel, or behind all others."""
    begin = f"<!-- Linux {'.'.join(version.split('.')[:2])}, written by tools/fault_report.py -->"
    before, found, rest = PAGE.read_text().partition(begin)
    after = rest.partition(END)[2] if found else "\n"
    gap = "" if found else "\n"
    PAGE.write_text(f"{before}{gap}{begin}\n{text}\n{END}{after}")


def run(kernel: InstalledKernel, trials: list[Trial], calls: list[Call], seconds: float) -> str:
    """Let all of it happen in one guest; return the kernel's version."""
    for trial in trials[: len(AT_BOOT)]:
        trial.switch_on()
    modules = ("virtio_pci", "virtio_blk", "virtio_net")
    functions = FUNCTIONS + fault_net.FUNCTIONS
    with LinuxGuest(kernel=kernel, functions=functions, modules=modules, append="loglevel=1") as guest:
        for number, trial in enumerate(trials):
            guest.plug(trial.blk, f"disk{number}")
        for call in calls:
            guest.plug(call.net, f"net{call.number}")
        say("booting")
        guest.boot()
        find_nodes(guest, trials, calls)
        guest.run("mkdir -p /tmp; dd if=/dev/zero of=/etc/data bs=4k count=32 2>/dev/null")
        try_disks(guest, trials, seconds)
        try_cards(guest, calls, seconds)
        log = guest.run("said")
        for trial in trials:
            trial.log = log
        for call in calls:
            call.log = log
        return guest.run("uname -r")


def run_alone(kernel: InstalledKernel, call: Call, seconds: float) -> None:
    """One card in a guest that may not survive it: then its last words are what the kernel says."""
    functions = FUNCTIONS + fault_net.FUNCTIONS
    with LinuxGuest(kernel=kernel, functions=functions, modules=("virtio_pci", "virtio_net")) as guest:
        guest.plug(call.net, f"net{call.number}")
        say(f"booting for {call.fault}")
        guest.boot()
        find_cards(guest, [call])
        guest.run("mkdir -p /tmp; dmesg -n 1")
        try:
            try_cards(guest, [call], seconds)
            call.log = guest.run("said", timeout=30)
        except GuestFailed as error:
            last = re.sub(r"^\[ *[0-9.]+\] ", "", str(error).splitlines()[-1])
            call.log = f"{call.node} was the last: {last}"


def try_disks(guest: LinuxGuest, trials: list[Trial], seconds: float) -> None:
    for trial in trials[len(AT_BOOT) :]:
        trial.switch_on()
    for trial in trials:
        if trial.node:
            guest.run(f"try {trial.node}")
    say("reading and writing")
    settle(guest, [trial.node for trial in trials], "out", "write", seconds)
    for trial in trials:
        trial.out = output(guest, trial.node, "out").splitlines()
        trial.blk.faults.clear()
        if trial.node:
            guest.run(f"again {trial.node}")
    settle(guest, [trial.node for trial in trials], "again", "again", seconds / 2)
    for trial in trials:
        trial.again = output(guest, trial.node, "again")


def try_cards(guest: LinuxGuest, calls: list[Call], seconds: float) -> None:
    for call in calls:
        call.switch_on(SEED)
        guest.run(f"call {call.node} {call.number}", timeout=45)
    say("calling")
    settle(guest, [call.node for call in calls], "out", ".*transmitted", seconds)
    for call in calls:
        call.out = output(guest, call.node, "out")
        call.net.faults.clear()
        guest.run(f"recall {call.node} {call.number}", timeout=45)
    settle(guest, [call.node for call in calls], "again", ".*transmitted", seconds)
    for call in calls:
        call.again = output(guest, call.node, "again")


def output(guest: LinuxGuest, node: str, suffix: str) -> str:
    return guest.run(f"cat /tmp/{node}.{suffix}", timeout=45).strip() if node else ""


def say(what: str) -> None:
    print(f"fault report: {what}", file=sys.stderr, flush=True)


def find_nodes(guest: LinuxGuest, trials: list[Trial], calls: list[Call]) -> None:
    """Which is which: disks are told apart by their serial numbers, cards by their addresses."""
    disks = {serial: (node, virtio) for node, serial, virtio in map(str.split, guest.run("nodes").splitlines())}
    for trial in trials:
        trial.node, trial.virtio = disks.get(trial.fault.partition("@")[0][:20], ("", ""))
    find_cards(guest, calls)


def find_cards(guest: LinuxGuest, calls: list[Call]) -> None:
    cards = {mac: (node, virtio) for node, mac, virtio in map(str.split, guest.run("cards").splitlines())}
    for call in calls:
        call.node, call.virtio = cards[call.mac]


def settle(guest: LinuxGuest, nodes: list[str], suffix: str, last: str, seconds: float) -> None:
    """Until each has come to its end, or has had its time."""
    waiting = list(filter(None, nodes))
    deadline = time.monotonic() + seconds
    while waiting and time.monotonic() < deadline:
        time.sleep(1)
        ended = guest.run(f"grep -l '^{last}' /tmp/*.{suffix} || true", timeout=45).split()
        waiting = [node for node in waiting if f"/tmp/{node}.{suffix}" not in ended]


def table(trials: list[Trial], calls: list[Call], version: str) -> str:
    disks = [
        f"Linux {version}, `virtio_blk`; seed {SEED}:",
        "",
        "| fault | reads | writes | once it is off | the kernel says |",
        "|---|---|---|---|---|",
        *(trial.row() for trial in trials),
    ]
    return "\n".join([*disks, "", f"Linux {version}, `virtio_net`, the same guest:", "", *fault_net.table(calls)])


if __name__ == "__main__":
    sys.exit(main())
