"""Whose fault it was decides what happens: one exception per culprit.

An `OSError` is the host's fault and is passed on unchanged; anything else that is not listed here is a defect of
ours or of a user's device: it is logged with its traceback and the device asks for a reset.
"""


class ConfigError(Exception):
    """The user asked for something that cannot be built: one line on the terminal, exit status 2."""


class GuestError(Exception):
    """The guest broke the rules of virtio: its device goes to DEVICE_NEEDS_RESET, the VM goes on."""


class ProtocolError(Exception):
    """A vhost-user or vfio-user peer broke the protocol: its connection closes, the server goes on."""


class StaleChain(Exception):
    """A chain was touched after the reset of its device: the work it was for no longer exists."""
