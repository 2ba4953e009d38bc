"""A disk that is a plugin of nbdkit in Python, loaded unchanged (nbdkit-python-plugin(3), API_VERSION 2)."""

import errno
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar

from pyvirtio.backends.block import BlockBackend
from pyvirtio.errors import ConfigError
from pyvirtio.properties import parse_size
from pyvirtio.spec import SECTOR

API_VERSION = 2
Result = TypeVar("Result")

log = logging.getLogger("pyvirtio")


class _Offered(ModuleType):
    """The module `nbdkit` that a plugin imports."""

    THREAD_MODEL_SERIALIZE_CONNECTIONS, THREAD_MODEL_SERIALIZE_ALL_REQUESTS = 0, 1
    THREAD_MODEL_SERIALIZE_REQUESTS, THREAD_MODEL_PARALLEL = 2, 3
    FLAG_MAY_TRIM, FLAG_FUA, FLAG_REQ_ONE, FLAG_FAST_ZERO = 1, 2, 4, 8
    FUA_NONE, FUA_EMULATE, FUA_NATIVE = 0, 1, 2
    CACHE_NONE, CACHE_EMULATE, CACHE_NATIVE = 0, 1, 2
    EXTENT_HOLE, EXTENT_ZERO = 1, 2

    def __init__(self) -> None:
        super().__init__("nbdkit")
        self._error = threading.local()

    def set_error(self, code: int) -> None:
        """Which errno the exception that follows means."""
        self._error.code = code

    def taken_error(self) -> int | None:
        code: int | None = getattr(self._error, "code", None)
        self._error.code = None
        return code

    @staticmethod
    def debug(message: str) -> None:
        log.debug("nbdkit: %s", message)

    @staticmethod
    def export_name() -> str:
        return ""

    @staticmethod
    def parse_size(text: str) -> int:
        return parse_size(text.removesuffix("b").removesuffix("B"))

    @staticmethod
    def is_tls() -> bool:
        return False

    @staticmethod
    def shutdown() -> None:
        log.warning("nbdkit: the plugin asks for a shutdown, which is not its to decide here")

    disconnect = staticmethod(lambda force: None)


class Nbdkit(BlockBackend):
    """A Python plugin of nbdkit as a disk; further options go to its `config`. Its calls are made one at a time."""

    def __init__(
        self,
        plugin: Annotated[Path, "the plugin's Python file"],
        *,
        readonly: Annotated[bool, "open it to be read only"] = False,
        **config: str,
    ) -> None:
        self.path = plugin
        self._lock = threading.Lock()
        self._module = _load(Path(plugin))
        self._configure(config)
        for name in ("get_ready", "after_fork"):
            self._optional(name)
        self._handle = self._call("open", readonly)
        try:
            self._look(readonly)
        except BaseException:
            self.close()
            raise

    def _configure(self, config: dict[str, str]) -> None:
        if config and not hasattr(self._module, "config"):
            raise ConfigError(f"{self.path}: the plugin takes no option (given: {', '.join(config)})")
        for key, value in config.items():
            self._call("config", key, value)
        self._optional("config_complete")

    def _look(self, readonly: bool) -> None:
        """What the plugin can do; nbdkit's rule is that what it defines it can, unless it says no."""
        self.capacity = self._call("get_size", self._handle)
        if self.capacity < SECTOR or self.capacity % SECTOR:
            raise ConfigError(f"{self.path}: {self.capacity} bytes; a disk is whole sectors of {SECTOR} bytes")
        self._readonly = readonly or not self._can("can_write", "pwrite")
        for name, question, method in (
            ("flush", "can_flush", "flush"),
            ("discard", "can_trim", "trim"),
            ("write_zeroes", "can_zero", "zero"),
        ):
            if self._can(question, method):
                setattr(self, name, getattr(self, f"_{name}"))

    def _can(self, question: str, method: str) -> bool:
        if not hasattr(self._module, method):
            return False
        return not hasattr(self._module, question) or bool(self._call(question, self._handle))

    @property
    def readonly(self) -> bool:
        return self._readonly

    def preadv(self, buffers: list[memoryview], offset: int) -> None:
        for buffer in buffers:
            # A copy: a plugin may keep what it gets, or store something of another size.
            data = bytearray(len(buffer))
            self._answer("pread", data, offset)
            if len(data) != len(buffer):
                raise OSError(errno.EIO, f"{self.path}: pread made {len(data)} of {len(buffer)} bytes")
            buffer[:] = data
            offset += len(buffer)

    def pwrite(self, data: bytes, offset: int) -> None:
        self._answer("pwrite", data, offset)

    def _flush(self) -> None:
        self._answer("flush")

    def _discard(self, length: int, offset: int) -> None:
        self._answer("trim", length, offset)

    def _write_zeroes(self, length: int, offset: int) -> None:
        self._answer("zero", length, offset, flags=_nbdkit.FLAG_MAY_TRIM)

    def _answer(self, method: str, *arguments: object, flags: int = 0) -> None:
        """Let the plugin serve a request: whatever it raises fails that request only, as in nbdkit."""
        with self._lock:
            try:
                getattr(self._module, method)(self._handle, *arguments, flags)
            except Exception as error:
                code = _nbdkit.taken_error() or (error.errno if isinstance(error, OSError) else None) or errno.EIO
                if not isinstance(error, OSError):
                    log.exception("%s: exception in %s", self.path, method)
                raise OSError(code, os.strerror(code)) from error

    def _call(self, method: str, *arguments: object) -> Any:
        """Call what has to be there; `ConfigError` if it is not or fails."""
        found: Callable[..., Any] | None = getattr(self._module, method, None)
        if found is None:
            raise ConfigError(f"{self.path}: the plugin defines no {method}()")
        try:
            return found(*arguments)
        except Exception as error:
            raise ConfigError(f"{self.path}: {method}: {type(error).__name__}: {error}") from error

    def _optional(self, method: str) -> None:
        if hasattr(self._module, method):
            self._call(method)

    def close(self) -> None:
        module, self._module = self._module, ModuleType("closed")
        for name, arguments in (("close", (self._handle,)), ("cleanup", ()), ("unload", ())):
            method = getattr(module, name, None)
            if method is not None:
                try:
                    method(*arguments)
                except Exception:
                    log.exception("%s: exception in %s", self.path, name)


_nbdkit = _Offered()


def _load(path: Path) -> ModuleType:
    sys.modules["nbdkit"] = _nbdkit
    name = f"pyvirtio_nbdkit_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    version = getattr(module, "API_VERSION", 1)
    if version != API_VERSION:
        raise ConfigError(f"{path}: API_VERSION is {version}; only plugins with API_VERSION = {API_VERSION} are taken")
    return module
