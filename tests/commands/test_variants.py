import json
from pathlib import Path

import pytest

from megatron_ru.commands.main import main
from megatron_ru.models.variant import all_variants

ROOT = Path(__file__).parents[2]


def test_json_lists_every_variant_with_its_parameters(capsys):
    assert main(["variants", "--json"]) == 0
    records = {record["name"]: record for record in json.loads(capsys.readouterr().out)}
    assert list(records) == list(all_variants())
    llama = records["llama2_7b"]
    assert llama["parameters"] == llama["parameters_untied"] == 6_738_415_616
    assert llama["parameters_tied"] == 6_738_415_616 - 32000 * 4096
    assert (llama["tied"], llama["parent"], llama["ffn_hidden_size"]) == (False, None, 11008)
    base = records["gpt2_rope"]
    assert (base["parent"], base["difference"]) == ("gpt2", "RoPE instead of sin/cos positions")
    assert base["tied"] is True
    assert base["parameters"] == base["parameters_tied"] < base["parameters_untied"]
    assert records["ru_7b3"]["recipe"]["tokens"] == 2_000_000_000_000


def test_the_table_stars_the_variants_own_tying(capsys):
    assert main(["variants", "ru_7b3", "gpt2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("ru_7b3")
    assert "7.14B" in lines[1]
    assert "7.31B*" in lines[1]
    assert "32 x 4096/14336, 32/8, 40000, 4096" in lines[1]
    assert "2.65B*" in lines[2]
    assert "--ru-tie-embeddings" in lines[3]


def test_arguments_are_a_command_line(capsys):
    assert main(["variants", "llama2_7b", "--arguments"]) == 0
    output = capsys.readouterr()
    words = output.out.split()
    assert words[words.index("--ffn-hidden-size") + 1] == "11008"
    assert words[words.index("--normalization") + 1] == "RMSNorm"
    assert {"--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"} <= set(words)
    assert "--group-query-attention" not in words
    assert output.err == ""


def test_arguments_note_what_flags_cannot_say(capsys):
    assert main(["variants", "gpt2_tiny", "--arguments"]) == 0
    output = capsys.readouterr()
    assert "--position-embedding-type learned_absolute" in output.out
    assert "no flag for sinusoidal positions, post-norm: these need --ru-variant gpt2_tiny" in output.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lama2_7b"], "did you mean llama2_7b"),
        (["--arguments"], "--arguments needs the name of a variant"),
        (["gpt2", "--arguments", "--json"], "--json and --arguments are two forms of output"),
    ],
)
def test_bad_words_are_one_sentence_and_exit_2(capsys, words, sentence):
    assert main(["variants", *words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert sentence in output.err
    assert len(output.err.splitlines()) == 1


@pytest.mark.parametrize("language", ["en", "ru"])
def test_the_guide_names_every_variant_and_prints_its_parameters(language):
    from megatron_ru.models.parameter_count import count_parameters

    guide = (ROOT / "docs" / language / "variants.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in guide.splitlines() if line.startswith("| `")}
    assert set(rows) == {f"`{name}`" for name in all_variants()}
    for name, variant in all_variants().items():
        cells = [cell.strip() for cell in rows[f"`{name}`"].split("|")]
        for tied, cell in ((True, cells[4]), (False, cells[5])):
            assert f"{count_parameters(variant, tied):,}".replace(",", " ") == cell.strip("*")
            assert cell.endswith("*") == (variant.tied_embeddings is tied)
