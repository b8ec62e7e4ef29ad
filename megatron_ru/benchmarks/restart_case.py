"""What is measured of a restart: models, ways to build them, and the words that Megatron gets for each."""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ru.foundation.errors import UserError

_LARGEST_ALONE = 500_000_000
"""Parameters from which on the optimizer is left out unless it is asked for."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A decoder with gated feed-forward blocks and untied embeddings."""

    name: str
    layers: int
    hidden: int
    feed_forward: int
    vocabulary: int = 32000

    @property
    def heads(self) -> int:
        """Attention heads of 128 channels, or of 64 where these would be too few."""
        return self.hidden // (128 if self.hidden >= 1024 else 64)

    @property
    def parameters(self) -> int:
        """Numbers in all weights; the vocabulary is padded to a multiple of 128."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.feed_forward + 2 * self.hidden
        padded = -(-self.vocabulary // 128) * 128
        return self.layers * layer + 2 * padded * self.hidden + self.hidden


SIZES = {
    "tiny": Size(name="tiny", layers=4, hidden=256, feed_forward=704, vocabulary=4096),
    "100m": Size(name="100m", layers=8, hidden=768, feed_forward=2048),
    "1b": Size(name="1b", layers=20, hidden=2048, feed_forward=5632),
    "7b": Size(name="7b", layers=32, hidden=4096, feed_forward=11008),
}

OPTIMIZERS = {
    # The plainest one of Megatron's; of it nothing is saved and nothing loaded.
    "none": "--optimizer sgd --sgd-momentum 0 --no-save-optim --no-load-optim",
    "adamw": "--optimizer adam --adam-beta2 0.95 --weight-decay 0.1",
}

KINDS = {
    "cpu_fp32": "built and drawn on the CPU in fp32, then moved",
    "cpu_bf16": "built and drawn on the CPU in bf16, then moved",
    "device": "built and drawn on the device by Megatron",
    "meta": "built on meta, drawn or loaded where it is trained",
}
"""Ways to build a model. All but the last are Megatron's own, and so is their loading."""

_KIND_WORDS = {
    "cpu_fp32": "--use-cpu-initialization --ru-init megatron --ru-meta-init off --ru-checkpoints megatron",
    "cpu_bf16": "--use-cpu-initialization --ru-init megatron --ru-meta-init off --ru-checkpoints megatron",
    "device": "--ru-init megatron --ru-meta-init off --ru-checkpoints megatron",
    "meta": "--ru-init whole --ru-meta-init on --ru-checkpoints safe",
}


def find_size(text: str) -> Size:
    """One of `SIZES`, or LAYERSxHIDDENxFEED_FORWARD. Raises `UserError`."""
    if text in SIZES:
        return SIZES[text]
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if match is None:
        raise UserError(
            f"--size {text} is none of {', '.join(SIZES)}, nor LAYERSxHIDDENxFEED_FORWARD such as 24x1024x2816"
        )
    layers, hidden, feed_forward = map(int, match.groups())
    if layers < 1 or feed_forward < 1 or hidden < 64 or hidden % (128 if hidden >= 1024 else 64):
        raise UserError(
            f"--size {text}: expected at least one layer, and a hidden size that is a multiple of 64 below 1024 and of "
            "128 from there on"
        )
    return Size(name=text, layers=layers, hidden=hidden, feed_forward=feed_forward)


def default_optimizer(size: Size) -> str:
    """adamw where its numbers, 12 bytes for each parameter, are few."""
    return "adamw" if size.parameters < _LARGEST_ALONE else "none"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One start of a training run up to the end of its first step."""

    size: Size
    kind: str
    device: str
    optimizer: str
    load: Path | None = None
    save: Path | None = None
    """Where the checkpoint is written after the step that is measured."""

    @property
    def start(self) -> str:
        """From where: `fresh` or `checkpoint`."""
        return "fresh" if self.load is None else "checkpoint"

    def words(self, metrics: Path) -> list[str]:
        """The arguments of `megatron-ru pretrain_gpt`; the times of the start go into `metrics`."""
        size = self.size
        words = f"""
            --device {self.device} --num-layers {size.layers} --hidden-size {size.hidden}
            --ffn-hidden-size {size.feed_forward} --num-attention-heads {size.heads} --swiglu
            --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
            --untie-embeddings-and-output-weights --mock-data --tokenizer-type NullTokenizer
            --vocab-size {size.vocabulary - 1} --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1
            --global-batch-size 1 --lr 1e-5 --min-lr 1e-5 --override-opt_param-scheduler --bf16
            --eval-iters 0 --log-interval 1 --seed 7
            --attention-dropout 0 --hidden-dropout 0 --train-iters {1 if self.load is None else 2}
            """.split()
        words += [*OPTIMIZERS[self.optimizer].split(), *_KIND_WORDS[self.kind].split(), "--ru-metrics", str(metrics)]
        if self.load is not None:
            words += ["--load", str(self.load)]
        if self.save is not None:
            words += ["--save", str(self.save), "--save-interval", "1"]
        return words
