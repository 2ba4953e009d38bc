"""QEMU option strings, `virtio-blk-pci,drive=d0,num-queues=4`, and the tables that explain them."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence

from pyvirtio.errors import ConfigError
from pyvirtio.properties import Property, canonical


def parse(text: str, implied: str | None = None, repeatable: Container[str] = ()) -> dict[str, str]:
    """The keys and values of an option string; `-` and `_` in keys are alike.

    A first item without `=` is the value of the key `implied`, every other one means `=on`. A comma in a value is
    written twice. The values of a repeatable key are joined with commas.
    """
    options: dict[str, str] = {}
    for position, item in enumerate(_items(text)):
        key, equals, value = item.partition("=")
        if not equals:
            key, value = (implied, item) if implied and position == 0 else (item, "on")
        key = canonical(key)
        if not key:
            raise ConfigError(f"{text}: an empty key before {item!r}; write KEY=VALUE,KEY=VALUE")
        if key in options and key in repeatable:
            value = f"{options[key]},{value}"
        elif key in options:
            raise ConfigError(f"{text}: {key} is given twice")
        options[key] = value
    return options


def take(options: dict[str, str], key: str, who: str) -> str:
    """Remove and return an option that has to be there."""
    if not options.get(key):
        raise ConfigError(f"{who}: {key}= is required")
    return options.pop(key)


def take_id(options: dict[str, str], taken: Mapping[str, object], who: str, otherwise: str | None = None) -> str:
    """Remove and return `id`: a new one, and spelled so that messages and the monitor can name it."""
    name = options.pop("id", "") or otherwise
    if not name:
        raise ConfigError(f"{who}: id= is required")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name):
        raise ConfigError(f"{who}: id={name} is not allowed: a letter, then letters, digits, '-', '_' and '.'")
    if name in taken:
        raise ConfigError(f"{who}: id={name} is already in use")
    return name


def wants_help(options: Mapping[str, str]) -> bool:
    """Whether the string was `help`, `?` or ended in `,help`."""
    return "help" in options or any(value in ("help", "?") for value in list(options.values())[:1])


def print_properties(title: str, properties: list[Property]) -> None:
    """What can be set, with type, default and meaning, as a table on standard output."""
    rows = [(p.name, p.type, p.default_text, p.meaning or p.allowed) for p in properties]
    print_table(title, ("property", "type", "default", "meaning"), rows)


def print_table(title: str, columns: tuple[str, ...], rows: Iterable[Sequence[str]]) -> None:
    import rich.box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _items(text: str) -> list[str]:
    """Split at the commas, and turn each `,,` into one comma that splits nothing."""
    items = [""]
    for piece in re.findall(r",,|,|[^,]+", text):
        if piece == ",":
            items.append("")
        else:
            items[-1] += "," if piece == ",," else piece
    if items == [""]:
        raise ConfigError("an empty option; write KEY=VALUE,KEY=VALUE")
    return items
