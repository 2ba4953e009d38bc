"""What a user may set on a device, a transport or an object: the parameters of its `__init__`.

    def __init__(self, num_queues: Annotated[int, "request queues", Range(1, 1024)] = 1) -> None: ...

declares the property `num-queues` with its type, default, meaning and range. Options, help, documentation and error
messages derive from it. A class with an attribute `named_by`, "a --drive", is referred to by its id. A parameter of
any other type than those of `_kind` (a callable, say) is no property.
"""

import difflib
import inspect
import os
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pyvirtio.errors import ConfigError

References = Mapping[type, Mapping[str, object]]
"""The objects that a value may name: class -> id -> object."""

UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


@dataclass(frozen=True)
class Range:
    """The smallest and the largest value allowed."""

    low: float
    high: float


class _InBytes:
    """Marks an `int` that is written with k, M, G, T suffixes."""


Size = Annotated[int, _InBytes()]
"""A number of bytes."""


@dataclass(frozen=True)
class Kind:
    """How values of one type are written. `parse` raises ValueError for what is not allowed."""

    name: str
    allowed: str
    parse: Callable[[str], object]
    accepts: Callable[[Any], bool]
    """Whether a value given in Python is one."""
    show: Callable[[Any], str] = str
    refers_to: type | None = None
    many: bool = False
    """Whether it is a sequence of what it refers to."""


@dataclass(frozen=True)
class Property:
    """One settable parameter. `name` is its canonical spelling, `parameter` the one of Python."""

    parameter: str
    kind: Kind
    default: object
    meaning: str
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", canonical(self.parameter))

    @property
    def type(self) -> str:
        return self.kind.name

    @property
    def allowed(self) -> str:
        return self.kind.allowed

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def default_text(self) -> str:
        """The default as a user would write it; "-" where there is no value by default."""
        if self.required:
            return "required"
        return "-" if self.default in (None, "", ()) else self.kind.show(self.default)

    def parse(self, text: str, who: str, references: References | None = None) -> object:
        """The value that `text` stands for. ConfigError names `who`, the value and what is allowed."""
        if self.kind.refers_to is not None:
            known = (references or {}).get(self.kind.refers_to, {})
            if self.kind.many:
                return [self._look_up(each, who, known) for each in text.split(":")]
            return self._look_up(text, who, known)
        try:
            return self.kind.parse(text)
        except ValueError:
            raise ConfigError(f"{who}: {self.name}={text} is not allowed: {self.allowed}") from None

    def check(self, value: object, who: str) -> None:
        """`ConfigError` for a value given in Python that is not allowed."""
        if not (value is None and self.default is None) and not self.kind.accepts(value):
            wanted = f"a {self.kind.refers_to.__name__}" if self.kind.refers_to else self.allowed
            raise ConfigError(f"{who}: {self.parameter}={value!r} is not allowed: {wanted}")

    def _look_up(self, text: str, who: str, objects: Mapping[str, object]) -> object:
        if text not in objects:
            known = ", ".join(objects) or "none"
            raise ConfigError(f"{who}: {self.name}={text} is not {self.allowed} (there are: {known})")
        return objects[text]


def canonical(name: str) -> str:
    """The spelling of an option: `addr__port` in Python is `addr.port`."""
    return name.replace("__", ".").replace("_", "-")


def properties_of(cls: type, given: Collection[str] = ()) -> list[Property]:
    """The properties of a class, in the order of its signature; not the parameters that the caller gives itself."""
    init: Any = cls.__init__  # type: ignore[misc]  # of this very class, not of an instance
    try:
        hints = get_type_hints(init, include_extras=True)
    except NameError as error:
        raise ConfigError(f"{cls.__name__}.__init__: cannot read its annotations: {error}") from None
    found = []
    for parameter in inspect.signature(init).parameters.values():
        collects = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.name in hints and parameter.name not in given and not collects:
            annotation, extras = _unwrap(hints[parameter.name])
            kind = _kind(annotation, extras)
            if kind is not None:
                meaning = next((extra for extra in extras if isinstance(extra, str)), "")
                found.append(Property(parameter.name, kind, parameter.default, meaning))
    return found


def check_arguments(cls: type, args: Sequence[object], keywords: Mapping[str, object]) -> None:
    """`ConfigError` if an argument for `cls` is no value of its property; other parameters are not looked at."""
    signature, properties = _of(cls)
    try:
        given = signature.bind(None, *args, **keywords).arguments
    except TypeError:
        return  # Python itself says what is wrong with the call
    for p in properties:
        if p.parameter in given:
            p.check(given[p.parameter], cls.__name__)


def _of(cls: type) -> tuple[inspect.Signature, list[Property]]:
    """The signature and the properties of a class, kept in the class itself."""
    if "_signature" not in vars(cls):
        init: Any = cls.__init__  # type: ignore[misc]
        try:
            properties = properties_of(cls)
        except ConfigError:
            properties = []  # its annotations cannot be read; that matters where options are parsed
        cls._signature = inspect.signature(init), properties  # type: ignore[attr-defined]
    found: tuple[inspect.Signature, list[Property]] = vars(cls)["_signature"]
    return found


def bind(
    cls: type,
    values: Mapping[str, str],
    who: str,
    references: References | None = None,
    given: Collection[str] = (),
) -> dict[str, Any]:
    """The arguments for `cls` that `values` describe; ConfigError in the name of `who`, the thing to be built."""
    return bind_each((cls,), values, who, references, given)[0]


