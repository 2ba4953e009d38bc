"""Our network cards and DPDK's in turn."""

import shutil
from pathlib import Path

import pytest

from pyvirtio.bench import compare
from pyvirtio.bench.frames import FrameLoad
from pyvirtio.bench.net_contest import NETWORKS, TESTPMD, NetContest
from pyvirtio.bench.servers import NATIVE, PYTHON
from pyvirtio.errors import ConfigError

pytestmark = pytest.mark.skipif(not shutil.which(TESTPMD), reason=f"{TESTPMD} is not installed (package dpdk-dev)")


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_server_does_every_load(tmp_path: Path, network: str, packed: bool) -> None:
    direction, _ = NETWORKS[network]
    verify = network == "echo"  # a source of DPDK sends frames of its own kind
    contest = NetContest(network, FrameLoad(direction, packed=packed, verify=verify), (64,))
    results = list(compare.run([contest], TESTPMD, rounds=1, seconds=0.02, directory=tmp_path))
    assert [r.server for r in results] == [TESTPMD, *([] if network == "source" else [NATIVE]), PYTHON]
    for result in results:
        sample = result.sample
        assert (sample.tx_frames > 0, sample.rx_frames > 0) == (direction != "rx", direction != "tx")
        assert sample.cpu is not None
        if verify:
            assert (sample.reordered, sample.damaged, sample.foreign) == (0, 0, 0)


def test_queue_pairs_are_served_by_dpdk_as_well(tmp_path: Path) -> None:
    contest = NetContest("echo", FrameLoad("both", num_queues=2, verify=True), (1500,))
    for result in compare.run([contest], TESTPMD, rounds=1, seconds=0.02, directory=tmp_path):
        assert result.sample.rx_frames > 0
        assert (result.sample.reordered, result.sample.damaged) == (0, 0)


def test_dpdk_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    contest = NetContest("sink", FrameLoad(), (64,))
    with pytest.raises(ConfigError, match=r"dpdk-testpmd is not installed \(Debian: dpdk-dev\)"):
        list(compare.run([contest], TESTPMD, 1, 0.01, tmp_path))
