"""The device names of `--device`: the name table, and `FILE.py:Class` or `module:Class` for a user's own."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from pyvirtio.cli.options import print_properties, print_table
from pyvirtio.device import Device
from pyvirtio.devices import DEVICES, load
from pyvirtio.errors import ConfigError
from pyvirtio.properties import Property, properties_of, unknown
from pyvirtio.transports.pci import VirtioPci

NAMES = {f"virtio-{short}-pci": short for short in DEVICES}
GIVEN = ("name", "device", "accel")
"""The parameters of `VirtioPci` that are not options: `id=` is the name."""
CHOSEN = ("iothread", "slot")
"""Those that the machine chooses unless it is told."""


def device_class(name: str, names: Mapping[str, str] = NAMES) -> type[Device]:
    """The class behind a name of `--device`. ConfigError, in one line, for everything that can be wrong with it.

    `names` are those of the table, each with its short name; on no bus that is its name.
    """
    module, _, attribute = name.rpartition(":")
    if module:
        return _class_of(_load(module), attribute, name)
    if name not in names:
        raise ConfigError(unknown("--device", "device", name, [*names, "FILE.py:CLASS"]))
    return load(names[name])


def device_properties(name: str) -> list[Property]:
    """What a device takes: its own properties, then those of its transport."""
    cls = device_class(name)
    own = {"ioeventfd": cls.ioeventfd}
    pci = [replace(p, default=own.get(p.parameter, p.default)) for p in transport_properties()]
    return [*properties_of(cls), *pci]


def transport_properties() -> list[Property]:
    found = properties_of(VirtioPci, GIVEN)
    return [replace(p, default=None) if p.parameter in CHOSEN else p for p in found]


def print_devices() -> None:
    rows = [(name, _purpose(load(short))) for name, short in NAMES.items()]
    rows.append(("FILE.py:CLASS", "a device class of your own, also as module:CLASS"))
    print_table("--device", ("name", "what it is"), rows)


def print_device(name: str) -> None:
    print_properties(f"--device {name}", device_properties(name))


def _purpose(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def _class_of(module: ModuleType, attribute: str, name: str) -> type[Device]:
    found = getattr(module, attribute, None)
    if isinstance(found, type) and issubclass(found, Device):
        return found
    there = [key for key, value in vars(module).items() if _is_device_of(value, module)]
    raise ConfigError(unknown(name.rpartition(":")[0], "device class", attribute, there))


def _is_device_of(value: object, module: ModuleType) -> bool:
    return isinstance(value, type) and issubclass(value, Device) and value.__module__ == module.__name__


def _load(source: str) -> ModuleType:
    try:
        return _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except (OSError, ImportError) as error:
        raise ConfigError(f"{source}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever a user's file raises while it is executed
        raise ConfigError(f"{source}: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> ModuleType:
    name = f"pyvirtio_device_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
