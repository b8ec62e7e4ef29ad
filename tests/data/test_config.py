import json

import pytest

from megatron_ru.data.config import Language, Length, parse_config
from megatron_ru.data.config_file import load_config
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
        (
            {"inputs": [{"domain": "a", "files": ["a"]}, {"domain": "a", "files": ["b"]}]},
            "two inputs have the domain 'a'",
        ),
        ({"inputs": [{"domain": "a/b", "files": ["a"]}]}, "the domain 'a/b' becomes part of file names"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_megabytes": float("nan")}, "shard_megabytes is nan"),
        ({"shard_megabytes": float("inf")}, "shard_megabytes is inf"),
        ({"length": {"at_least": -1}}, "length.at_least is -1; it must be at least 0"),
        ({"length": 150}, "length: input should be fields with their values"),
        ({"language": {"keep": []}}, "language.keep names no language"),
        ({"language": {"keep": ["ru", "rus"]}}, "language.keep: 'rus' is no language of the model"),
        ({"language": {"threshold": float("nan")}}, "language.threshold is nan; it must be at least 0"),
        ({"inputs": [{"domain": "a", "files": []}]}, "the domain 'a' has no files"),
        ({"inputs": [{"domain": "a", "files": "a.jsonl"}]}, "inputs.0.files: input should be a list"),
        (
            {"inputs": [{"domain": "a", "files": ["a"], "wieght": 1}]},
            "inputs.0.wieght is no field; known: domain, files",
        ),
        ({"inputs": [{"domain": "a", "files": ["a"], "weight": -1}]}, "the weight of 'a' is -1.0"),
        ({"inputs": [{"domain": "a", "files": ["a"], "weight": float("nan")}]}, "the weight of 'a' is nan"),
        ({"inputs": [{"domain": "a", "files": ["a"], "weight": 0}]}, "every input has the weight 0"),
        ({"tokens": {"tokenizer": "t"}, "packing": {}, "mixture": {"samples_per_part": 0}}, "samples_per_part is 0"),
        ({"semantic_dedup": {"encoder": "e", "clusters": 0}}, "semantic_dedup.clusters is 0"),
    ],
)
def test_what_would_fail_or_empty_the_data_hours_later_is_said_at_once(changes, message):
    with pytest.raises(UserError) as refused:
        parse_config(SMALL | changes)
    assert message in str(refused.value)


def test_a_field_stands_once_and_a_mark_of_byte_order_is_no_field(tmp_path):
    yaml_file, json_file = tmp_path / "c.yaml", tmp_path / "c.json"
    yaml_file.write_text("output: out\ninputs: [{domain: a, files: [a]}]\ninputs: [{domain: b, files: [b]}]\n")
    with pytest.raises(UserError, match=r"c\.yaml: line 3: 'inputs' stands twice"):
        load_config(yaml_file)
    json_file.write_text('{"output": "out", "length": null, "length": {}}')
    with pytest.raises(UserError, match=r"c\.json: the field 'length' stands twice"):
        load_config(json_file)
    json_file.write_text("\ufeff" + json.dumps(SMALL), encoding="utf-8")
    assert load_config(json_file).inputs[0].domain == "ru"
    yaml_file.write_text('output: "a\\0b"\ninputs: [{domain: a, files: [a]}]\n')
    with pytest.raises(UserError, match="holds a NUL"):
        load_config(yaml_file)
