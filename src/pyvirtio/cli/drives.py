"""`--drive`: disks in files, on servers, or in a class of the user's."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pyvirtio.backends.block import BlockBackend, File
from pyvirtio.backends.formats import foreign_format
from pyvirtio.cli.classes import Catalogue, make
from pyvirtio.cli.options import parse, print_properties, print_table, take, take_id, wants_help
from pyvirtio.errors import ConfigError
from pyvirtio.properties import bind, canonical, properties_of, unknown
from pyvirtio.spec import SECTOR

FILE = "file"
BACKENDS = {
    "memory": "pyvirtio.backends.block:Memory",
    "null": "pyvirtio.backends.block:Null",
    "nbd": "pyvirtio.backends.nbd:Nbd",
    "nbdkit": "pyvirtio.backends.nbdkit:Nbdkit",
    "fsspec": "pyvirtio.backends.fileobj:Url",
}
"""What `driver=` names besides `file`, which is the default."""
CATALOGUE = Catalogue("--drive", "driver", BlockBackend, BACKENDS, "pyvirtio.backends")
COMMON = ["id", "if", "driver"]


@dataclass
class Drive:
    """One `--drive`. `used_by` is the name of its device."""

    id: str
    backend: BlockBackend
    on_its_own: bool
    used_by: str | None = None
    option: ClassVar[str] = "drive"


def show_help(texts: Iterable[str]) -> bool:
    """Print the tables that `--drive help` and `--drive driver=NAME,help` ask for; whether there were any."""
    asked = False
    for text in texts:
        options = parse(text)
        if wants_help(options):
            asked = True
            _print_help(options.get("driver"))
    return asked


def _print_help(driver: str | None) -> None:
    if driver in (None, FILE, "help"):
        print("--drive file=PATH[,format=raw][,readonly=on|off][,locking=on|off][,cache=...][,aio=...]")
        print("file=nbd:... is an NBD server.")
        print("Or driver=NAME with the driver's properties. With each: [,id=ID][,if=virtio|none].\n")
        print_table("driver=", ("name", "what it is"), [(FILE, "a raw image or a block device"), *CATALOGUE.rows()])
    else:
        print_properties(f"--drive driver={driver}", properties_of(CATALOGUE.find(driver)))


def open_drives(texts: list[str], on_close: Callable[[Callable[[], object]], object]) -> dict[str, Drive]:
    """The drives by id; `on_close` is told how to close each."""
    drives: dict[str, Drive] = {}
    for text in texts:
        drive = _open_drive(parse(text), drives)
        on_close(drive.backend.close)
        drives[drive.id] = drive
    return drives


def _open_drive(options: dict[str, str], drives: dict[str, Drive]) -> Drive:
    name = take_id(options, drives, "--drive", otherwise=f"drive{len(drives)}")
    interface = options.pop("if", "virtio")
    if interface not in ("virtio", "none"):
        raise ConfigError(f"{name}: if={interface} is not allowed: virtio or none")
    driver = options.pop("driver", FILE)
    if driver == FILE and options.get("file", "").startswith(("nbd:", "nbd+unix:")):
        driver, options["uri"] = "nbd", options.pop("file")
    backend = _open_file(options, name) if driver == FILE else _open_backend(driver, options, name)
    return Drive(name, backend, on_its_own=interface == "virtio")


def _open_file(options: dict[str, str], name: str) -> File:
    path = take(options, "file", name)
    image_format = options.pop("format", None)
    if image_format not in (None, "raw"):
        raise ConfigError(f"{name}: format={image_format} is not supported: raw")
    readonly, locking = _switch(options, "readonly", "off", name), _switch(options, "locking", "on", name)
    cache, aio = options.pop("cache", "writeback"), options.pop("aio", "auto")
    if options:
        known = ["file", *COMMON, "format", "readonly", "locking", "cache", "aio"]
        raise ConfigError(unknown(name, "property", next(iter(options)), known))
    if image_format is None and (foreign := foreign_format(_first_sector(Path(path)))):
        raise ConfigError(f"{path}: a {foreign} image, and only raw ones are served; --drive ...,format=raw insists")
    return File(Path(path), readonly=readonly, cache=cache, aio=aio, locking=locking)


def _first_sector(path: Path) -> bytes:
    """Nothing if it cannot be read: `File` says why."""
    if not (path.is_file() or path.is_block_device()):
        return b""
    try:
        with path.open("rb") as file:
            return file.read(SECTOR)
    except OSError:
        return b""


def _switch(options: dict[str, str], key: str, default: str, name: str) -> bool:
    value = options.pop(key, default)
    if value not in ("on", "off"):
        raise ConfigError(f"{name}: {key}={value} is not allowed: on or off")
    return value == "on"


def _open_backend(driver: str, options: dict[str, str], name: str) -> BlockBackend:
    cls = CATALOGUE.find(driver)
    arguments = _arguments(cls, options, name)
    backend: BlockBackend = make(cls, arguments, name)
    _check(backend, name)
    return backend


def _arguments(cls: type, options: dict[str, str], name: str) -> dict[str, Any]:
    """What `cls` is called with. A class with `**keywords` gets those it does not declare as text, with `_` for `-`."""
    init: Any = cls.__init__  # type: ignore[misc]
    own = {canonical(p.parameter) for p in properties_of(cls)}
    more: dict[str, str] = {}
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(init).parameters.values()):
        more = {key.replace("-", "_"): options.pop(key) for key in list(options) if canonical(key) not in own}
    return {**bind(cls, options, name), **more}


def _check(backend: BlockBackend, name: str) -> None:
    """What every disk has to have, said in the name of its class."""
    who = f"{name}: {type(backend).__name__}"
    capacity = getattr(backend, "capacity", None)
    if not isinstance(capacity, int) or capacity < SECTOR or capacity % SECTOR:
        raise ConfigError(f"{who}.capacity is {capacity!r}; it has to be a multiple of {SECTOR} bytes, at least one")
    if backend.native() is None and not backend.offers("pread", "preadv"):
        raise ConfigError(f"{who} defines neither pread(length, offset) nor preadv(buffers, offset)")
