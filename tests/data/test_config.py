import json

import pytest

from megatron_ru.data.config import Language, Length, load_config, parse_config
from megatron_ru.foundation.errors import UserError

SMALL = {"output": "out", "inputs": [{"domain": "ru", "files": ["a.jsonl"]}]}


def test_paths_are_those_of_the_configs_folder(tmp_path):
    path = tmp_path / "deep" / "c.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SMALL | {"tokens": {"tokenizer": "../t.model"}}))
    config = load_config(path)
    assert config.output == f"{path.parent}/out"
    assert config.inputs[0].files == (f"{path.parent}/a.jsonl",)
    assert config.tokens.tokenizer == f"{path.parent}/../t.model"
    assert config.length == Length(at_least=150)
    assert config.language is None


def test_sections_may_be_empty(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(SMALL | {"language": {}, "length": None}))
    assert load_config(path).language == Language(keep=("ru", "en"))
    assert load_config(path).length is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "colour is no field; known: output, inputs"),
        ({"packing": {"size": 1}, "tokens": {"tokenizer": "t"}}, "packing.size is no field"),
        ({"shard_megabytes": "many"}, "shard_megabytes: input should be a valid number"),
        ({"inputs": []}, "inputs is empty"),
        ({"inputs": [{"domain": "a", "files": []}, {"domain": "a", "files": []}]}, "two inputs have the domain 'a'"),
        ({"inputs": [{"domain": "a/b", "files": []}]}, "the domain 'a/b' becomes part of file names"),
        ({"packing": {}}, "packing needs the section tokens"),
        ({"tokens": {"tokenizer": "t"}, "mixture": {}}, "mixture draws blocks, so it needs the section packing"),
        ({"tokens": {"tokenizer": "t", "held_out": 1}}, r"tokens.held_out is 1.0; it must lie in \[0, 1\)"),
        ({"tokens": {}}, "tokens.tokenizer: field required"),
        ({"packing": {"kind": "best"}, "tokens": {"tokenizer": "t"}}, "packing.kind: input should be 'lecture'"),
        ({"shard_megabytes": 0}, "shard_megabytes is 0.0; it must be more than 0"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        parse_config(SMALL | changes)


def test_what_is_no_config_at_all(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the config .*none.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "c.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"c.yaml is neither YAML nor JSON"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("just words")
    with pytest.raises(UserError, match=r"c.yaml: the file: "):
        load_config(tmp_path / "c.yaml")
