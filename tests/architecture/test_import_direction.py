"""Imports point downwards: a room knows the rooms below it and none beside or above."""

import ast
from pathlib import Path

import megatron_ru

PACKAGE = Path(megatron_ru.__file__).parent

FLOORS = {
    "foundation": 0,
    "config": 1,
    **dict.fromkeys(("text", "tokenizer", "ops", "planning", "launch", "seams", "figures"), 2),
    **dict.fromkeys(("tokens", "models"), 3),
    **dict.fromkeys(("batches", "gradients", "checkpoints"), 4),
    **dict.fromkeys(("adaptation", "evaluation", "plugin", "data"), 5),
    **dict.fromkeys(("engines", "hosts", "experiments", "benchmarks", "doctor"), 6),
    "commands": 7,
}
# The modules beside the rooms are doors from outside, above all floors.
DOORS = {"__init__", "__main__", "autoload", "pretrain_gpt"}

# Who may name the packages that train.
OWNERS = {
    "megatron.training": {"engines", "hosts", "plugin"},
    "deepspeed": {"engines", "hosts"},
}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path):
    """Every module that the file imports anywhere, each `from a import b` as `a.b`, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import absolutely, so that the room is seen"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def test_every_room_has_a_floor():
    found = {room_of(path) for path in modules()}
    assert found - DOORS <= FLOORS.keys()


def test_rooms_import_downwards_only():
    wrong = []
    for path in modules():
        room = room_of(path)
        floor = FLOORS.get(room, 8)
        for name, line in imported_names(path):
            package, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if package != "megatron_ru" or target in (room, "", "__version__"):
                continue
            # Taken from the package itself, as commands do: rooms only, so that floors can be compared.
            if FLOORS.get(target, 8) >= floor:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {room} imports {name}")
    assert wrong == []


def test_training_packages_are_named_by_their_owners_only():
    wrong = []
    for path in modules():
        for name, line in imported_names(path):
            for package, owners in OWNERS.items():
                if (name == package or name.startswith(f"{package}.")) and room_of(path) not in owners:
                    wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {name} belongs to {sorted(owners)}")
    assert wrong == []


def test_foundation_imports_the_standard_library_only():
    import sys

    for path in sorted((PACKAGE / "foundation").glob("*.py")):
        outside = {name.partition(".")[0] for name, _ in imported_names(path)}
        # mpi4py is imported by the child process of one function there.
        assert outside - set(sys.stdlib_module_names) <= {"megatron_ru", "mpi4py"}, path


def test_no_module_is_called_utils():
    assert [path for path in modules() if path.stem in ("utils", "helpers", "misc", "common")] == []
