"""What this host's KVM is good for: any KVM runs freestanding guests, Linux needs a hardware one."""

import os
from pathlib import Path


def linux_capable(root: Path = Path("/")) -> str | None:
    """None if a stock Linux kernel boots in this host's KVM, else the reason why not, for a one-line message.

    A software KVM (kvm_pvm, or any on a CPU without SVM and VMX) has the whole ioeventfd and irqfd interface
    but emulates the guest's privileged instructions: firmware runs in it, Linux hangs. `root` is where
    `/dev`, `/proc` and `/sys` are.
    """
    device = root / "dev/kvm"
    if not device.exists():
        return "there is no /dev/kvm"
    if not os.access(device, os.R_OK | os.W_OK):
        return "/dev/kvm may not be opened by this user"
    if (root / "sys/module/kvm_pvm").exists():
        return "/dev/kvm is a software KVM (kvm_pvm)"
    if not _cpu_flags(root) & {"svm", "vmx"}:
        return "the CPU shows neither svm nor vmx: /dev/kvm is a software KVM"
    return None


def _cpu_flags(root: Path) -> set[str]:
    for line in (root / "proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return set()
