"""Named things that a package from outside can add to: by a call, or by an entry point of its own distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pmod_cli.core.errors import BAD_PACKAGE, PmodError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


class PluginRegistry(Generic[T]):
    """A table from names to things. Entry points are read at the first look-up, not at import.

    Args:
        what: One of the things, in words, for messages: `decoder`.
        group: Entry point group. Each of its entry points names an object that `add` takes.
        kind: Class of the things, which have a `name`.
    """

    def __init__(self, what: str, group: str, kind: type[T]) -> None:
        self.what = what
        self.group = group
        self.kind = kind
        self._items: dict[str, T] = {}
        self._entries: dict[str, EntryPoint] = {}  # of what came by one, by the name of the thing
        self._followers: list[Callable[[T], object]] = []
        self._complete = False

    def add(self, item: T) -> T:
        """Register a thing under its name; the same thing again does nothing.

        Raises:
            PmodError: It is of another kind, or another thing has this name.
        """
        if not isinstance(item, self.kind):
            raise PmodError(f"a {self.what} has to be a {self.kind.__name__}, found {item!r:.60}")
        name: str = item.name  # type: ignore[attr-defined]
        if name not in self._items:
            self._items[name] = item
            for follower in self._followers:
                follower(item)
        elif self._items[name] is not item:
            raise PmodError(f"there are two of the {self.what} {name!r}", hint="give one of them another name")
        return item

    def follow(self, follower: Callable[[T], object]) -> None:
        """Call `follower` with each thing, those that are here now and those that come later."""
        for name, item in list(self._all().items()):
            with self._blamed(self._entries.get(name)):
                follower(item)
        self._followers.append(follower)

    def __getitem__(self, name: object) -> T:
        """The thing of this name.

        Raises:
            PmodError: There is none, with the names that there are.
        """
        if (item := self.get(name)) is None:
            raise PmodError(f"the {self.what} {name!s:.60} is unknown: expected one of {', '.join(self)}")
        return item

    def get(self, name: object) -> T | None:
        """The thing of this name, or None. Whatever a file holds can be asked for, also what is no string."""
        return self._all().get(name) if isinstance(name, str) else None

    def __contains__(self, name: object) -> bool:
        return self.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._all()))

    def values(self) -> list[T]:
        """All things, in the order in which they came."""
        return list(self._all().values())

    def _all(self) -> dict[str, T]:
        if not self._complete:
            self._complete = True  # before the packages, which may look something up while they are loaded
            from importlib.metadata import entry_points

            for entry in entry_points(group=self.group):
                with self._blamed(entry):
                    item: Any = entry.load()
                    self._entries[self.add(item).name] = entry  # type: ignore[attr-defined]
        return self._items

    @contextmanager
    def _blamed(self, entry: EntryPoint | None) -> Iterator[None]:
        """What goes wrong inside is said of this entry point, and again at the next look-up."""
        try:
            yield
        except (Exception, SystemExit) as error:
            if entry is None:
                raise
            self._complete = False
            reason = error.what if isinstance(error, PmodError) else f"{type(error).__name__}: {error}"
            raise PmodError(
                f"the entry point {entry.name} of {self.group} ({entry.value}) cannot be used: {reason}",
                hint=BAD_PACKAGE,
            ) from error
