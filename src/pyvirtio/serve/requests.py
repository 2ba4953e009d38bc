"""Which method of a session answers which request."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pyvirtio.serve.wire import Message, Reply, Request

Handle = Callable[[Any, Message], Reply | None]
"""Called with the session."""
Method = TypeVar("Method", bound=Handle)


class Refused(Exception):
    """The request cannot be granted; the session goes on, and the front-end is told if it asked to be."""


@dataclass(frozen=True)
class Known:
    handle: Handle
    fds: range


REQUESTS: dict[Request, Known] = {}


def handles(request: Request, fds: range = range(1)) -> Callable[[Method], Method]:
    """Make a method the answer to a request, which brings as many file descriptors as `fds` contains.

    It returns None where the protocol knows no reply but an acknowledgement.
    """

    def declare(method: Method) -> Method:
        REQUESTS[request] = Known(method, fds)
        return method

    return declare
