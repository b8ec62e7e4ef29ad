"""Which packages are installed, and whether the versions are among the supported ones."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator, Mapping

from megatron_ru.doctor.finding import Finding

# Never required: adapters and comparisons use them where they are installed.
OPTIONAL = {
    "deepspeed": "DeepSpeed",
    "mpi4py": "mpi4py",
    "transformer-engine": "TransformerEngine",
    "apex": "NVIDIA Apex",
    "flash-attn": "FlashAttention",
    "liger-kernel": "Liger-Kernel",
    "quack-kernels": "QuACK",
    "transformers": "Hugging Face transformers",
}
# What ranks on different hosts have to have in common; python and NCCL are added by `same_everywhere`.
SHARED = ("megatron-ru", "torch", "megatron-core", "triton", "numpy", *OPTIONAL)
_OURS = "megatron-ru"


def version_of(distribution: str) -> str | None:
    """The installed version, None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def supported_ranges() -> dict[str, str]:
    """The range of versions for each distribution that our own metadata names; empty where we are not installed."""
    from packaging.requirements import Requirement

    try:
        written = importlib.metadata.requires(_OURS) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, str] = {}
    for requirement in map(Requirement, written):
        extras = ("", "deepspeed", "mpi", "hf")
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            found.setdefault(requirement.name, str(requirement.specifier))
    return found


def needed_always() -> list[str]:
    """The distributions that our metadata requires without an extra, beside torch and megatron-core."""
    from packaging.requirements import Requirement

    try:
        requirements = map(Requirement, importlib.metadata.requires(_OURS) or [])
    except importlib.metadata.PackageNotFoundError:
        return []
    plain = [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]
    return [item.name for item in plain if item.name not in ("torch", "megatron-core")]


def in_range(version: str, supported: str) -> bool:
    """Whether the release that `version` belongs to is in the range.

    The images of NVIDIA carry torch 2.8.0a0+5228986c39.nv25.6, which counts as 2.8 here and below 2.8 in PEP 440.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    return SpecifierSet(supported).contains(Version(Version(version).base_version))


def core_findings(installed: Mapping[str, str | None], ranges: Mapping[str, str]) -> Iterator[Finding]:
    """torch and megatron-core, then one line for the other packages that every run imports."""
    for name in ("torch", "megatron-core"):
        yield _judged(name, installed.get(name), ranges.get(name, ""), name)
    wrong = []
    others = [name for name in installed if name not in ("torch", "megatron-core")]
    for name in others:
        version = installed[name]
        if version is None:
            wrong.append(f"{name} is not installed")
        elif not in_range(version, ranges.get(name, "")):
            wrong.append(f"{name} {version} is outside {ranges[name]}")
    yield Finding(
        subject="packages",
        verdict="broken" if wrong else "ok",
        detail=f"{'; '.join(wrong)}: pip install {_OURS}" if wrong else f"{len(others)} others that every run imports",
    )


def optional_findings(installed: Mapping[str, str | None], ranges: Mapping[str, str]) -> Iterator[Finding]:
    """What a run does without; a version of it that does not fit is told, since it is imported where it is found."""
    for name, title in OPTIONAL.items():
        version = installed.get(name)
        if version is None:
            yield Finding(subject=name, verdict="absent", detail=f"{title} is not installed: optional")
        else:
            yield _judged(name, version, ranges.get(name, ""), title)


def apex_finding(version: str | None, has_extensions: bool) -> Finding | None:
    """A warning where `apex` is there without its CUDA extensions; another program on PyPI has that name too."""
    if version is None or has_extensions:
        return None
    return Finding(
        subject="apex extensions",
        verdict="slow",
        detail=f"apex {version} has no amp_C: it is Apex without its CUDA extensions, or PyPI's other program of that "
        "name, and nothing here uses it: pip uninstall apex, or build NVIDIA's with its extensions",
    )


def has_apex_extensions() -> bool:
    """Whether the compiled part of NVIDIA Apex can be imported."""
    return importlib.util.find_spec("amp_C") is not None


def python_version() -> str:
    """The version of this interpreter, as in 3.12.1."""
    return ".".join(map(str, sys.version_info[:3]))


def _judged(name: str, version: str | None, supported: str, title: str) -> Finding:
    wanted = f"{name}{supported}"
    if version is None:
        return Finding(subject=name, verdict="broken", detail=f"not installed: pip install '{wanted}'")
    if not in_range(version, supported):
        return Finding(
            subject=name,
            verdict="broken",
            detail=f"{title} {version} is outside the supported {supported}: pip install '{wanted}'",
        )
    detail = f"{version}, supported {supported}" if supported else version
    return Finding(subject=name, verdict="ok", detail=detail if title == name else f"{title} {detail}")
