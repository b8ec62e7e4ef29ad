"""A module that somebody sees in place of another one."""

from types import ModuleType


def stand_in(original: ModuleType) -> ModuleType:
    """A module that finds in `original` whatever it is not given itself."""
    made = ModuleType(original.__name__, original.__doc__)
    made.__getattr__ = lambda name: getattr(original, name)  # type: ignore[method-assign]
    return made
