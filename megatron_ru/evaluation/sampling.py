"""Drawing a continuation token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ru.foundation.errors import UserError
from megatron_ru.tokenizer.loading import Tokenizer

NextLogits = Callable[[Tensor], Tensor]
"""Token ids [1, sequence] to the logits [vocabulary] of the token that follows."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are drawn. Raises `UserError` for values that make no distribution."""

    tokens: int = 100
    """Tokens to draw at most; the end of the document ends it earlier."""
    temperature: float = 0.8
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Drawn from the smallest set of tokens whose probabilities reach it (Holtzman et al., 2020)."""
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"--tokens is {self.tokens}, expected at least 1")
        if self.temperature < 0:
            raise UserError(f"--temperature is {self.temperature}, expected 0 (the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}, expected more than 0 and at most 1")


def continue_text(
    next_logits: NextLogits, tokenizer: Tokenizer, prompt: str, context: int, settings: SamplingSettings
) -> str:
    """The text that the model puts after `prompt`, whole characters only.

    The model sees the last `context` tokens. An empty prompt begins a new document; spaces at the end of a prompt are
    not shown to the model. Raises `UserError` when it is empty and the tokenizer has no token that ends documents.
    """
    # A space belongs to the word that follows it: encoded alone it would promise what stands alone after a space in
    # the training text, a digit.
    bare = prompt.rstrip(" ")
    ids = tokenizer.encode(bare)
    if not ids and tokenizer.eod is None:
        raise UserError(f"the prompt is empty and {tokenizer.path} has no end-of-document token; give --prompt TEXT")
    start = ids or [tokenizer.eod]  # type: ignore[list-item]
    drawn = draw_tokens(next_logits, start, context, tokenizer.vocab_size, tokenizer.eod, settings)
    text = decode_continuation(tokenizer, ids, drawn)
    return text.removeprefix(" ") if bare != prompt else text


def draw_tokens(
    next_logits: NextLogits, start: Sequence[int], context: int, vocab_size: int, end: int | None,
    settings: SamplingSettings,
) -> list[int]:  # fmt: skip
    """The ids drawn after `start`, without the end token; ids from `vocab_size` on are padding, never drawn."""
    generator = torch.Generator().manual_seed(settings.seed)
    ids, drawn = list(start), []
    for _ in range(settings.tokens):
        logits = next_logits(torch.tensor([ids[-context:]], dtype=torch.int64))
        token = choose_token(logits[:vocab_size].float().cpu(), settings, generator)
        if token == end:
            break
        ids.append(token)
        drawn.append(token)
    return drawn


def choose_token(logits: Tensor, settings: SamplingSettings, generator: torch.Generator) -> int:
    """One id, drawn from logits [vocabulary] at the settings' temperature and top-p."""
    if settings.temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / settings.temperature, dim=-1).sort(descending=True)
    # The mass before a token decides, so that the first one always stays.
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= settings.top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def decode_continuation(tokenizer: Tokenizer, prompt: Sequence[int], drawn: Sequence[int]) -> str:
    """The text of `drawn` as it stands after `prompt`; a character whose last bytes are missing is left out."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *drawn])
    # Decoded alone, a first word would lose the space before it.
    text = whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(drawn)
    return text.rstrip("\N{REPLACEMENT CHARACTER}")
