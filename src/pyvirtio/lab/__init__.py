"""A machine with a hardware-like `/dev/kvm` on hosts that have none, from Debian packages.

QEMU emulates (TCG) a CPU with AMD SVM; a Debian kernel in it loads kvm-amd and offers the ordinary KVM. The
host's root file system is shared into it, so a command runs there as it would here, only 20 to 100 times
slower.
"""

from pyvirtio.lab.kernel import find_kernel
from pyvirtio.lab.machine import Lab

__all__ = ["Lab", "find_kernel"]
