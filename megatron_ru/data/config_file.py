"""A pipeline's config as a YAML or JSON file, in which each field stands once."""

import json
import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_ru.data.config import PipelineConfig, parse_config
from megatron_ru.foundation.errors import UserError


def load_config(path: str | os.PathLike[str]) -> PipelineConfig:
    """The pipeline of a YAML or JSON file, its paths made absolute from the file's folder.

    Raises UserError with the place in the file for an unknown field or a wrong value.
    """
    found = _read_fields(path)
    try:
        return _absolute(parse_config(found), Path(path).resolve().parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _absolute(config: PipelineConfig, folder: Path) -> PipelineConfig:
    def absolute(path: str | None) -> Any:
        if path is not None and "\0" in path:
            raise UserError(f"the path {path!r} holds a NUL")
        return None if path is None else str(folder / path)

    inputs = tuple(replace(entry, files=tuple(map(absolute, entry.files))) for entry in config.inputs)
    tokens = config.tokens and replace(config.tokens, tokenizer=absolute(config.tokens.tokenizer))
    semantic = config.semantic_dedup and replace(
        config.semantic_dedup,
        encoder=absolute(config.semantic_dedup.encoder),
        embeddings=absolute(config.semantic_dedup.embeddings),
    )
    output = absolute(config.output)
    return replace(config, output=output, inputs=inputs, tokens=tokens, semantic_dedup=semantic)


def _read_fields(path: str | os.PathLike[str]) -> Any:
    """What the file holds: a mapping, if it is what it should be.

    Raises UserError for a file that cannot be read and for a field that stands twice, of which both libraries would
    take the second.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if str(path).endswith(".json"):
            return json.loads(text, object_pairs_hook=_once)
        return yaml.load(text, _loader())
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"the field {twice[0]!r} stands twice; leave one")
    return dict(pairs)


@lru_cache(maxsize=1)
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key, _ in node.value if names.count(key.value) > 1]:
                raise UserError(f"line {twice[1].start_mark.line + 1}: {twice[1].value!r} stands twice; leave one")
            found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
            return found

    return Loader
