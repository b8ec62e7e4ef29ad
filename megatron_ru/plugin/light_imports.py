"""What a start does not import: it would be a quarter of the time to the first step of a small model on a warm disk."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

from megatron_ru.foundation.words import value_of
from megatron_ru.seams.seam import Seam

_BY_THEMSELVES = {"SentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer", "NullTokenizer"}
"""Tokenizers of Megatron that do without Hugging Face's transformers."""


@contextmanager
def light_imports(words: Sequence[str]) -> Iterator[None]:
    """Megatron is imported while this is entered: without transformers where the tokenizer among the words needs none,
    and with functions that torch compiles when they are called, not when their modules are imported."""
    compiler = Seam(
        target="torch:compile",
        make=when_called,
        reason="Megatron decorates functions that nobody may call, and to decorate one imports torch's compiler",
    )
    hidden = "transformers" not in sys.modules and _needs_no_transformers(words)
    if hidden:
        # To whoever asks it is not installed; Megatron takes note and complains when a tokenizer asks for it.
        sys.modules["transformers"] = None  # type: ignore[assignment]
    compiler.install()
    try:
        yield
        if hidden:
            # Otherwise they come when a tokenizer is built.
            with suppress(ImportError):
                import_module("megatron.core.tokenizers.text.libraries")
    finally:
        compiler.undo()
        if hidden:
            del sys.modules["transformers"]


def _needs_no_transformers(words: Sequence[str]) -> bool:
    # The arguments of a checkpoint or of a file may name another tokenizer.
    elsewhere = any("checkpoint-args" in word or word.startswith("--yaml") for word in words)
    return value_of(words, "--tokenizer-type") in _BY_THEMSELVES and not elsewhere


def when_called(compiler: Callable[..., Any]) -> Callable[..., Any]:
    """`compiler`, a decorator with or without options, that begins at the first call of what it decorates."""

    def decorate(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(decorate, **options)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            if not compiled:
                compiled.append(compiler(function, **options))
            return compiled[0](*arguments, **keywords)

        return call

    return decorate
