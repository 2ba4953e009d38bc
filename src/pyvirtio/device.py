"""What a user subclasses: a device is a class, and each of its virtqueues is a method.

A device declares its queues, features and configuration space and writes only behaviour; it sees no eventfd, no
interrupt, no lock and no transport.
"""

import inspect
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from ctypes import BigEndianStructure, LittleEndianStructure, sizeof
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from pyvirtio._core import BlkPlane, IoThread, NetPlane, VirtQueue
from pyvirtio.errors import ConfigError
from pyvirtio.properties import check_arguments

if TYPE_CHECKING:
    from pyvirtio.faults.engine import Faults, Running

Handler = Callable[[VirtQueue], object] | BlkPlane | NetPlane
Method = TypeVar("Method", bound=Callable[..., Any])

DECORATORS = {"fd": "@poll", "seconds": "@every"}
MAX_SECONDS = 1 << 32
MAX_CONFIG = 4096
"""Bytes of configuration space that a transport has room for."""


@dataclass(frozen=True)
class Queue:
    """One virtqueue of a device: its name in the specification, its largest size, and what serves it."""

    name: str
    size: int
    handler: Handler


@dataclass(frozen=True)
class _Declared:
    """What `@queue` was given. A string is the name of the device's attribute that holds the number."""

    size: int | str
    count: int | str
    native: bool

    def of(self, device: object, name: str, method: Callable[..., Any]) -> Iterator[Queue]:
        who = f"{type(device).__name__}.{name}"
        count, size = _number(device, self.count, who), _number(device, self.size, who)
        handler = method() if self.native else method
        for index in range(count):
            yield Queue(name if count == 1 else f"{name}{index}", size, handler)


def _number(device: object, value: int | str, who: str) -> int:
    if not isinstance(value, str):
        return value
    number = getattr(device, value, None)
    if not isinstance(number, int):
        raise ConfigError(f"{who}: @queue names the attribute {value!r}, which is {number!r}; it has to be an integer")
    return number


def queue(size: int | str = 256, *, count: int | str = 1, native: bool = False) -> Callable[[Method], Method]:
    """Make a method the handler of a virtqueue; the order of the methods gives the queue indexes.

    The method runs once for each wake-up, on the device's I/O thread (on the vCPU thread while ioeventfd is off),
    never twice at once for one queue. `size` is the largest ring the driver may set up, `count` makes several
    queues with one handler; either may name an attribute. A `native` method does not serve the queue: it
    returns the plane of the core that does.
    """
    if callable(size):
        raise TypeError(f"{size.__qualname__}: write @queue() with parentheses")

    def declare(method: Method) -> Method:
        _check_call(method, "(self)" if native else "(self, vq)")
        method._queue = _Declared(size, count, native)  # type: ignore[attr-defined]
        return method

    return declare


def _check_call(method: Callable[..., Any], called: str) -> None:
    signature = inspect.signature(method)
    if len(signature.parameters) != called.count(",") + 1:
        raise TypeError(f"{method.__qualname__}{signature}: this handler is called as {called}")


@dataclass(frozen=True)
class Event:
    """A method of a device that runs when `fd` is readable, or every so many `seconds`; `name` is for messages."""

    name: str
    method: Callable[[], object]
    fd: int | None = None
    seconds: float | None = None


def poll(fd: str | int) -> Callable[[Method], Method]:
    """Make a method run on the device's I/O thread whenever a file descriptor is readable, while a driver is up.

    `fd` names the attribute that holds it, a number or anything with a `fileno()`. The method must not block, and is
    called again while there is something to read. An exception breaks the device.
    """
    return _waits_for("fd", fd)


def every(seconds: str | float) -> Callable[[Method], Method]:
    """Make a method run on the device's I/O thread every so many seconds, while a driver is up.

    `seconds` may name the attribute that holds the number. A round that comes too late is left out. What `poll` says
    of the method holds.
    """
    return _waits_for("seconds", seconds)


def _waits_for(key: str, value: Any) -> Callable[[Method], Method]:
    """The decorator, which refuses what can be neither such a value nor the name of an attribute."""
    if inspect.isfunction(value):
        raise TypeError(f"{value.__qualname__}: write {DECORATORS[key]}({key}) with parentheses")

    def declare(method: Method) -> Method:
        _check_call(method, "(self)")
        if not (value.isidentifier() if isinstance(value, str) else KINDS[key][0](value)):
            rule = f"write {KINDS[key][1]}, or the name of the attribute that holds it"
            raise TypeError(f"{method.__qualname__}: {DECORATORS[key]}({value!r}): {rule}")
        method._event = {key: value}  # type: ignore[attr-defined]
        return method

    return declare


