"""Libraries that only some features need."""

import importlib
from types import ModuleType

from megatron_ru.foundation.errors import UserError


def require(module: str, feature: str, extra: str) -> ModuleType:
    """The imported `module`.

    Raises UserError naming the feature and the pip command when `module` is not installed. A library that is
    there but lacks one of its own dependencies keeps its ImportError: the command would not help.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module != missing and not module.startswith(f"{missing}."):
            raise
        raise UserError(
            f"{feature} needs the Python package {missing!r}, which is not installed: "
            f"pip install 'megatron-ru[{extra}]'"
        ) from error
