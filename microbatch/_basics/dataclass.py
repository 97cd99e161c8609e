"""A replacement for `dataclasses.dataclass` that keeps ``import microbatch`` cheap.

The module `dataclasses` takes as long to import as the rest of this package, and its decorator compiles six methods for
each class. This decorator compiles ``__init__`` when the first object is created. It takes all other methods from the
standard decorator, when one of them is first used. So functions such as `dataclasses.replace` accept its classes:

>>> import dataclasses
>>> @dataclass(frozen=True, slots=True)
... class Point:
...     x: int
...     y: int = 0
>>> dataclasses.replace(Point(1), y=2)
Point(x=1, y=2)
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass", "field"]

_STANDARD = "__eq__ __hash__ __repr__ __replace__ __dataclass_fields__ __dataclass_params__".split()


class _Lazy:
    """An attribute of a class that is created when it is first used."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, instance: object, owner: type) -> Any:
        value = self._make(self._name)
        setattr(self._owner, self._name, value)
        return value.__get__(instance, owner) if callable(value) else value


def _complete(cls: type, frozen: bool, slots: bool) -> type:
    members = {name: member for name, member in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    members["__qualname__"] = cls.__qualname__
    fields = tuple(cls.__annotations__)
    defaults = {name: members[name] for name in fields if name in members}
    factories = {name: default for name, default in defaults.items() if isinstance(default, type)}

    def remade(changes: dict[str, Any], left_out: Iterable[str] = ()) -> type:
        kept = {name: member for name, member in members.items() if name not in left_out}
        return type(cls)(cls.__name__, cls.__bases__, kept | changes)

    @cache
    def standard() -> type:
        import dataclasses

        made = {name: dataclasses.field(default_factory=factory) for name, factory in factories.items()}
        return dataclasses.dataclass(frozen=frozen, slots=slots)(remade(made))

    lazy = [*_STANDARD, "__getstate__", "__setstate__"] if slots else _STANDARD
    changes: dict[str, Any] = {name: _Lazy(lambda name: getattr(standard(), name)) for name in lazy}
    changes |= {"__init__": _Lazy(lambda _: _init(cls, defaults, factories)), "__match_args__": fields}
    changes |= {"__setattr__": _refuse, "__delattr__": _refuse} if frozen else {}
    changes |= {"__slots__": fields} if slots else {}
    return remade(changes, left_out=fields if slots else factories)


def _init(cls: type, defaults: dict[str, Any], factories: Iterable[str]) -> Any:
    parameters = (f"{name}=defaults[{name!r}]" if name in defaults else name for name in cls.__annotations__)
    lines = [f"def __init__(self, {', '.join(parameters)}):"]
    lines += [f" if {name} is defaults[{name!r}]: {name} = {name}()" for name in factories]
    lines += [f" assign(self, {name!r}, {name})" for name in cls.__annotations__]
    names: dict[str, Any] = {"defaults": defaults, "assign": object.__setattr__, "__name__": __name__}
    exec("\n".join(lines), names)
    init = names["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    init.__annotations__ = {**cls.__annotations__, "return": None}
    return init


def _refuse(self: Any, name: str, *value: Any) -> None:
    raise AttributeError(f"cannot assign to field {name!r}")


if TYPE_CHECKING:
    from dataclasses import dataclass, field
else:

    def dataclass(*, frozen=False, slots=False):
        """Return a decorator that adds the methods of a dataclass. It does not look for fields in base classes."""
        return lambda cls: _complete(cls, frozen, slots)

    def field(*, default_factory):
        """Return *default_factory*, a class that ``__init__`` calls, so that each object gets a new default."""
        return default_factory
