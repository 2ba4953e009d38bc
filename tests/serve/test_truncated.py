"""A front-end that truncates the memory it shares harms nobody but itself."""

import os
from pathlib import Path

import pytest
from serving import programs

from pyvirtio.serve.wire import Request
from pyvirtio.testing.blk import Disk, Kind
from pyvirtio.testing.vhost_user import MIB, FrontEnd


@pytest.mark.parametrize("what", ["the rings", "the buffers"])
def test_the_process_lives_and_serves_the_next(tmp_path: Path, what: str) -> None:
    (tmp_path / "disk.img").write_bytes(b"d" * MIB)
    with programs(tmp_path) as start:
        server = start("blk", "--blk-file", "disk.img", "--socket-path", "s")
        with FrontEnd(tmp_path / "s") as vm:
            disk = Disk(vm.start())
            for _ in range(3):
                disk.submit(Kind.READ, room=[4096] * 8, kick=False)
            vm.requestq.publish()
            ((_, _, fd, _),) = vm.memory.regions
            os.ftruncate(fd, 0 if what == "the rings" else vm.requestq.ring.used + 4096)
            vm.requestq.notify()
            assert vm.get(Request.GET_QUEUE_NUM) == 1
            vm.stop_ring(vm.requestq)
        with FrontEnd(tmp_path / "s") as vm:
            assert Disk(vm.start()).read(0, 512) == b"d" * 512
        assert server.poll() is None
