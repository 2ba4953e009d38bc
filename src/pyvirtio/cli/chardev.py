"""`--chardev`: the character devices that the ports of a console can name."""

from collections.abc import Callable

from pyvirtio.backends.chardev import CHARDEVS, Chardev, File
from pyvirtio.cli.options import parse, print_properties, print_table, take, take_id, wants_help
from pyvirtio.cli.outputs import Outputs
from pyvirtio.errors import ConfigError
from pyvirtio.properties import bind, properties_of, unknown

HELP = "where the bytes of a port go: socket, pty, stdio, file or null; `help` lists them, `NAME,help` its properties"


def show_help(texts: list[str]) -> bool:
    """Print the tables that the options ask for with `help`; whether there were any."""
    asked = [parse(text, implied="backend") for text in texts if wants_help(parse(text, implied="backend"))]
    for options in asked:
        kind = options.get("backend", "help")
        if kind in ("help", "?"):
            rows = [(name, (cls.__doc__ or "").partition("\n")[0]) for name, cls in CHARDEVS.items()]
            print_table("--chardev", ("name", "what it is"), rows)
        else:
            print_properties(f"--chardev {kind}", properties_of(_class_of(kind), ("name",)))
    return bool(asked)


def stdio_is_free(texts: list[str], serial: str) -> None:
    """`ConfigError` if two of the serial port and the character devices want standard input and output."""
    owner = "the serial port's; give --serial null or file:PATH" if serial == "stdio" else ""
    for options in (parse(text, implied="backend") for text in texts):
        if options.get("backend") == "stdio":
            name = options.get("id", "stdio")
            if owner:
                raise ConfigError(f"{name}: standard input and output are {owner}")
            owner = f"{name}'s"


def open_chardevs(
    texts: list[str], outputs: Outputs, on_close: Callable[[Callable[[], object]], object]
) -> dict[str, Chardev]:
    """The character devices by id; `on_close` is told how to close each."""
    chardevs: dict[str, Chardev] = {}
    for text in texts:
        options = parse(text, implied="backend")
        cls = _class_of(take(options, "backend", "--chardev"))
        name = take_id(options, chardevs, "--chardev")
        properties = bind(cls, options, name, given=("name",))
        if cls is File:
            properties["path"] = outputs.path(properties["path"])
        try:
            chardev = cls(name=name, **properties)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        on_close(chardev.close)
        chardevs[name] = chardev
    return chardevs


def _class_of(kind: str) -> type[Chardev]:
    if kind not in CHARDEVS:
        raise ConfigError(unknown("--chardev", "backend", kind, list(CHARDEVS)))
    return CHARDEVS[kind]
