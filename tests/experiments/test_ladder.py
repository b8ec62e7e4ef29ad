import json
import subprocess
import sys

import pytest

from megatron_ru.commands.main import main
from megatron_ru.experiments.corpus import Corpus
from megatron_ru.experiments.ladder import LadderSettings, toy_variant, training_words
from megatron_ru.experiments.ladder_report import LadderRun, inversions, table_text
from megatron_ru.experiments.published import TABLES, PublishedTable
from megatron_ru.models.variant import all_variants, find_variant

RMSNORM = "gpt2_rope_preln_rmsnorm"


def run_of(name, loss):
    return LadderRun(
        variant=name, parameters=1000, first_validation_loss=7.6, validation_loss=loss, step_seconds=0.25,
        train_losses=[7.0, 6.0],
    )  # fmt: skip


def test_published_numbers():
    activations = TABLES["activations"].losses
    names = ("relu", "gelu", "swish", "reglu", "geglu", "swiglu")
    assert [activations[f"activation_{name}"] for name in names] == [2.259, 2.246, 2.252, 2.211, 2.196, 2.191]
    assert [activations[f"activation_{name}_nobias"] for name in names] == [2.274, 2.249, 2.257, 2.214, 2.193, 2.192]
    assert list(TABLES["mlp-ratio"].losses.values()) == [2.389, 2.339, 2.289, 2.223, 2.185, 2.181, 2.192]
    ladder = TABLES["ladder"].losses
    assert (ladder[RMSNORM], ladder[f"{RMSNORM}_swiglu"], ladder[f"{RMSNORM}_swiglu_mlpdim"]) == (2.246, 2.192, 2.181)
    assert ladder["gpt2"] is None


def test_every_line_is_a_variant_and_every_step_of_the_ladder_is_a_line():
    lines = {name for table in TABLES.values() for name in table.losses}
    assert lines <= all_variants().keys()
    step, steps = find_variant(f"{RMSNORM}_swiglu_mlpdim_gqa"), []
    while step.parent is not None:
        steps.append(step.name)
        step = find_variant(step.parent)
    assert [*reversed([*steps, "gpt2"])] == [name for name in TABLES["ladder"].losses if "every_layer" not in name]
    assert {name for name in all_variants() if name.startswith(("activation_", "mlp_ratio_"))} <= lines


def test_numbers_of_one_architecture_agree_across_tables():
    found = {}
    for table in TABLES.values():
        for name, loss in table.losses.items():
            variant = find_variant(name)
            if loss is not None and variant.activation in ("swiglu", "gelu"):
                found.setdefault((variant.activation, variant.bias, variant.mlp_ratio), set()).add(loss)
    assert found["gelu", True, 4.0] == {2.246}
    assert found["swiglu", False, 3.5] == {2.181}
    # Printed once with 2.192 in both tables.
    assert found["swiglu", False, 4.0] == {2.192}


def test_known_order_is_by_number_and_by_word():
    table = PublishedTable(name="t", title="", losses={"a": 2.0, "b": 1.0, "c": None}, better=(("c", "a"),))
    assert table.order() == [("b", "a"), ("c", "a")]
    runs = {"a": run_of("a", 5.0), "b": run_of("b", 5.1), "c": run_of("c", 4.0)}
    assert inversions(table, runs) == [("b", "a")]