def bind_each(
    classes: Iterable[type],
    values: Mapping[str, str],
    who: str,
    references: References | None = None,
    given: Collection[str] = (),
) -> list[dict[str, Any]]:
    """`bind` for several classes that share one set of options: a device and its transport."""
    tables = [{p.name: p for p in properties_of(cls, given)} for cls in classes]
    known = [name for table in tables for name in table]
    options = {canonical(key): text for key, text in values.items()}
    for key in options:
        if key not in known:
            raise ConfigError(unknown(who, "property", key, known))
    return [_bind_table(table, options, who, references) for table in tables]


def unknown(who: str, what: str, name: str, known: Sequence[str]) -> str:
    """The message for a name that does not exist: lists those that do, and the likely one."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return f"{who}: unknown {what} {name!r}{hint} (known: {', '.join(known) or 'none'})"


def parse_size(text: str, unit: str = "") -> int:
    """Bytes of "512", "64k", "1.5G"; `unit` is the suffix of a number without one. ValueError if it is no size."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmgt]?)", text, re.IGNORECASE)
    if match is None:
        raise ValueError(text)
    whole, _, fraction = str(match[1]).partition(".")
    shift = UNITS[str(match[2] or unit).lower()]
    scale: int = 10 ** len(fraction)
    size, rest = divmod(int(whole + fraction) << shift, scale)
    if rest:
        raise ValueError(text)
    return size


def show_size(size: int) -> str:
    """`size` with the largest suffix that keeps it whole: 65536 is "64k"."""
    for suffix in ("T", "G", "M", "k"):
        unit = 1 << UNITS[suffix.lower()]
        if size and size % unit == 0:
            return f"{size // unit}{suffix}"
    return str(size)


def _bind_table(
    table: Mapping[str, Property], options: Mapping[str, str], who: str, references: References | None
) -> dict[str, Any]:
    for name, p in table.items():
        if p.required and name not in options:
            raise ConfigError(f"{who}: {name} is required: {p.allowed}")
    return {p.parameter: p.parse(options[name], who, references) for name, p in table.items() if name in options}


def _unwrap(annotation: Any) -> tuple[Any, list[object]]:
    """The plain type inside `Annotated` and `| None`, and everything that was annotated."""
    extras: list[object] = []
    while True:
        origin, args = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            annotation, extras = args[0], [*args[1:], *extras]
        elif origin in (Union, types.UnionType) and len(args) == 2 and type(None) in args:
            annotation = args[0] if args[1] is type(None) else args[1]
        else:
            return annotation, extras


def _kind(annotation: Any, extras: Sequence[object]) -> Kind | None:
    limits = next((extra for extra in extras if isinstance(extra, Range)), None)
    if get_origin(annotation) is Literal:
        return _choice(tuple(str(arg) for arg in get_args(annotation)))
    if annotation is int and any(isinstance(extra, _InBytes) for extra in extras):
        return _number("size", "a size such as 512 or 64k", parse_size, show_size, limits)
    if annotation is int:
        return _number("integer", "an integer", _parse_int, str, limits)
    if annotation is float:
        return _number("number", "a number", float, "{:g}".format, limits or Range(float("-inf"), float("inf")))
    if get_origin(annotation) is Sequence and (option := getattr(get_args(annotation)[0], "named_by", None)):
        return _list_of(get_args(annotation)[0], option)
    if isinstance(annotation, type) and (option := getattr(annotation, "named_by", None)):
        return Kind("id", f"the id of {option}", str, lambda value: isinstance(value, annotation), refers_to=annotation)
    return SIMPLE.get(annotation) if isinstance(annotation, type) else None


def _list_of(cls: type, option: str) -> Kind:
    def accepts(value: Any) -> bool:
        return isinstance(value, Sequence) and all(isinstance(each, cls) for each in value)

    allowed = f"the id of {option}, or several with ':' in between"
    return Kind("ids", allowed, str, accepts, refers_to=cls, many=True)


def _number(
    name: str, allowed: str, parse: Callable[[str], float], show: Callable[[Any], str], limits: Range | None
) -> Kind:
    def within(text: str) -> float:
        value = parse(text)
        if limits is not None and not limits.low <= value <= limits.high:
            raise ValueError(text)
        return value

    if limits is not None and limits.high != float("inf"):
        allowed = f"{allowed}, {show(limits.low)} to {show(limits.high)}"

    def accepts(value: Any) -> bool:
        if not isinstance(value, int if name != "number" else (int, float)):
            return False
        return limits is None or limits.low <= value <= limits.high

    return Kind(name, allowed, within, accepts, show)


def _choice(choices: tuple[str, ...]) -> Kind:
    def one_of(text: str) -> str:
        return choices[choices.index(text)]

    return Kind("/".join(choices), " or ".join(choices), one_of, lambda value: str(value) in choices)


def _parse_int(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]+|0x[0-9a-fA-F]+", text):
        raise ValueError(text)
    return int(text, 16 if text.startswith("0x") else 10)


def _parse_bool(text: str) -> bool:
    words = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
    if text not in words:
        raise ValueError(text)
    return words[text]


def _parse_path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError(text)
    return Path(text)


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


SIMPLE = {
    bool: Kind("on/off", "on or off", _parse_bool, _is(bool), lambda value: "on" if value else "off"),
    str: Kind("text", "text", str, _is(str)),
    Path: Kind("path", "the path of a file", _parse_path, _is(str, os.PathLike)),
}
