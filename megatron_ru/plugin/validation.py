"""Validation that can be compared: before the first step too, and on the same samples every time.

Megatron evaluates after every so many steps only, and reads on in the validation set each time, so that part of a
difference between two losses is a difference between samples.
"""

import argparse
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.seams.seam import Seam


def check_validation(args: argparse.Namespace) -> None:
    """Raises `UserError` where `--ru-validate-from-start` cannot be carried out."""
    flags = {
        "--overlap-param-gather": getattr(args, "overlap_param_gather", False),
        "--full-validation": getattr(args, "full_validation", False),
        "--multiple-validation-sets": getattr(args, "multiple_validation_sets", False),
    }
    found = [flag for flag, used in flags.items() if used]
    if found:
        raise UserError(f"--ru-validate-from-start does not work together with {', '.join(found)}; drop one of them")


def validation_seams() -> list[Seam]:
    """The seams on the loop and on the data loaders of one run."""
    return [
        Seam(
            target="megatron.training.training:train",
            make=_evaluating_first,
            expects=("forward_step_func", "model", "valid_data_iterator", "config", "non_loss_data_func"),
            reason="Megatron evaluates after steps only",
        ),
        Seam(
            target="megatron.training.training:build_pretraining_data_loader",
            make=_with_fixed_validation,
            expects=("dataset", "consumed_samples"),
            reason="Megatron takes other validation samples for every evaluation",
        ),
    ]


class Repeated:
    """The first `count` items of an iterable, over and over."""

    def __init__(self, items: Iterable[Any], count: int):
        self._items = items
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from itertools.islice(self._items, self._count)


def _evaluating_first(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def train(*arguments: Any, **keywords: Any) -> Any:
        from megatron.training import get_args, training

        args = get_args()
        if args.do_valid:
            given = signature.bind(*arguments, **keywords).arguments
            accepted = inspect.signature(training.evaluate_and_print_results).parameters
            handed_on = {name: value for name, value in given.items() if name in accepted}
            handed_on |= {"data_iterator": given["valid_data_iterator"], "iteration": args.iteration}
            training.evaluate_and_print_results(f"iteration {args.iteration} before the next step", **handed_on)
        return original(*arguments, **keywords)

    return train


def _with_fixed_validation(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build(dataset: Any, consumed_samples: int, *rest: Any, **keywords: Any) -> Any:
        from megatron.core.datasets.utils import Split

        split = getattr(dataset, "split", None) or getattr(dataset, "index_split", None)
        if split is not Split.valid:
            return original(dataset, consumed_samples, *rest, **keywords)
        return Repeated(original(dataset, 0, *rest, **keywords), _micro_batches_per_evaluation())

    return build


def _micro_batches_per_evaluation() -> int:
    from megatron.core import mpu
    from megatron.training import get_args

    args = get_args()
    # Batches of their own for evaluation came with core 0.18.
    micro = getattr(args, "eval_micro_batch_size", None) or args.micro_batch_size
    whole = getattr(args, "eval_global_batch_size", None) or args.global_batch_size
    return args.eval_iters * (whole // (micro * mpu.get_data_parallel_world_size()))
