"""`megatron-ru build`: what it hands on, and what it says."""

from pathlib import Path

import pytest

from megatron_ru.commands import build as command
from megatron_ru.commands.main import main
from megatron_ru.ops.build import Built, Plan


@pytest.fixture
def built(monkeypatch):
    """Notes what the command asks for and answers with `answer`."""

    class Answer:
        asked: tuple = ()
        built = Built(path=Path("ops.so"), plan=Plan(kind="cpu", reason="asked for"), compiled=3, seconds=12.3)

    def build(kind, archs, *, force, say):
        Answer.asked = (kind, archs, force)
        return Answer.built

    monkeypatch.setattr(command, "build", build)
    return Answer


def test_words_reach_the_build(built, capsys):
    assert main(["build"]) == 0
    assert built.asked == ("auto", (), False)
    assert capsys.readouterr().out == "ops.so: 3 files compiled in 12 s\n"
    assert main(["build", "--kind", "cuda", "--archs", "80,9.0", "--force"]) == 0
    assert built.asked == ("cuda", (80, 90), True)


def test_nothing_to_do_is_said_with_its_reason(built, capsys):
    built.built = Built(path=Path("ops.so"), plan=Plan(kind="cpu", reason="asked for"), compiled=0, seconds=0.0)
    main(["build"])
    assert capsys.readouterr().out == "ops.so: up to date (asked for)\n"
    built.built = Built(path=None, plan=Plan(kind="none", reason="no C++ compiler was found"), compiled=0, seconds=0.0)
    assert main(["build"]) == 0
    assert capsys.readouterr().out == "nothing was built: no C++ compiler was found\n"


def test_wrong_architecture_is_one_sentence(built, capsys):
    assert main(["build", "--archs", "hopper"]) == 2
    assert capsys.readouterr().err == (
        "megatron-ru: error: 'hopper' is no CUDA architecture: expected numbers such as 80,90 for A100 and H100\n"
    )


def test_none_builds_nothing(capsys):
    assert main(["build", "--kind", "none"]) == 0
    assert capsys.readouterr().out == "nothing was built: asked for none\n"
