"""A seam: one name of somebody else's package, replaced at its consumer, checked and undoable."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from megatron_ru.foundation.errors import UserError

_MISSING = object()


@dataclass(kw_only=True)
class Seam:
    """One replaced attribute.

    `make(original)` gives the replacement; `expects` are the parameter names that the original must accept
    (a call signature that moved is an error, not a surprise at step 5000); `reason` says why the host offers
    no door. `optional` seams are skipped where the host has no such name; with `creates` a missing name is made, and
    `make` gets None: a failed import leaves its users without the name.
    """

    target: str
    """`package.module:attribute` or `package.module:Class.attribute`."""
    make: Callable[[Any], Any]
    reason: str
    expects: tuple[str, ...] = ()
    optional: bool = False
    creates: bool = False
    _installed: bool = field(default=False, init=False, repr=False)
    _own: Any = field(default=_MISSING, init=False, repr=False)
    """What the owner's own dictionary held: a class may inherit the name, or hold it as a classmethod."""

    @property
    def installed(self) -> bool:
        """Whether the replacement is in place."""
        return self._installed

    def install(self) -> bool:
        """Replaces the name once and returns whether it is in place; raises `UserError` when it moved."""
        if self.installed:
            return True
        owner, attribute = self._owner()
        original = getattr(owner, attribute, _MISSING) if owner is not None else _MISSING
        if original is _MISSING and self.creates and owner is not None:
            original = None
        if original is _MISSING:
            if self.optional:
                return False
            raise UserError(
                f"{self.target} was not found in {_version(self.target)}: {self.reason}. "
                "Use a version of megatron-core that docs/en/versions.md lists, or report this one."
            )
        if self.expects:
            self._check_signature(original)
        own = vars(owner).get(attribute, _MISSING)
        setattr(owner, attribute, self.make(original))
        self._own, self._installed = own, True
        return True

    def undo(self) -> None:
        """Puts the original back; does nothing when the seam is not installed."""
        if not self.installed:
            return
        owner, attribute = self._owner()
        if self._own is _MISSING:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, self._own)
        self._own, self._installed = _MISSING, False

    def _owner(self) -> tuple[Any, str]:
        module_name, _, path = self.target.partition(":")
        *parents, attribute = path.split(".")
        try:
            owner: Any = import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not module_name.startswith(error.name):
                raise
            return None, attribute
        for parent in parents:
            owner = getattr(owner, parent, None)
        return owner, attribute

    def _check_signature(self, original: Any) -> None:
        parameters = inspect.signature(original).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        missing = [name for name in self.expects if name not in parameters]
        if missing:
            raise UserError(
                f"{self.target} of {_version(self.target)} takes ({', '.join(parameters)}), expected it to take "
                f"{', '.join(missing)} too: {self.reason}. "
                "Use a version of megatron-core that docs/en/versions.md lists, or report this one."
            )


def _version(target: str) -> str:
    package = target.partition(":")[0].partition(".")[0]
    if package == "megatron":
        from megatron.core.package_info import __version__

        # megatron-core appends the git commit of the current folder, whosever that is.
        return f"megatron-core {__version__.partition('+')[0]}"
    try:
        module = import_module(package)
    except ModuleNotFoundError:
        return f"{package}, which is not installed"
    return f"{package} {getattr(module, '__version__', 'of unknown version')}"
