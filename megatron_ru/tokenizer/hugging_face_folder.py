"""The folder that transformers.AutoTokenizer and Megatron's HuggingFaceTokenizer load a tokenizer from."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.files import atomic_output


def write_folder(
    folder: str | os.PathLike[str],
    description: Mapping[str, Any],
    roles: Mapping[str, str],
    special_tokens: Sequence[str] = (),
) -> None:
    """Writes tokenizer.json with the contents `description`, tokenizer_config.json and special_tokens_map.json.

    `roles` names the control tokens (`eos_token`, ...), `special_tokens` further ones. Raises UserError when the folder
    cannot be written.
    """
    further = {"additional_special_tokens": list(special_tokens)} if special_tokens else {}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 10**30,
        "clean_up_tokenization_spaces": False,
        **roles,
        **further,
    }
    try:
        # Last the one that a reader looks for.
        for name, content in (
            ("special_tokens_map.json", {**roles, **further}),
            ("tokenizer_config.json", config),
            ("tokenizer.json", description),
        ):
            with atomic_output(Path(folder) / name) as stream:
                stream.write(json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8") + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
