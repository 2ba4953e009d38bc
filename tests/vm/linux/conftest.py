"""Tier D: Linux in our machine. `./test` runs this directory on the host's KVM, or in one start of the lab."""

import pytest

from pyvirtio.accel.host import linux_capable

UNFIT = linux_capable()


@pytest.fixture(autouse=True, scope="session")
def kvm_that_runs_linux() -> None:
    if UNFIT:
        pytest.skip(f"{UNFIT}: pyvirtio lab -- pytest tests/vm/linux")
