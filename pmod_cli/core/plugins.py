"""Named things that a package from outside can add to: by a call, or by an entry point of its own distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from pmod_cli.core.errors import PmodError

T = TypeVar("T")


class PluginRegistry(Generic[T]):
    """A table from names to things. Entry points are read at the first look-up, not at import.

    Args:
        what: One of the things, in words, for messages: `decoder`.
        group: Entry point group. Each of its entry points names an object that `add` takes.
    """

    def __init__(self, what: str, group: str, name_of: Callable[[T], str] = lambda item: item.name) -> None:  # type: ignore[attr-defined]
        self.what = what
        self.group = group
        self._name_of = name_of
        self._items: dict[str, T] = {}
        self._followers: list[Callable[[T], object]] = []
        self._complete = False

    def add(self, item: T) -> T:
        """Register a thing under its name; the same thing again does nothing.

        Raises:
            PmodError: Another thing has this name.
        """
        name = self._name_of(item)
        known = self._items.setdefault(name, item)
        if known is not item:
            raise PmodError(f"there are two of the {self.what} {name!r}", hint="give one of them another name")
        for follower in self._followers:
            follower(item)
        return item

    def follow(self, follower: Callable[[T], object]) -> None:
        """Call `follower` with each thing, those that are here now and those that come later."""
        for item in self.values():
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
            self._complete = True
            from importlib.metadata import entry_points

            for entry in entry_points(group=self.group):
                try:
                    self.add(entry.load())
                except Exception as error:
                    raise PmodError(
                        f"the entry point {entry.name} of {self.group} ({entry.value}) cannot be used: "
                        f"{type(error).__name__}: {error}",
                        hint="update or remove the package that it comes from",
                    ) from error
        return self._items