def test_table_shows_both_and_says_where_they_differ():
    losses = {"mlp_ratio_1": 5.0, "mlp_ratio_1_5": 4.9, "mlp_ratio_2": 4.95, "mlp_ratio_8_3": 4.8, "mlp_ratio_3": 4.7,
              "mlp_ratio_3_5": 4.6, "mlp_ratio_4": 4.5}  # fmt: skip
    lines = table_text(TABLES["mlp-ratio"], {name: run_of(name, loss) for name, loss in losses.items()}).split("\n")
    names = ["variant", "published", "change", "here", "change", "parameters", "ms/step"]
    assert lines[0].split() == names
    assert lines[2].split() == ["mlp_ratio_1", "2.389", "5.000", "1000", "250"]
    # 2.339 / 2.389 and 4.9 / 5.0.
    assert lines[3].split() == ["mlp_ratio_1_5", "2.339", "-2.1", "%", "4.900", "-2.0", "%", "1000", "250"]
    # 21 pairs; C = 2 against 1.5, and C = 4 against 3.5 and 3, are the other way round.
    assert "of 21 pairs whose order is published, 18 have it here too" in lines
    assert "  differs: mlp_ratio_2 is published as better than mlp_ratio_1_5, here it is worse by 0.050" in lines


def test_a_variant_keeps_its_architecture_at_toy_size():
    toy = toy_variant(f"{RMSNORM}_swiglu_mlpdim_gqa", LadderSettings(), 2048)
    assert (toy.num_layers, toy.hidden_size, toy.ffn_hidden_size, toy.num_query_groups) == (3, 128, 448, 1)
    toy = toy_variant("gpt2", LadderSettings(), 2048)
    assert (toy.positions, toy.norm_placement, toy.bias, toy.hidden_dropout) == ("sinusoidal", "post", True, 0.1)


def test_recipe_and_data_are_those_of_all(tmp_path):
    corpus = Corpus(tokenizer=tmp_path / "t.model", prefix=tmp_path / "d", documents=1, tokens=1)
    one, other = (training_words(name, tmp_path, corpus, LadderSettings()) for name in ("gpt2", "activation_relu"))
    assert [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]] == [("gpt2", "activation_relu")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "3"], "--steps is 3, expected at least 10: fewer show no difference"),
        (["--jobs", "0"], "--jobs is 0, expected at least 1"),
        (["--data", "nowhere"], "--data nowhere: there is neither a file of JSON Lines nor a dataset nowhere.idx"),
    ],
)
def test_bad_input(words, message, tmp_path, capsys):
    assert main(["ladder", "--output", str(tmp_path / "out"), *words]) == 2
    assert capsys.readouterr().err == f"megatron-ru: error: {message}\n"


def test_token_ids_need_their_tokenizer(tmp_path, capsys):
    (tmp_path / "d.idx").touch()
    assert main(["ladder", "--output", str(tmp_path / "out"), "--data", str(tmp_path / "d")]) == 2
    assert "d.idx holds token ids; give their tokenizer with --tokenizer-model FILE" in capsys.readouterr().err


@pytest.mark.slow
def test_ladder_of_a_few_steps(tmp_path):
    text = tmp_path / "ru.jsonl"
    with text.open("w") as stream:
        for number in range(3000):
            line = f"слово {number} — это слово, за которым идёт число {number + 1}; дерево {number % 7} растёт."
            stream.write(json.dumps({"text": line}, ensure_ascii=False) + "\n")
    words = ["ladder", "--table", "mlp-ratio", "--steps", "10", "--data", str(text), "--output", "out"]
    tokenizer = tmp_path / "small.model"
    train = ["tokenizer", "train", "--input", str(text), "--vocab-size", "350", "--output", str(tokenizer)]
    assert main(train) == 0
    command = [sys.executable, "-m", "megatron_ru", *words, "--tokenizer-model", str(tokenizer)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    lines = results["tables"]["mlp-ratio"]
    assert [line["line"] for line in lines] == list(TABLES["mlp-ratio"].losses)
    assert all(line["validation_loss"] < line["first_validation_loss"] - 0.1 for line in lines)
    assert all(len(line["train_losses"]) == 10 for line in lines)
    counts = [line["parameters"] for line in lines]
    # Three matrices of 128 by C·128, in three layers.
    assert counts[2] - counts[0] == 3 * 3 * 128 * 128
    for name in ("mlp-ratio_curves.png", "mlp-ratio_losses.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    # A second call has nothing to train and says the same.
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert again.stdout.count("2.389") == 1
