"""What tools/fault_report.py does to the network driver: a card for each fault, and a host that answers."""

import re
from dataclasses import dataclass, field

from pyvirtio.backends.net import NetBackend
from pyvirtio.devices.net import Net
from pyvirtio.faults import parse

FAULTS = [
    "late=20ms@20%", "reorder@30%", "lost@10%/transmitq", "lost@10%/receiveq", "short/receiveq",
    "length=4294967295/receiveq", "lost-interrupt@20%", "spurious", "needs-reset=20", "storm=200ms",
]  # fmt: skip
ALONE = ["duplicate@10%/receiveq", "duplicate@10%/transmitq"]
"""Each in a guest of its own, because not every guest survives them."""
ARP, IP, ICMP = b"\x08\x06", b"\x08\x00", 1
PINGS = 50

FUNCTIONS = f"""
# call NODE NUMBER: ask the host behind a card, again and again.
call() {{
    ip link set $1 up
    ip addr add 10.0.$2.1/24 dev $1
    ping -q -A -c {PINGS} -w 15 10.0.$2.2 >/tmp/$1.out 2>&1 &
}}
recall() {{ ping -q -A -c 5 -w 6 10.0.$2.2 >/tmp/$1.again 2>&1 & }}
cards() {{
    for d in /sys/class/net/*/device; do
        n=${{d%/device}}
        echo ${{n##*/}} $(cat $n/address) $(basename $(readlink $d))
    done
}}
"""


class Host(NetBackend):
    """Answers ARP and pings, whatever address they are for."""

    MAC = b"\x52\x54\x00\xff\xff\xff"

    def send(self, frame: bytes) -> None:
        destination, source, kind = frame[:6], frame[6:12], frame[12:14]
        if kind == ARP and frame[20:22] == b"\0\1":
            sender, wanted = frame[22:32], frame[38:42]
            answer = frame[14:20] + b"\0\2" + self.MAC + wanted + sender
            self.inject([source + self.MAC + ARP + answer])
        elif kind == IP and destination == self.MAC and frame[23] == ICMP and frame[34] == 8:
            checksum = int.from_bytes(frame[36:38]) + 0x0800
            checksum = (checksum & 0xFFFF) + (checksum >> 16)
            addresses = frame[30:34] + frame[26:30]
            icmp = b"\0" + frame[35:36] + checksum.to_bytes(2) + frame[38:]
            self.inject([source + self.MAC + frame[12:26] + addresses + icmp])


@dataclass
class Call:
    """One fault on one card, and what became of it."""

    fault: str
    number: int
    net: Net = field(init=False)
    node: str = ""
    virtio: str = ""
    log: str = ""
    out: str = ""
    again: str = ""

    def __post_init__(self) -> None:
        self.mac = f"52:54:00:00:01:{self.number:02x}"
        self.net = Net(Host(), mac=self.mac)

    def switch_on(self, seed: int) -> None:
        faults, _ = parse(self.fault)
        self.net.faults.add(*faults, seed=seed)

    def row(self) -> str:
        return f"| `{self.fault}` | {answered(self.out)} | {answered(self.again)} | {self.messages()} |"

    def messages(self) -> str:
        """What the kernel said about it: each kind of line once."""
        found: dict[str, str] = {}
        for line in map(str.strip, self.log.splitlines()):
            if self.node and re.search(rf"\b({self.node}|{self.virtio})\b", line) and "ADDRCONF" not in line:
                text = line.replace(self.node, "ethX").replace(self.virtio, "virtioN")
                found.setdefault(re.sub(r"\d+", "N", text), text)
        return "<br>".join(f"`{text}`" for text in list(found.values())[:2]) or "nothing"


def answered(out: str) -> str:
    """How many pings came back, as ping(8) counts them."""
    match = re.search(r"(\d+) packets transmitted, (\d+) packets received(?:, (\d+) duplicates)?", out)
    if match is None:
        return "-"
    return f"{match[2]} of {match[1]}" + (f", {match[3]} twice" if match[3] else "")


def table(calls: list[Call]) -> list[str]:
    head = ["| fault | pings answered | once it is off | the kernel says |", "|---|---|---|---|"]
    return [*head, *(call.row() for call in calls)]
