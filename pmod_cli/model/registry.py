"""The doors of the model: names of retention schedules and of selections, built in, registered, or from other packages.

Nothing here needs torch: names can be listed and checked without loading what they stand for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


class BadPlugin(Exception):
    """What another package brings cannot be used: it fails, is of another kind, or has a name that is taken."""


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """While code of another package runs: what goes wrong is said of that package.

    Raises:
        BadPlugin: Something was raised, or the code wanted to end the program.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        raise BadPlugin(f"{what} cannot be used ({type(error).__name__}: {error})") from error


def guarded(function: Any, what: str, result: Callable[[Any], Any]) -> Any:
    """A function of another package that runs as `foreign`, and what it returns as `result` makes it."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        with foreign(what):
            return result(function(*arguments))

    return call


class Registry:
    """Names and what they stand for.

    A name comes from a call of `register`, from a file of the room `package` that is called like it (and registers it
    when it is imported), or from an entry point of the installed packages, looked at in this order.

    Args:
        what: What a name stands for, as errors call it.
        group: Group of entry points; each stands for an object that `register` would take.
        take: From what an entry point brings, and what to call it, to what its name stands for. It raises whatever it
            likes at something of another kind.
        package: Folder beside this file whose modules are called like what they register; None if there is none.
    """

    def __init__(self, what: str, group: str, take: Callable[[Any, str], Any], package: str | None = None) -> None:
        self.what, self.group, self.take, self.package = what, group, take, package
        self._known: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator that makes a function or class known under `name`, and returns it as it is.

        Raises:
            ValueError: The name is taken.
        """

        def add(entry: Any) -> Any:
            if name in self._known or (name in self.built_in() and not _is_ours(entry)):
                raise ValueError(f"there is a {self.what} called {name!r} already")
            self._known[name] = entry
            return entry

        return add

    def unregister(self, name: str) -> None:
        """Forgets a name that `register` added."""
        del self._known[name]

    def names(self) -> list[str]:
        """Every name, those of installed packages last.

        Raises:
            BadPlugin: A package has a name that is taken.
        """
        return list(dict.fromkeys([*self.built_in(), *self._known, *_entry_points(self)]))

    def is_built_in(self, name: str) -> bool:
        """Whether the model itself has it, and no other package.

        Raises:
            ValueError: Nothing has this name.
            BadPlugin: As for an item.
        """
        return _is_ours(self[name])

    def built_in(self) -> tuple[str, ...]:
        """Names of the modules of `package`."""
        return _modules(self.package) if self.package else ()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.names()  # whatever a file holds can be asked for

    def __getitem__(self, name: str) -> Any:
        """What a name stands for, imported if need be.

        Raises:
            ValueError: Nothing has this name.
            BadPlugin: The package that has it cannot be imported, or has something of another kind there.
        """
        if name not in self:
            raise ValueError(f"unknown {self.what} {name!r:.80}: expected one of {', '.join(self)}")
        if name not in self._known:
            if name in self.built_in():
                import_module(f"{__package__}.{self.package}.{name}")
            else:
                self._known[name] = self._load(_entry_points(self)[name])
        return self._known[name]

    def _load(self, point: EntryPoint) -> Any:
        what = f"the {self.what} {point.name!r} of {_package_of(point)}"
        with foreign(what):
            return self.take(point.load(), what)


def _is_ours(entry: Any) -> bool:
    return getattr(entry, "__module__", "").startswith(f"{__package__}.")


@cache
def _modules(package: str) -> tuple[str, ...]:
    """Names of a folder's modules; of none where the model is one generated file."""
    return tuple(sorted(file.stem for file in (_FOLDER / package).glob("[!_]*.py")))


def _package_of(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module


@cache
def _entry_points(registry: Registry) -> dict[str, EntryPoint]:
    """What packages bring, as of the first look-up."""
    found: dict[str, EntryPoint] = {}
    owners = dict.fromkeys([*registry.built_in(), *registry._known], "pmod")
    for point in entry_points(group=registry.group):
        name, package = point.name, _package_of(point)
        if name in owners:
            raise BadPlugin(f"there are two of the {registry.what} {name!r}, of {owners[name]} and of {package}")
        owners[name], found[name] = package, point
    return found


def _take_selection(entry: Any, what: str) -> Any:
    if not hasattr(entry(seed=0), "order"):
        raise TypeError(f"expected a subclass of Selection, found {entry!r:.60}")
    return entry


SELECTIONS = Registry("selection", "pmod_cli.selections", _take_selection, "selections")