def _is_period(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 < value < MAX_SECONDS


def _is_fd(value: Any) -> bool:
    fd = value.fileno() if hasattr(value, "fileno") else value
    return isinstance(fd, int) and fd >= 0


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "fd": (_is_fd, "a file descriptor or what has a fileno()"),
    "seconds": (_is_period, "a number of seconds above 0"),
}
"""What a method can wait for: whether a value is that, and what it is called."""


def check_events(device: object) -> None:
    """`ConfigError` for what cannot be waited for; an attribute that is None is left until the driver is up."""
    for name, given in _marked(type(device), "_event").items():
        ((key, value),) = given.items()
        if isinstance(value, str) and not hasattr(device, value):
            who, rule = f"{type(device).__name__}.{name}", "set it in __init__, to None where it comes later"
            raise ConfigError(f"{who}: {DECORATORS[key]}({value!r}) names an attribute that is not there; {rule}")
        if not isinstance(value, str) or getattr(device, value) is not None:
            _event(device, name, given)


def events_of(device: object) -> list[Event]:
    """What the methods of a device wait for besides the queues; `ConfigError` for what cannot be waited for."""
    return [_event(device, name, given) for name, given in _marked(type(device), "_event").items()]


def _marked(cls: type, mark: str) -> dict[str, Any]:
    """What a decorator left at the methods of a class and its bases, by name."""
    bases = reversed(cls.__mro__)
    return {name: getattr(m, mark) for base in bases for name, m in vars(base).items() if hasattr(m, mark)}


def _event(device: object, name: str, given: dict[str, Any]) -> Event:
    ((key, value),) = given.items()
    who = f"{type(device).__name__}.{name}"
    found = getattr(device, value, None) if isinstance(value, str) else value
    is_one, what = KINDS[key]
    if found is None or not is_one(found):
        raise ConfigError(f"{who}: {DECORATORS[key]}({value!r}) is {found!r}; it has to be {what}")
    method = getattr(device, name)
    if key == "seconds":
        return Event(who, method, seconds=found)
    return Event(who, method, fd=found if isinstance(found, int) else found.fileno())


