"""The doors of the model: names of retention schedules and of selections, built in, registered, or from other packages.

Nothing here needs torch: names can be listed and checked without loading what they stand for.
"""

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


class Registry:
    """Names and what they stand for.

    A name comes from a call of `register`, from a file of the room `package` that is called like it (and registers it
    when it is imported), or from an entry point of the installed packages, looked at in this order.

    Args:
        what: What a name stands for, as errors call it.
        group: Group of entry points; each stands for an object that `register` would take.
        package: Folder beside this file whose modules are called like what they register; None if there is none.
    """

    def __init__(self, what: str, group: str, package: str | None = None) -> None:
        self.what, self.group, self.package = what, group, package
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
        """Every name, those of installed packages last."""
        return list(dict.fromkeys([*self.built_in(), *self._known, *_entry_points(self.group)]))

    def is_built_in(self, name: str) -> bool:
        """Whether the model itself has it, and no other package.

        Raises:
            ValueError: As for an item.
        """
        return _is_ours(self[name])

    def built_in(self) -> tuple[str, ...]:
        """Names of the modules of `package`."""
        return _modules(self.package) if self.package else ()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):  # whatever a file holds can be asked for
            return False
        return name in self._known or name in self.built_in() or name in _entry_points(self.group)

    def __getitem__(self, name: str) -> Any:
        """What a name stands for, imported if need be.

        Raises:
            ValueError: Nothing has this name, or the package that has it cannot be imported.
        """
        if name not in self:
            raise ValueError(f"unknown {self.what} {name!r:.80}: expected one of {', '.join(self)}")
        if name not in self._known:
            if name in self.built_in():
                import_module(f"{__package__}.{self.package}.{name}")
            else:
                self._known[name] = self._load(_entry_points(self.group)[name])
        return self._known[name]

    def _load(self, point: EntryPoint) -> Any:
        try:
            return point.load()
        except Exception as error:
            package = point.dist.name if point.dist is not None else point.module
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"the {self.what} {point.name!r} of {package} cannot be imported ({reason})") from error


def _is_ours(entry: Any) -> bool:
    return getattr(entry, "__module__", "").startswith(f"{__package__}.")


@cache
def _modules(package: str) -> tuple[str, ...]:
    """Names of a folder's modules; of none where the model is one generated file."""
    return tuple(sorted(file.stem for file in (_FOLDER / package).glob("[!_]*.py")))


@cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


SELECTIONS = Registry("selection", "pmod_cli.selections", "selections")
