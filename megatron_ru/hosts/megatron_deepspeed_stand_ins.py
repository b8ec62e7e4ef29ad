"""Modules that Megatron-DeepSpeed imports, needs for nothing of a GPT's training, and does not find any more.

`megatron/training.py` begins by importing a monitor of vision models, which wants torchvision, and DeepSpeed's
compression, which DeepSpeed 0.19.7 removed. Where they are missing a stand-in takes their name; calling into it is an
error that says what is missing.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from megatron_ru.foundation.errors import UserError

_STAND_INS = {
    "megatron.model.vision.knn_monitor": (
        "torchvision",
        ("compute_feature_bank",),
        "pretraining of vision models (--vision-pretraining) needs torchvision, which is not installed",
    ),
    "deepspeed.compression.compress": (
        "deepspeed.compression.compress",
        ("init_compression", "redundancy_clean"),
        "--compression-training needs DeepSpeed 0.19.6 or older: later ones have no deepspeed.compression.compress",
    ),
}
"""Module: what must be importable for the real one, the names that are imported from it, what to say."""


def stand_in_for_missing_modules() -> None:
    """From now on the modules of the table are found, real where what they need is installed."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def stop_standing_in() -> None:
    """Takes the stand-ins away, for tests."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    for name in _STAND_INS:
        if isinstance(getattr(sys.modules.get(name), "__loader__", None), _Loader):
            del sys.modules[name]


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # The search below comes back here.
        if fullname not in _STAND_INS or self._searching or self._is_there(_STAND_INS[fullname][0]):
            return None
        return importlib.machinery.ModuleSpec(fullname, _Loader())

    def _is_there(self, module: str) -> bool:
        self._searching = True
        try:
            return importlib.util.find_spec(module) is not None
        except ImportError:
            return False
        finally:
            self._searching = False


class _Loader(importlib.abc.Loader):
    def exec_module(self, module: ModuleType) -> None:
        _, names, sentence = _STAND_INS[module.__name__]
        for name in names:
            setattr(module, name, _refuse(sentence))


def _refuse(sentence: str) -> Any:
    def refuse(*arguments: Any, **keywords: Any) -> NoReturn:
        raise UserError(sentence)

    return refuse
