"""Whose fault it was decides what happens: one exception per culprit.

An `OSError` is the host's fault and is passed on unchanged; anything else that is not listed here is a defect of
ours or of a user's device: it is logged with its traceback and the device asks for a reset.
"""

import os
import traceback
from pathlib import Path

OURS = str(Path(__file__).parent) + os.sep


class ConfigError(Exception):
    """The user asked for something that cannot be built: one line on the terminal, exit status 2."""


class GuestError(Exception):
    """The guest broke the rules of virtio: its device goes to DEVICE_NEEDS_RESET, the VM goes on."""


class ProtocolError(Exception):
    """A vhost-user or vfio-user peer broke the protocol: its connection closes, the server goes on."""


class StaleChain(Exception):
    """A chain was touched after the reset of its device: the work it was for no longer exists."""


def raised(error: BaseException) -> str:
    """What an exception of a user's code is, in one line: `Thermometer.__init__ raised KeyError: 'x' (mine.py:7)`.

    Named is what we called, and the line that it had come to in that file.
    """
    said = f"{type(error).__name__}: {error}"
    trace = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    theirs = [(code, line) for code, line in trace if not code.co_filename.startswith((OURS, "<frozen"))]
    if not theirs:
        return said
    called = theirs[0][0]
    line = next(line for code, line in reversed(theirs) if code.co_filename == called.co_filename)
    who = called.co_qualname.rpartition("<locals>.")[2]
    return f"{'' if who == '<module>' else f'{who} raised '}{said} ({Path(called.co_filename).name}:{line})"
