"""Userspace virtio for KVM, programmable in Python."""
