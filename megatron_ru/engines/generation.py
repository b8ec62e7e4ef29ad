"""A Megatron checkpoint in one process, whatever layout saved it, for text generation by whole forward passes."""

import os
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ru.checkpoints.layout import TRACKER
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.mpi_rendezvous import ensure_rendezvous
from megatron_ru.plugin.arguments import device_of
from megatron_ru.tokenizer.loading import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A checkpoint on disk."""

    folder: Path
    """What `--load` takes: the folder with latest_checkpointed_iteration.txt."""
    iteration: str
    """As that file says it: a number, or `release`."""
    arguments: Namespace
    """Megatron's arguments of the run that saved it."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A checkpoint in memory."""

    model: Any
    tokenizer: Tokenizer
    context: int
    """Tokens that the model was trained to see."""
    iteration: str

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits [vocabulary] of the token that follows tokens [1, sequence]."""
        tokens = tokens.to(next(self.model.parameters()).device)
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        with torch.no_grad():
            logits: Tensor = self.model(tokens, positions, None)
        return logits[0, -1]


def find_checkpoint(load: str) -> SavedModel:
    """The latest checkpoint in the folder. Raises `UserError` when there is none of the torch_dist format."""
    folder = Path(load)
    tracker = folder / TRACKER
    if not tracker.is_file():
        what = f"has no {TRACKER}" if folder.is_dir() else "is not a folder"
        raise UserError(f"{load} {what}, expected a folder that pretrain_gpt --save wrote a checkpoint to")
    iteration = tracker.read_text(encoding="utf-8").strip()
    known = iteration == "release" or iteration.isdecimal()
    place = folder / ("release" if iteration == "release" else f"iter_{int(iteration):07d}" if known else iteration)
    if not known or not place.is_dir():
        raise UserError(f"{tracker} names the checkpoint {iteration!r}, and there is no folder {place}")
    if not (place / "metadata.json").is_file():
        raise UserError(
            f"{place} has no metadata.json of the torch_dist format, the only one that can be loaded from any parallel "
            "layout; save it with --ckpt-format torch_dist"
        )
    from megatron.core.dist_checkpointing import load_common_state_dict
    from torch.distributed.checkpoint import CheckpointException

    try:
        arguments = load_common_state_dict(str(place))["args"]
    # Anything is raised about damaged files, and torch's own is no Exception.
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(f"the checkpoint {place} cannot be read ({reason}); save the model again") from None
    return SavedModel(folder=folder, iteration=iteration, arguments=arguments)


def load_for_generation(
    load: str, tokenizer_model: str | None = None, variant: str | None = None, device: str = "auto"
) -> LoadedModel:
    """The latest checkpoint in the folder `load` at TP = PP = 1, in evaluation mode; once per process.

    Variant and tokenizer are those of the run that saved it unless given. Raises `UserError` when there is no
    checkpoint, it is of another variant, or the tokenizer does not fit it.
    """
    if device_of(["--device", device]) == "cpu":
        from megatron_ru.seams.cpu_device import CPU_DEVICE

        CPU_DEVICE.install()
    saved = find_checkpoint(load)
    variant = _variant_name(saved, variant)
    tokenizer = _tokenizer(saved, tokenizer_model)
    words = _words(saved, variant, device)
    # One process of its own, also where a launcher has left its variables.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    ensure_rendezvous(os.environ)
    sys.argv = ["megatron-ru generate", *words]
    return LoadedModel(
        model=_build_and_load(), tokenizer=tokenizer, context=saved.arguments.seq_length, iteration=saved.iteration
    )


def _build_and_load() -> Any:
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer

    from megatron_ru.plugin.arguments import extend_parser
    from megatron_ru.plugin.run import install_run

    args = parse_and_validate_args(extra_args_provider=lambda parser: extend_parser(parser, install_run))
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    initialize_megatron()
    model, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=config,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return model[0].eval()


def _variant_name(saved: SavedModel, wanted: str | None) -> str | None:
    trained = getattr(saved.arguments, "ru_variant", None)
    if wanted is not None and trained is not None and wanted != trained:
        raise UserError(
            f"the checkpoint in {saved.folder} is of --ru-variant {trained}, not {wanted}; "
            "drop the flag, or load another checkpoint"
        )
    return wanted or trained


def _tokenizer(saved: SavedModel, wanted: str | None) -> Tokenizer:
    path = wanted or getattr(saved.arguments, "tokenizer_model", None)
    if path is None or (wanted is None and not Path(path).exists()):
        moved = "names none" if path is None else f"names {path}, which is not here"
        raise UserError(f"the checkpoint in {saved.folder} {moved}: give its tokenizer with --tokenizer-model FILE")
    tokenizer = load_tokenizer(path)
    rows = saved.arguments.padded_vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer {path} has {tokenizer.vocab_size} ids, but the model in {saved.folder} has {rows} rows for "
            "them; give the tokenizer that it was trained with"
        )
    return tokenizer


def _words(saved: SavedModel, variant: str | None, device: str) -> list[str]:
    """The command line of a process that loads the checkpoint; what it leaves out comes from the checkpoint."""
    args = saved.arguments
    words = [
        "--load", str(saved.folder), "--use-checkpoint-args", "--exit-on-missing-checkpoint",
        "--no-load-optim", "--no-load-rng", "--skip-train", "--ckpt-format", "torch_dist",
        "--device", device, "--micro-batch-size", "1",
        # The ids come from a tokenizer of ours; the number of rows is that of the checkpoint.
        "--tokenizer-type", "NullTokenizer", "--vocab-size", str(args.padded_vocab_size - 1),
    ]  # fmt: skip
    sizes = {
        "--num-layers": "num_layers",
        "--hidden-size": "hidden_size",
        "--num-attention-heads": "num_attention_heads",
        "--seq-length": "seq_length",
        "--max-position-embeddings": "max_position_embeddings",
        "--norm-epsilon": "layernorm_epsilon",
    }
    for flag, name in sizes.items():
        words += [flag, str(getattr(args, name))]
    if variant is not None:
        untied = args.untie_embeddings_and_output_weights
        words += ["--ru-variant", variant, "--no-ru-tie-embeddings" if untied else "--ru-tie-embeddings"]
    if getattr(args, "bf16", False) and device != "cpu":
        words.append("--bf16")
    return words
