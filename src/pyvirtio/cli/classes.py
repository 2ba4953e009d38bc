"""The classes that an option can name: those of a table, of installed packages, and `FILE.py:CLASS` of a user."""

import errno
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pyvirtio.errors import ConfigError, raised
from pyvirtio.properties import unknown

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@dataclass(frozen=True)
class Catalogue:
    """The classes of one kind: subclasses of `base`. Installed packages add theirs as entry points of `group`."""

    option: str
    what: str
    base: type
    names: Mapping[str, str]
    """Name -> `module:Class`."""
    group: str

    def find(self, name: str) -> type[Any]:
        """The class behind a name. `ConfigError`, in one line, for everything that can be wrong with it."""
        module, _, attribute = name.rpartition(":")
        if module:
            return self._class_of(_load(module), attribute, name)
        if name in self.names:
            module, _, attribute = self.names[name].rpartition(":")
            found: type = getattr(importlib.import_module(module), attribute)
            return found
        installed = self._installed()
        if name not in installed:
            known = [*self.names, *installed, "FILE.py:CLASS"]
            raise ConfigError(unknown(self.option, self.what, name, known))
        return self._load_installed(name, installed[name])

    def rows(self) -> Iterator[tuple[str, str]]:
        """Each name with the purpose of its class, or with what is wrong with it."""
        for name in [*self.names, *self._installed()]:
            try:
                yield name, (self.find(name).__doc__ or "").strip().partition("\n")[0]
            except ConfigError as error:
                yield name, str(error)
        yield "FILE.py:CLASS", f"a {self.what} class of your own, also as module:CLASS"

    def _installed(self) -> dict[str, list["EntryPoint"]]:
        """The entry points by name; more than one for a name is a clash. Ours come before all others."""
        from importlib.metadata import entry_points  # takes longer than all the rest

        found: dict[str, list[EntryPoint]] = {}
        for point in sorted(entry_points(group=self.group), key=_source):
            if point.name not in self.names:
                found.setdefault(point.name, []).append(point)
        return found

    def _load_installed(self, name: str, points: list["EntryPoint"]) -> type:
        sources = [_source(point) for point in points]
        if len(points) > 1:
            raise ConfigError(f"{self.option}: {name} is offered by {' and by '.join(sources)}; uninstall one")
        try:
            found = points[0].load()
        except (Exception, SystemExit) as error:  # whatever the package raises while it is imported
            raise ConfigError(f"{name} of {sources[0]}: {type(error).__name__}: {error}") from error
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise ConfigError(f"{name} of {sources[0]}: {points[0].value} is no {self.base.__name__}")
        return found

    def _class_of(self, module: ModuleType, attribute: str, name: str) -> type:
        found = getattr(module, attribute, None)
        if isinstance(found, type) and issubclass(found, self.base):
            return found
        there = [key for key, value in vars(module).items() if self._is_of(value, module)]
        raise ConfigError(unknown(name.rpartition(":")[0], f"{self.what} class", attribute, there))

    def _is_of(self, value: object, module: ModuleType) -> bool:
        return isinstance(value, type) and issubclass(value, self.base) and value.__module__ == module.__name__


def _source(point: "EntryPoint") -> str:
    """The package that an entry point comes from."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"


def _load(source: str) -> ModuleType:
    try:
        return _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except (OSError, ImportError) as error:
        raise ConfigError(f"{source}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever a user's file raises while it is executed
        raise ConfigError(f"{source}: {raised(error)}") from error


def make(cls: type[Any], arguments: Mapping[str, object], who: str) -> Any:
    """An instance of a class that may be a user's. `ConfigError`, in one line, for whatever its `__init__` raises."""
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{who}: {error}") from error
    except Exception as error:
        said = raised(error)
        raise ConfigError(f"{who}: {said if cls.__name__ in said else f'{cls.__name__}: {said}'}") from error


def _load_file(path: Path) -> ModuleType:
    if not path.exists():
        raise ConfigError(os.strerror(errno.ENOENT))
    name = f"pyvirtio_device_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
