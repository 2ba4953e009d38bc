"""Linux under QEMU (TCG) drives network cards that `pyvirtio serve net` serves, over `-netdev vhost-user`."""

import hashlib
import re
import shutil
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import qemu
from own_network import ip, own_network
from qemu import QEMU
from serving import programs

pytestmark = pytest.mark.skipif(not shutil.which(QEMU), reason=f"{QEMU} is not installed")

CARD = """
echo "packed $(cut -c35 /sys/class/net/eth0/device/features)"
echo "queues $(ls /sys/class/net/eth0/queues | xargs)"
ifconfig eth0 10.0.0.1 up
"""
CABLE = """
unshare -n sleep 1000 &
other=$!
sleep 0.2
ip link set eth1 netns $other
there() { nsenter -t $other -n "$@"; }
there ifconfig eth1 10.0.0.2 up
ping -c 5 -i 0.2 -s 1400 10.0.0.2
for file in here there; do head -c 3000000 /dev/urandom >/$file; done
there nc -l -p 7 </there >/got_there &
listener=$!
until there netstat -lnt | grep -q :7; do sleep 0.1; done
nc 10.0.0.2 7 </here >/got_here
wait $listener
for file in here got_there there got_here; do echo "$file $(sha256sum </$file)"; done
poweroff -f
"""


def sums(printed: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+) ([0-9a-f]{64})", printed))


@pytest.mark.parametrize("packed", ["off", "on"], ids=["split", "packed"])
def test_files_cross_a_cable_between_two_cards_both_ways(tmp_path: Path, packed: str) -> None:
    """The second card is in a network namespace of its own, so that the frames have to take the cable."""
    devices = [option for n in "ab" for option in ("--device", f"net,netdev={n},packed={packed},socket-path={n}")]
    cards = [option for n in "ab" for option in qemu.vhost_user_net(n, tmp_path / n, f"packed={packed}")]
    with programs(tmp_path) as start:
        start("--netdev", "pair,id=a", "--netdev", "pair,id=b,peer=a", *devices)
        machine = qemu.linux(tmp_path, CARD + CABLE, *cards, modules=("virtio_net",))
        printed = qemu.run(machine, tmp_path).decode(errors="replace")
    assert f"packed {int(packed == 'on')}" in printed, printed
    assert "5 packets transmitted, 5 packets received" in printed, printed
    files = sums(printed)
    assert len(set(files.values())) == 2, printed
    assert files["here"] == files["got_there"], printed
    assert files["there"] == files["got_here"], printed


FLOWS = 4
ECHO = f"""
for n in $(seq {FLOWS}); do head -c 1000000 /dev/urandom >/file$n; done
for n in $(seq {FLOWS}); do taskset $((1 + n % 2)) nc 10.0.0.2 7 </file$n >/echo$n & done
wait
for n in $(seq {FLOWS}); do for file in file$n echo$n; do echo "$file $(sha256sum </$file)"; done; done
poweroff -f
"""


class Echo(socketserver.BaseRequestHandler):
    """Sends back what it gets, once that has ended; notes the checksum."""

    heard: list[str]

    def handle(self) -> None:
        with self.request.makefile("rb") as file:
            data = file.read()
        self.heard.append(hashlib.sha256(data).hexdigest())
        self.request.sendall(data)


@contextmanager
def echo() -> Iterator[list[str]]:
    """Serves port 7 of the network; the list is of the checksums of what came."""
    Echo.heard = []
    with socketserver.ThreadingTCPServer(("10.0.0.2", 7), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Echo.heard
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("packed", ["off", "on"], ids=["split", "packed"])
@own_network
def test_the_host_echoes_flows_of_two_queue_pairs(tmp_path: Path, packed: str) -> None:
    """Two flows from each of two CPUs, which have a transmit queue each."""
    rings = f"packed={packed}"
    card = qemu.vhost_user_net("n", tmp_path / "s", "mq=on", rings, queues=2)
    with programs(tmp_path) as start:
        start("--netdev", "tap,id=n,ifname=tap7,queues=2", f"net,netdev=n,{rings}", "--socket-path", "s")
        ip("addr add 10.0.0.2/24 dev tap7")
        ip("link set tap7 up")
        with echo() as heard:
            machine = qemu.linux(tmp_path, CARD + ECHO, *card, modules=("virtio_net",))
            printed = qemu.run(machine, tmp_path).decode(errors="replace")
    assert f"packed {int(packed == 'on')}" in printed, printed
    assert "queues rx-0 rx-1 tx-0 tx-1" in printed, printed
    files = sums(printed)
    assert sorted(heard) == sorted(files[f"file{n + 1}"] for n in range(FLOWS)), printed
    assert all(files[f"file{n + 1}"] == files[f"echo{n + 1}"] for n in range(FLOWS)), printed
