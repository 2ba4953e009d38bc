"""Files that options name to be written."""

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self


class Outputs:
    """A context manager: what was made for them goes again when it is left, unless all went well until they are `kept`.

    In a rehearsal no file is changed.
    """

    def __init__(self, *, rehearsal: bool = False) -> None:
        self._rehearsal = rehearsal
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def kept(self) -> None:
        """What was made so far stays."""
        self._undo.pop_all()

    def path(self, path: Path) -> Path:
        """What to open in place of `path`, next."""
        if not os.path.lexists(path):
            self._undo.callback(_remove, path)
        elif self._rehearsal and path.is_file() and os.access(path, os.W_OK):
            return Path(os.devnull)
        return path


def _remove(path: Path) -> None:
    with suppress(OSError):  # it could not be made
        path.unlink()