class Device:
    """A virtio device: what it is called, what it offers, and how it serves its queues.

    Class arguments: `id` is the device type (virtio 1.3, 5), `config` the layout of its configuration space, a
    packed `ctypes.LittleEndianStructure`. Override `activate` and `reset` to follow the driver.
    """

    id: ClassVar[int] = 0
    pci_class: ClassVar[int] = 0x00FF00
    """PCI class code: base class, subclass and programming interface."""
    ioeventfd: ClassVar[bool] = False
    """Default of the `ioeventfd` property: off, because some drivers notify and then spin until they are served."""
    queues_per_iothread: ClassVar[int] = 1
    """How many queues stay together where `iothread_vq_mapping` deals them out to several I/O threads."""
    config_layout: ClassVar[type[LittleEndianStructure] | None] = None

    name: str = "device"
    """What messages call the device; set when it is plugged."""
    device_features: int = 0
    """The feature bits of the device type that are offered; the transport adds its own."""
    vhost: Sequence[tuple[int, int]] = ()
    """For each pair of queues that the kernel may serve, from the first on: the fds of a `/dev/vhost-net` and a tap.

    The device may shorten it, and tell `vhost_changed`.
    """
    vhost_poll_us: int = 0
    """How long the kernel looks for more buffers of a queue before it sleeps."""

    vhost_changed: Callable[[], object]
    config: Any
    """The configuration space: an instance of the layout, or None."""
    loops: Sequence[IoThread] = ()
    """The loop of the I/O thread of each queue; set when the device is plugged."""
    config_generation: int
    config_changed: Callable[[], object]
    active_faults: "Faults | None" = None
    """`faults`, once it has been asked for; None costs nothing."""
    _config_lock: Lock
    watcher: "Callable[[Running], object] | None" = None
    """Told where the device runs whenever that is new; the lint sets it."""
    _runs_on: "Callable[[], Running | None]" = staticmethod(lambda: None)

    def __init_subclass__(
        cls, *, id: int | None = None, config: type[LittleEndianStructure] | None = None, **rest: Any
    ) -> None:
        super().__init_subclass__(**rest)
        if id is not None:
            cls.id = int(id)
        if config is not None:
            _check_layout(cls.__name__, config)
            cls.config_layout = config

    def __new__(cls, *args: Any, **keywords: Any) -> Self:
        # Not in __init__: a subclass need not call it.
        check_arguments(cls, args, keywords)
        self = super().__new__(cls)
        self.config = cls.config_layout() if cls.config_layout else None
        self.config_generation = 0
        self.config_changed = self.vhost_changed = lambda: None
        self._config_lock = Lock()
        return self

    @property
    def queues(self) -> list[Queue]:
        """The virtqueues, in the order in which the class and its bases declare them."""
        declared = _marked(type(self), "_queue")
        return [q for name, d in declared.items() for q in d.of(self, name, getattr(self, name))]

    @property
    def faults(self) -> "Faults":
        """What goes wrong on purpose, switchable at any time, also before it is plugged: see `pyvirtio.faults`."""
        if self.active_faults is None:
            from pyvirtio.faults.engine import Faults

            self.active_faults = Faults()
            if running := self._runs_on():
                self.active_faults.attach(running)
        return self.active_faults

    def attach(self, running: "Running") -> None:
        """Its transport says where the device runs from now on; `detach` follows."""
        self._runs_on = weakref.ref(running)
        if self.watcher is not None:
            self.watcher(running)
        if self.active_faults is not None:
            self.active_faults.attach(running)

    def detach(self) -> None:
        self._runs_on = lambda: None
        if self.active_faults is not None:
            self.active_faults.detach()

    def served_by(self, queue: Queue, index: int, features: int) -> Handler:
        """What serves one of `queues`; override it where a feature gives a queue another meaning."""
        return queue.handler

    @contextmanager
    def update_config(self) -> Iterator[Any]:
        """Change the configuration in one step; the driver sees all of it or nothing, and is told once."""
        with self._config_lock:
            config = type(self.config).from_buffer_copy(self.config)
            yield config
            self.config = config
            self.config_generation = (self.config_generation + 1) % 256
        self.config_changed()

    def config_bytes(self) -> bytes:
        """The configuration space as the driver reads it. Any thread; never blocks."""
        return bytes(self.config) if self.config is not None else b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote `data` at `offset`; most devices have nothing that a driver may change."""

    def activate(self, features: int) -> None:
        """DRIVER_OK was set and `features` are agreed; the queues are served once this returns."""

    def serves(self, queues: Container[int]) -> None:
        """These of the queues are served from now on; told where a vhost-user front-end has them come and go."""

    def reset(self) -> None:
        """The driver reset the device, or it was unplugged: no queue is served any more."""

    def save(self) -> dict[str, Any]:
        """What `restore` needs in another process: numbers, text, bytes, None, lists of them, and dicts by text.

        Override it as `{**super().save(), "mine": ...}`: the configuration is in it already; features, rings and
        interrupts are the transport's business. No queue is served meanwhile.
        """
        return {"config": self.config_bytes()}

    def restore(self, state: dict[str, Any]) -> None:
        """Become what `save` was called on; `activate` follows if a driver was up. `ConfigError` if that cannot be."""
        if self.config is not None:
            self.config = type(self.config).from_buffer_copy(state["config"])

    def close(self) -> None:
        """Release what the device holds of the host; called once, after the last `reset`."""


STORABLE = "numbers, text, bytes, None, lists of them, and dicts of them by text"


def is_storable(value: object) -> bool:
    """Whether a snapshot can hold what `save` returned."""
    if isinstance(value, dict):
        texts = all(isinstance(key, str) and is_storable(each) for key, each in value.items())
        return texts and value.keys() != {"hex"}  # that is how bytes are written
    if isinstance(value, (list, tuple)):
        return all(map(is_storable, value))
    return value is None or isinstance(value, (int, float, str, bytes, bytearray))


def _check_layout(device: str, layout: type[LittleEndianStructure]) -> None:
    """`TypeError` for what cannot be the layout of a configuration space (virtio 1.3, 2.5)."""
    # Where it is the host's own order, LittleEndianStructure is Structure, the base of both.
    structure = isinstance(layout, type) and issubclass(layout, LittleEndianStructure)
    if not structure or issubclass(layout, BigEndianStructure):
        raise TypeError(f"{device}: config={layout!r}: the layout is a subclass of ctypes.LittleEndianStructure")
    fields: Sequence[tuple[Any, ...]] = layout._fields_
    padded = sizeof(layout) != sum(sizeof(field[1]) for field in fields)
    if padded and getattr(layout, "_pack_", None) != 1:
        raise TypeError(f"{device}: config={layout.__name__}: set _pack_ = 1, there is no padding in virtio")
    if sizeof(layout) > MAX_CONFIG:
        raise TypeError(f"{device}: config={layout.__name__} has {sizeof(layout)} bytes, at most {MAX_CONFIG} fit")
