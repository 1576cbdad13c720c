"""Registries: things with names, in an order, each once; what is built in, and what others add.

Forms, rules, normalise passes, baselines and clusters are kept in one each. Modules above fill them (``passes/``, and
`descompiler.plugins`), so that what asks for a form by its name need not import all forms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, overload

from descompiler.errors import PlanError

BUILT_IN = "descompiler"
"""The origin of what comes with this package."""


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


class Registry(Sequence[T]):
    """Things of one kind by their names, in the order in which they were added.

    Parameters
    ----------
    kind : str
        What one is called in messages: "form".
    items : iterable
        Built-in ones.
    reserved : mapping of str to str
        Names that none may have, as they mean another.

    Attributes
    ----------
    discover : callable, optional
        Adds what is installed; called when a name is asked for that is not there.

    Examples
    --------
    >>> from types import SimpleNamespace as Thing
    >>> things = Registry("thing", [Thing(name="a")])
    >>> things.add(Thing(name="b"), "their-package")
    >>> things.names
    ('a', 'b')
    >>> things.named("b").name, things.origin("b")
    ('b', 'their-package')
    """

    def __init__(self, kind: str, items: Iterable[T] = (), reserved: Mapping[str, str] | None = None):
        self.kind, self.reserved = kind, reserved or {}
        self._items: dict[str, tuple[T, str]] = {}
        self.discover: Callable[[], object] | None = None
        for item in items:
            self.add(item)

    def add(self, item: T, origin: str = BUILT_IN) -> None:
        """Add one; nothing happens if it, or one equal to it, is there already.

        Raises
        ------
        PlanError
            If another has its name, or had it: both are named, and where they come from.
        """
        if item.name in self.reserved:
            raise PlanError(
                f"{type(item).__name__} of {origin} is named {item.name!r}, which means the {self.kind} "
                f"{self.reserved[item.name]!r}; rename it"
            )
        there, whose = self._items.setdefault(item.name, (item, origin))
        if there is not item and there != item:
            raise PlanError(
                f"two {self.kind}s are named {item.name!r}: {type(there).__name__} of {whose} and "
                f"{type(item).__name__} of {origin}; rename one"
            )

    def replace(self, item: T, origin: str) -> None:
        """Add one, in place of that which has its name."""
        self._items[item.name] = (item, origin)

    def named(self, name: str) -> T:
        """The one with a name.

        Raises
        ------
        PlanError
            If there is none.
        """
        if name not in self._items and self.discover is not None:
            self.discover()
        if name not in self._items:
            raise PlanError(f"no {self.kind} {name!r}; the {self.kind}s are {', '.join(self._items)}")
        return self._items[name][0]

    def origin(self, name: str) -> str:
        """The distribution that added one."""
        return self._items[name][1]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        return tuple(item for item, _ in self._items.values())[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return (item for item, _ in tuple(self._items.values()))

    def __repr__(self) -> str:
        return f"<{len(self)} {self.kind}s: {', '.join(self._items)}>"
