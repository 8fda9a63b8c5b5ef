"""One table for each kind of part: methods, formats, backends, architectures."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A name -> part table; duplicates raise, and an unknown name lists the known ones and the nearest.

    Args:
        kind: what the parts are, in the singular, for messages ("method", "backend").
        meant: name that people try -> the part that they mean, where spelling does not tell ("cuda" -> "triton").
    """

    def __init__(self, kind: str, meant: Mapping[str, str] | None = None) -> None:
        self.kind, self._meant = kind, dict(meant or {})
        self._parts: dict[str, T] = {}

    def register(self, name: str, part: T) -> T:
        if name in self._parts:
            raise ValueError(f"{self.kind} {name!r} is registered already: choose another name")
        self._parts[name] = part
        return part

    def get(self, name: str) -> T:
        if name not in self._parts:
            raise ValueError(unknown(self.kind, name, list(self._parts), self._meant))
        return self._parts[name]

    def check(self, name: str) -> None:
        """Raise ValueError unless `name` is that of a part, or "auto"."""
        if name != "auto" and name not in self._parts:
            raise ValueError(unknown(self.kind, name, ["auto", *self._parts], self._meant))

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def items(self) -> list[tuple[str, T]]:
        return list(self._parts.items())


def unknown(kind: str, name: object, known: list[str], meant: Mapping[str, str] | None = None) -> str:
    """Return the message for a name that is not in `known`, with the one meant, else the nearest, if there is one."""
    near = nearest(name, known, meant)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"unknown {kind} {name!r}: known are {', '.join(map(repr, sorted(known)))}.{hint}"


def nearest(name: object, known: list[str], meant: Mapping[str, str] | None = None) -> str | None:
    """Return what was probably meant by a name that is not in `known`."""
    near = difflib.get_close_matches(str(name).lower(), [k.lower() for k in known], n=1, cutoff=0.6)
    return (meant or {}).get(str(name).lower()) or next((k for k in known if near and k.lower() == near[0]), None)
