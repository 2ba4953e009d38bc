"""`--lint` on the command line: what the lint finds is in the log."""

from pathlib import Path

import pytest

from pyvirtio.testing.ring import WRITE, Desc
from pyvirtio.testing.serving import serve_in_child
from pyvirtio.testing.vhost_user import FrontEnd

FOUND = "rng0: driver: requestq: descriptor flags 0x12 (virtio 1.3, 2.7.5)"


@pytest.mark.parametrize("options", [["--lint"], []], ids=["with", "without"])
def test_a_served_device_is_watched_if_asked_for(
    tmp_path: Path, options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with serve_in_child("rng", tmp_path / "s", *options), FrontEnd(tmp_path / "s") as front_end:
        front_end.start()
        vq = front_end.requestq
        vq.ring.write_desc(0, Desc(0x8000, 16, WRITE | 0x10))
        vq.ring.offer(0)
        vq.kick()
        front_end.stop_ring(vq)
    assert (FOUND in capfd.readouterr().err) is bool(options)
