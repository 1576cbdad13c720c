"""What modules keep as plain attributes: numbers, flags, tensors that are no parameters."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import getitem, is_
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descompiler.errors import UnsupportedError
from descompiler.model.inputs import adapt
from descompiler.model.inside import MISSING, PLAIN, Inside, Reading, numbers_inside, put_inside, value_at
from descompiler.model.kept import with_attributes

BARE = frozenset(vars(nn.Module()))


REGISTERED = ("_parameters", "_buffers", "_modules")


ANY = "*"
"""In the place of a name: whatever a module's class has."""


COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def held_values(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Plain attributes of all modules, known classes inside as pytree nodes: module, name, value."""
    for module in model.modules():
        for name, x in list(vars(module).items()):
            if name not in REGISTERED:
                holds_nothing = type(x) in PLAIN or (name in BARE and not x)  # as nearly all of them
                yield module, name, x if holds_nothing else pytree.tree_map(adapt, x)


def unregistered(model: nn.Module) -> list[str]:
    """Tensors that are trained by nobody who asks for ``parameters()``: those of lists, and other plain attributes.

    >>> module = nn.Linear(1, 1)
    >>> module.gates, module.all = [nn.Parameter(torch.zeros(1))], [module.weight]
    >>> unregistered(module)
    ['gates']
    """
    registered = {id(p) for p in model.parameters()}
    prefixes = {id(m): f"{n}." if n else "" for n, m in model.named_modules()}
    return [
        f"{prefixes[id(module)]}{name}"
        for module, name, nested in held_values(model)
        if any(
            isinstance(x, Tensor) and x.requires_grad and x.is_leaf and id(x) not in registered
            for x in pytree.tree_leaves(nested)
        )
    ]


def left_behind(model: nn.Module) -> list[str]:
    """Plain attributes in which forward left values with a history, as a loss to be added later is.

    >>> module = nn.Linear(1, 1)
    >>> module.auxiliary = module.weight.sum()
    >>> left_behind(module)
    ['auxiliary']
    """
    prefixes = {id(m): f"{n}." if n else "" for n, m in model.named_modules()}
    return [
        f"{prefixes[id(module)]}{name}"
        for module, name, nested in held_values(model)
        if any(isinstance(x, Tensor) and not x.is_leaf for x in pytree.tree_leaves(nested))
        # weight_norm and spectral_norm compute ``weight`` from parameters of such names in front of each forward
        and not any(p.startswith(f"{name}_") for p in module._parameters)
    ]


def held_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Tensors that are plain attributes themselves: module, name, tensor."""
    for module in model.modules():
        for name, x in vars(module).items():
            if isinstance(x, Tensor) and not isinstance(x, nn.Parameter):
                yield module, name, x


def copied(model: nn.Module) -> dict[int, Tensor]:
    """A memo for `copy.deepcopy`: copies of what it can't copy by itself.

    These are compressed matrices, and values that a forward computed and left behind (attention weights to look at, a
    weight under ``weight_norm``); their copies have no history. And parameters on which something was set.

    >>> import copy
    >>> module = nn.Linear(1, 1)
    >>> module.seen = [module.weight * 2]
    >>> copy.deepcopy(module, copied(module)).seen[0].requires_grad
    False
    """
    held = [x for _, _, nested in held_values(model) for x in pytree.tree_leaves(nested) if isinstance(x, Tensor)]
    parameters: dict[int, Tensor] = {}
    for p in model.parameters():
        if p.layout is not torch.strided:
            parameters[id(p)] = with_attributes(nn.Parameter(p.detach().clone(), p.requires_grad), p)
        elif vars(p):
            parameters[id(p)] = with_attributes(copy.deepcopy(p), p)
    return parameters | {
        id(x): x.detach().clone() for x in (*model.buffers(), *held) if x.layout in COMPRESSED or not x.is_leaf
    }


def copy_with(
    template: nn.Module, values: Mapping[str, Tensor], modules: Mapping[int, nn.Module] | None = None
) -> nn.Module:
    """A copy of the model with these values as parameters, wherever it keeps them.

    ``modules``: what it has in the place of some modules, by their ids.
    """
    memo: dict[int, Any] = {
        id(p): with_attributes(nn.Parameter(values[n], requires_grad=p.requires_grad), p)
        for n, p in template.named_parameters()
    }
    return copy.deepcopy(template, copied(template) | memo | dict(modules or {}))


Place = tuple[str, str]
"""The path of a module in its model, and the name of an attribute."""


def plain_attributes(model: nn.Module) -> dict[Place, Any]:
    """Attributes of all modules that are a number, a flag, text or None.

    >>> plain_attributes(nn.Sequential(nn.Dropout(0.5)))
    {('0', 'p'): 0.5, ('0', 'inplace'): False}
    """
    return {
        (path, name): x
        for path, module in model.named_modules()
        for name, x in vars(module).items()
        if name not in BARE and isinstance(x, PLAIN)
    }


def attributes_inside(model: nn.Module) -> dict[Place, Any]:
    """The same inside of what modules keep: dicts, lists, tuples, dataclasses, namespaces; not torch's private ones."""
    return {
        (path, name): x
        for path, module in model.named_modules()
        for attribute, held in vars(module).items()
        if attribute not in BARE
        and not isinstance(held, (*PLAIN, Tensor, nn.Module))
        and not (attribute.startswith("_") and type(module).__module__.startswith("torch."))
        for name, x in numbers_inside(attribute, held).items()
    }


def constant_attributes(model: nn.Module) -> dict[Place, Any]:
    """What else modules keep, and a graph holds as a constant: tensors that are no buffers, functions, arrays, others.

    >>> module = nn.Linear(1, 1)
    >>> module.shift, module.scale, module.act = torch.ones(1), 2.0, torch.tanh
    >>> constant_attributes(module)
    {('', 'shift'): tensor([1.]), ('', 'act'): <built-in method tanh of type object at ...>}
    """
    followed = {(path, name.steps[0]) for path, name in attributes_inside(model) if isinstance(name, Inside)}
    return {
        (path, name): x
        for path, module in model.named_modules()
        for name, x in vars(module).items()
        if name not in BARE
        and not isinstance(x, PLAIN)
        and (path, name) not in followed
        # torch's own private ones are made of parameters, and anew when these are moved
        and not (name.startswith("_") and type(module).__module__.startswith("torch."))
    }


def set_attributes(model: nn.Module, values: Mapping[Place, Any]) -> None:
    """Give plain attributes the values that `plain_attributes` has seen: forward may count in them."""
    for (path, name), x in values.items():
        held = vars(module := model.get_submodule(path))
        if isinstance(name, Inside):
            first, *keys = name.steps
            setattr(module, first, put_inside(held[first], keys, x))
        elif held.get(name) is not x:
            setattr(module, name, x)


@contextmanager
def reads_of(model: nn.Module, *, by_key: bool = True) -> Iterator[set[Place]]:
    """A set that gets the plain attributes which are read while the context lasts.

    Of a dict, it is what is inside of the keys that are read, if ``by_key``; of any other container all of it. What a
    module does not have itself, but its class, or nobody (``getattr(self, name, None)``), is among them: it may get it
    later. Modules are of a subclass of their class meanwhile; where that can't be made, all of a module's attributes
    count, and `ANY`.

    >>> import torch
    >>> layer = nn.Dropout(0.5)
    >>> with reads_of(layer) as reads:
    ...     _ = layer(torch.ones(2))
    >>> sorted(reads)
    [('', 'inplace'), ('', 'p')]
    """
    reads: set[Place] = set()
    watched: dict[str, dict[str, set[Place]]] = {path: {} for path, _ in model.named_modules()}
    for path, name in (*plain_attributes(model), *attributes_inside(model), *constant_attributes(model)):
        attribute = name.steps[0] if isinstance(name, Inside) else name
        watched.setdefault(path, {}).setdefault(attribute, set()).update({(path, name), (path, attribute)})
    dicts = _read_by_key(model, watched, reads) if by_key else []
    classes: list[tuple[nn.Module, type]] = []
    try:
        for path, names in watched.items():
            module = model.get_submodule(path)
            before = type(module)
            try:
                module.__class__ = _watching(before, path, names, reads)
            except TypeError:  # its class can't be derived from, or objects of it not changed
                reads.update(*names.values(), {(path, ANY)})
            else:
                classes.append((module, before))
        yield reads
    finally:
        for module, before in classes:
            module.__class__ = before
        for held, attribute, given in dicts:
            if isinstance(now := held.get(attribute), Reading):  # forward may have put another there
                given.clear()
                given.update(dict.items(now))
                held[attribute] = given


def _read_by_key(
    model: nn.Module, watched: dict[str, dict[str, set[Place]]], reads: set[Place]
) -> list[tuple[dict[str, Any], str, dict[Any, Any]]]:
    """Put what notes keys in the place of dicts, whose attributes are not watched then; returns what was where."""
    found: list[tuple[dict[str, Any], str, dict[Any, Any]]] = []
    readings: dict[int, Reading] = {}  # modules may share one
    places: dict[int, set[Place]] = {}
    for path, names in watched.items():
        held = vars(model.get_submodule(path))
        for attribute in [n for n in names if type(held[n]) is dict]:
            given = held[attribute]
            inside = places.setdefault(id(given), set())
            inside |= names.pop(attribute)
            if id(given) not in readings:

                def tell(key: Any, inside: set[Place] = inside) -> None:
                    numbers = {at for at in inside if isinstance(at[1], Inside)}
                    found = {at for at in numbers if key is None or at[1].steps[1] == key}  # type: ignore[attr-defined]
                    # what is there at all matters to who reads all of it, or a key that is not there
                    reads.update(found if found and key is not None else found | (inside - numbers))

                readings[id(given)] = Reading(given)
                readings[id(given)].tell = tell
            held[attribute] = readings[id(given)]
            found.append((held, attribute, given))
    return found


def _watching(cls: Any, path: str, names: Mapping[str, set[Place]], reads: set[Place]) -> Any:
    def read(self: Any, name: str) -> Any:
        if name in names:
            reads.update(names[name])
        elif not hasattr(nn.Module, name):  # torch's own are read in every call
            held = object.__getattribute__(self, "__dict__")
            if name not in held and all(name not in held[kind] for kind in REGISTERED):
                reads.add((path, name))
        return cls.__getattribute__(self, name)

    return type(cls)(cls.__name__, (cls,), {"__getattribute__": read, "__module__": cls.__module__})


def _version_of(x: Any) -> int:
    """How often a tensor was changed in place; of others nobody counts it, nor of those made in inference mode."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


class AttributeWatch:
    """Plain attributes of a model that may change, and with them what a graph of it should be.

    >>> layer = nn.Dropout(0.5)
    >>> watch = AttributeWatch(layer)
    >>> watch.add({("", "p")})
    True
    >>> watch.changes()
    ()
    >>> layer.p = 0.25
    >>> watch.changes()
    ((('', 'p'), 0.25),)
    """

    def __init__(self, model: nn.Module):
        self.model, self.before = model, plain_attributes(model) | attributes_inside(model)
        self._all: dict[Place, list[str]] = {}  # names of the numbers in each container
        for path, name in attributes_inside(model):
            if isinstance(name, Inside):
                self._all.setdefault((path, name.steps[0]), []).append(name)
        self._whole: list[tuple[dict[str, Any], Place]] = []  # containers among what is watched
        self._kept = {at: (x, _version_of(x)) for at, x in constant_attributes(model).items()}
        self._constants: list[tuple[dict[str, Any], Place]] = []  # of these, what is watched
        self.places: set[Place] = set()
        self._held: list[tuple[dict[str, Any], Place]] = []
        self.set_here: dict[Place, Any] = {}  # in the original's place: no graph depends on it
        self._dicts: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._inside: list[tuple[dict[str, Any], str]] = []
        self._known: set[Place] = set()
        self._latest: Collection[Place] = ()
        self._seen: list[Any] = []
        self._found: tuple[tuple[Place, Any], ...] | None = None  # of what was seen

        self._classes = {cls: _of_class(cls) for cls in {*map(type, model.modules())}}
        self._then = {path: frozenset(vars(module)) for path, module in model.named_modules()}
        self._asked: dict[str, set[str]] = {}  # by module, what only its class had, or nobody
        self._without: list[tuple[dict[str, Any], Place]] = []  # what is not there as long as no graph would be another
        self._unseen: list[tuple[dict[str, Any], str]] = []  # modules of classes that can't be watched
        self._shared: dict[tuple[type, str], Any] = {}  # of these, what classes had

    def begin_as(self, other: AttributeWatch) -> None:
        """Compare with what another, of an equal model, began with."""
        self.before, self._kept, self._all = other.before, other._kept, other._all
        self._classes, self._then = other._classes, other._then
        self.set_here = dict(other.set_here)
        self.add(other.places)

    def values(self) -> dict[Place, Any]:
        """Numbers, flags and text as they are now, whether forward reads them or not."""
        now = plain_attributes(self.model) | attributes_inside(self.model)
        return {at: x for at, x in now.items() if at in self.before}

    def add(self, places: Collection[Place]) -> bool:
        """Watch these too; whether any is new."""
        if places is self._latest or self._known.issuperset(places):  # every step asks
            self._latest = places
            return False
        others, self._latest = set(places) - self._known, places
        self._known |= others
        new = sorted(others & self.before.keys())
        self.places.update(new)
        self._held += [(vars(self.model.get_submodule(path)), (path, name)) for path, name in new]
        plain = [(held, name) for held, (_, name) in self._held if not isinstance(name, Inside)]
        self._dicts, self._names = [held for held, _ in plain], [name for _, name in plain]
        self._inside = [(held, name) for held, (_, name) in self._held if isinstance(name, Inside)]
        whole = sorted(others & self._all.keys())
        self._whole += [(vars(self.model.get_submodule(path)), (path, name)) for path, name in whole]
        constants = sorted(others & self._kept.keys())
        self._constants += [(vars(self.model.get_submodule(path)), (path, name)) for path, name in constants]
        for path, name in others - self.before.keys() - self._all.keys() - self._kept.keys():
            if not isinstance(name, Inside):
                self._ask(path, name)
        self._found = None
        return bool(others)

    def _ask(self, path: str, name: str) -> None:
        module = self.model.get_submodule(path)
        self._asked.setdefault(path, set()).add(name)
        if name == ANY:
            self._unseen.append((vars(module), path))
        else:
            self._without.append((vars(module), (path, name)))
        of_class = self._classes.get(type(module)) or _of_class(type(module))
        names = of_class.keys() if name == ANY else (name,)
        if not type(module).__module__.startswith("torch."):
            self._shared |= {(type(module), n): of_class.get(n, MISSING) for n in names}

    def asks(self, at: Place) -> bool:
        """Whether forward reads it where only its class has it, or nobody."""
        return at[1] in self._asked.get(at[0], ())

    def set(self, values: Sequence[tuple[Place, Any]]) -> None:
        """Set attributes as forward does in the original, of which no graph depends."""
        if values:
            set_attributes(self.model, dict(values))
        if new := {at: x for at, x in values if self.set_here.get(at, MISSING) is not x}:
            self.set_here |= new
            self._without = [(held, at) for held, at in self._without if at not in self.set_here]
            self._found = None

    def changes(self) -> tuple[tuple[Place, Any], ...]:
        """What has another value now.

        Raises
        ------
        UnsupportedError
            If an attribute is no number, flag or text any more, or a tensor among them is another one. If a module has
            one now that only its class had, or nobody, or its class has another.
        """
        for held, at in self._without:
            if at[1] in held and at not in self.set_here:
                self._refuse_new(at)
        for held, path in self._unseen:
            for name in held.keys() - self._then[path]:
                if hasattr(type(self.model.get_submodule(path)), name) and (path, name) not in self.set_here:
                    self._refuse_new((path, name))
        for (cls, name), before in self._shared.items():
            if (now := _in_class(cls, name)) is not before:
                raise UnsupportedError(
                    f"{cls.__name__}.{name}, which forward reads, {_was(before)} when the model was compiled, and "
                    f"{_was(now).replace('was', 'is')} now: compile the model again"
                )
        for held, at in self._constants:
            before, version = self._kept[at]
            if (held.get(at[1]) is not before or _version_of(before) != version) and at not in self.set_here:
                raise UnsupportedError(
                    f"{dotted(at)}, which forward reads, has changed since the model was compiled (a "
                    f"{type(before).__name__} then), whose graph holds it as a constant: let a tensor be a buffer "
                    "(register_buffer), of which a graph reads what it is, or compile the model again"
                )
        for held, at in self._whole:
            if at not in self.set_here and [*numbers_inside(at[1], held.get(at[1]))] != self._all[at]:
                raise UnsupportedError(
                    f"{dotted(at)}, which forward reads, held {', '.join(self._all[at])} when the model was compiled, "
                    "and holds others now: compile the model again"
                )
        try:  # a step asks more than once, and hundreds are watched: nearly always all are the same objects
            seen = [*map(getitem, self._dicts, self._names)]
            seen += [value_at(held, name) for held, name in self._inside]
        except KeyError:
            seen = []  # one is gone
        if self._found is None or not seen or not all(map(is_, seen, self._seen)):
            self._found, self._seen = self._compared(), seen
        return self._found

    def _refuse_new(self, at: Place) -> NoReturn:
        cls = type(self.model.get_submodule(at[0]))
        found = f"that of its class {cls.__name__}" if hasattr(cls, at[1]) else "none"
        raise UnsupportedError(
            f"{dotted(at)} has been set since the model was compiled, and forward, which reads it, found {found} then: "
            "set it before des.compile, or compile the model again"
        )

    def _compared(self) -> tuple[tuple[Place, Any], ...]:
        found = []
        for held, at in self._held:
            x = value_at(held, at[1])
            if at in self.set_here and x is self.set_here[at]:
                continue
            if not isinstance(x, PLAIN):
                raise UnsupportedError(
                    f"{dotted(at)} was {self.before[at]!r} when the model was compiled, and is "
                    f"{'not there' if x is MISSING else f'a {type(x).__name__}'} now: compile the model again"
                )
            before = self.before[at]  # another type is another graph: 1 keeps integers what they are, 1.0 does not
            if x is not before and (x != before or type(x) is not type(before)):
                found.append((at, x))
        return tuple(found)

    def told(self, changes: Sequence[tuple[Place, Any]]) -> str:
        """Changes, in words."""
        return ", ".join(f"{dotted(at)} is {x!r} now, and was {self.before[at]!r}" for at, x in changes)


def _of_class(cls: type) -> dict[str, Any]:
    """What users' classes have, that of a base where a class has none; as it lies there, not as objects see it."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("torch.") and base is not object:
            found |= vars(base)
    return found


@contextmanager
def same_classes(model: nn.Module) -> Iterator[None]:
    """What forward sets on classes while the context lasts, as to count its calls, is as before afterwards.

    A capture runs forward many times, of copies of the model: their classes are the user's own.
    """
    bases = {base for m in model.modules() for base in type(m).__mro__ if not base.__module__.startswith("torch.")}
    before = {base: {n: x for n, x in vars(base).items() if isinstance(x, PLAIN)} for base in bases - {object}}
    try:
        yield
    finally:
        for base, held in before.items():
            for name, x in held.items():
                if vars(base).get(name, MISSING) is not x:
                    setattr(base, name, x)


def _in_class(cls: type, name: str) -> Any:
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), MISSING)


def _was(x: Any) -> str:
    """A value in words.

    >>> _was(2.0), _was(MISSING)
    ('was 2.0', 'was not there')
    """
    return f"was {'not there' if x is MISSING else x if isinstance(x, PLAIN) else 'a ' + type(x).__name__}"


def dotted(at: Place) -> str:
    """The name of an attribute in its model.

    >>> dotted(("tower.0", "p")), dotted(("", "alpha"))
    ('tower.0.p', 'alpha')
    """
    return ".".join(filter(None, at))
