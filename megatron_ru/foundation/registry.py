"""Named things that register themselves, so that an addition is one file and no list is extended."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType

from megatron_ru.foundation.errors import UserError


class Registry[Member]:
    """Members by name, in alphabetical order.

    `kind` is the word for one of them in messages. With `package`, the first lookup imports the modules in
    it, whose decorators then register: `Registry("op", package="megatron_ru.ops")`.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._members: dict[str, Member] = {}
        self._unscanned = package

    def register(self, name: str) -> Callable[[Member], Member]:
        """A decorator that adds what it decorates under `name` and returns it unchanged.

        Raises ValueError when the name is taken.
        """

        def add(member: Member) -> Member:
            if name in self._members:
                taken = self._members[name]
                raise ValueError(f"two {self.kind}s are named {name!r}: {taken!r} and {member!r}")
            self._members[name] = member
            return member

        return add

    def scan(self, package: ModuleType | str) -> None:
        """Imports every module directly inside `package`."""
        module = importlib.import_module(package) if isinstance(package, str) else package
        for entry in pkgutil.iter_modules(module.__path__):
            importlib.import_module(f"{module.__name__}.{entry.name}")

    def __getitem__(self, name: str) -> Member:
        """Raises UserError for an unknown name, with the close ones and all that are known."""
        members = self._all()
        if name not in members:
            close = difflib.get_close_matches(name, members, n=3)
            meant = f" (did you mean {' or '.join(close)}?)" if close else ""
            known = ", ".join(sorted(members)) or "none"
            raise UserError(f"unknown {self.kind} {name!r}{meant}; known {self.kind}s: {known}")
        return members[name]

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._all()))

    def __len__(self) -> int:
        return len(self._all())

    def items(self) -> Iterator[tuple[str, Member]]:
        return ((name, self._members[name]) for name in self)

    def _all(self) -> dict[str, Member]:
        if self._unscanned is not None:
            # Cleared first: a module in the package may look something up while it is imported.
            package, self._unscanned = self._unscanned, None
            self.scan(package)
        return self._members
