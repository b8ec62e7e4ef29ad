import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from megatron_ru.plugin.light_imports import light_imports, when_called

SENTENCEPIECE = ("--tokenizer-type", "SentencePieceTokenizer")


def take_out():
    """The modules of transformers that are imported, which are not from then on."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "transformers"}


@pytest.fixture(autouse=True)
def not_imported():
    before = take_out()
    yield
    take_out()
    sys.modules.update(before)


def imports_transformers():
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (SENTENCEPIECE, False),
        (("--tokenizer-type=NullTokenizer",), False),
        (("--tokenizer-type", "HuggingFaceTokenizer"), True),
        ((), True),
        ((*SENTENCEPIECE, "--use-checkpoint-args"), True),
        ((*SENTENCEPIECE, "--use-tokenizer-model-from-checkpoint-args"), True),
        ((*SENTENCEPIECE, "--yaml-cfg", "x.yaml"), True),
        ((*SENTENCEPIECE, "--tokenizer-type", "HuggingFaceTokenizer"), True),
    ],
)
def test_transformers_are_there_for_a_tokenizer_that_needs_them(monkeypatch, words, found):
    other = ModuleType("transformers")
    monkeypatch.setattr(sys, "meta_path", [Finder(other), *sys.meta_path])
    with light_imports(words):
        assert imports_transformers() == found
    assert imports_transformers()


def test_transformers_that_are_imported_already_stay(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    with light_imports(SENTENCEPIECE):
        assert imports_transformers()
    assert "transformers" in sys.modules


class Finder:
    def __init__(self, module):
        self._module = module

    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            return ModuleSpec(name, self)
        return None

    def create_module(self, spec):
        return self._module

    def exec_module(self, module):
        pass


def test_a_function_is_compiled_once_when_it_is_called():
    compiled = []

    def compiler(function, **options):
        compiled.append((function.__name__, options))
        return lambda *arguments: ("compiled", function(*arguments))

    compile_later = when_called(compiler)

    @compile_later
    def double(x):
        """Twice."""
        return 2 * x

    @compile_later(dynamic=True)
    def triple(x):
        return 3 * x

    assert (compiled, double.__doc__) == ([], "Twice.")
    assert [double(1), double(2), triple(1)] == [("compiled", 2), ("compiled", 4), ("compiled", 3)]
    assert compiled == [("double", {}), ("triple", {"dynamic": True})]


def test_the_compiler_is_torch_s_again_afterwards():
    before = torch.compile
    with light_imports(()):
        assert torch.compile is not before
    assert torch.compile is before


def test_a_start_leaves_compiler_and_transformers_alone():
    program = f"""
import sys
from megatron_ru.plugin.light_imports import light_imports
with light_imports({SENTENCEPIECE!r}):
    import megatron.training
import torch
from megatron_ru.ops.adamw import FusedAdamW
FusedAdamW([torch.nn.Parameter(torch.ones(2))])
print("loaded", sorted({{"transformers", "torch._dynamo"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["loaded []"], done.stderr
