"""A replacement for `dataclasses.dataclass` that keeps ``import microbatch`` cheap.

The standard decorator compiles six methods for each class, and its module imports `inspect`. This one compiles only
``__init__``, when the first object is created. Otherwise, its classes behave the same, and functions such as
`dataclasses.replace` accept them:

>>> import dataclasses
>>> @dataclass(frozen=True, slots=True)
... class Point:
...     x: int
...     y: int = 0
>>> dataclasses.replace(Point(1), y=2)
Point(x=1, y=2)
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass", "field"]


class _Fields:
    """The fields of a class, by their names."""

    def __init__(self, cls: type, frozen: bool) -> None:
        self.types: dict[str, Any] = cls.__annotations__
        self.defaults = {name: vars(cls)[name] for name in self.types if name in vars(cls)}
        self.factories = {name for name, default in self.defaults.items() if isinstance(default, type)}
        self._class = cls
        self._frozen = frozen

    def init(self) -> Any:
        """Compile the method ``__init__``."""
        parameters = (f"{name}=defaults[{name!r}]" if name in self.defaults else name for name in self.types)
        lines = [f"def __init__(self, {', '.join(parameters)}):"]
        lines += [f" if {name} is defaults[{name!r}]: {name} = {name}()" for name in self.factories]
        lines += [f" assign(self, {name!r}, {name})" for name in self.types]
        names: dict[str, Any] = {"defaults": self.defaults, "assign": object.__setattr__, "__name__": __name__}
        exec("\n".join(lines), names)
        init = names["__init__"]
        init.__qualname__ = f"{self._class.__qualname__}.__init__"
        init.__annotations__ = {**self.types, "return": None}
        return init

    @cached_property
    def standard(self) -> Any:
        """The standard dataclass with these fields."""
        from dataclasses import MISSING, field, make_dataclass

        fields = []
        for name, kind in self.types.items():
            default = "default_factory" if name in self.factories else "default"
            fields.append((name, kind, field(**{default: self.defaults.get(name, MISSING)})))
        return make_dataclass(self._class.__name__, fields, frozen=self._frozen)


class _Lazy:
    """An attribute of a class that is made when it is first used."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, instance: object, owner: type) -> Any:
        value = self._make()
        setattr(self._owner, self._name, value)
        return value.__get__(instance, owner) if hasattr(value, "__get__") else value


def _values(self: Any) -> list[Any]:
    return [getattr(self, name) for name in self.__match_args__]


def _restore(self: Any, values: list[Any]) -> None:
    for name, value in zip(self.__match_args__, values):
        object.__setattr__(self, name, value)


def _equal(self: Any, other: Any) -> Any:
    return _values(self) == _values(other) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: Any) -> int:
    return hash(tuple(_values(self)))


def _repr(self: Any) -> str:
    fields = (f"{name}={value!r}" for name, value in zip(self.__match_args__, _values(self)))
    return f"{type(self).__qualname__}({', '.join(fields)})"


def _replace(self: Any, /, **changes: Any) -> Any:
    return type(self)(**dict(zip(self.__match_args__, _values(self))) | changes)


def _refuse(self: Any, name: str, *value: Any) -> None:
    raise AttributeError(f"cannot assign to field {name!r}")


_METHODS = {"__eq__": _equal, "__hash__": None, "__repr__": _repr, "__replace__": _replace}
_IF_FROZEN = {"__hash__": _hash, "__setattr__": _refuse, "__delattr__": _refuse}
_IF_SLOTS = {"__getstate__": _values, "__setstate__": _restore}


def _completed(cls: type, frozen: bool, slots: bool) -> type:
    fields = _Fields(cls, frozen)
    names = tuple(fields.types)
    replaced = {"__dict__", "__weakref__", *(names if slots else fields.factories)}
    members = {name: member for name, member in vars(cls).items() if name not in replaced}
    members |= _METHODS | (_IF_FROZEN if frozen else {}) | ({"__slots__": names, **_IF_SLOTS} if slots else {})
    members |= {"__init__": _Lazy(fields.init), "__match_args__": names, "__qualname__": cls.__qualname__}
    members["__dataclass_fields__"] = _Lazy(lambda: fields.standard.__dataclass_fields__)
    members["__dataclass_params__"] = _Lazy(lambda: fields.standard.__dataclass_params__)
    # A new class, because slots need one, and because it takes less time than to change the old one.
    return type(cls)(cls.__name__, cls.__bases__, members)


if TYPE_CHECKING:
    from dataclasses import dataclass, field
else:

    def dataclass(*, frozen=False, slots=False):
        """Return a decorator that adds the methods of a dataclass. It does not look for fields in base classes."""
        return lambda cls: _completed(cls, frozen, slots)

    def field(*, default_factory):
        """Return the default of a field of which each object gets a new one: a class, which ``__init__`` calls."""
        return default_factory
