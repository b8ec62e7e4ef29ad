"""Say what this machine and environment offer: torch, Megatron-Core, compilers, GPUs, and which form each op runs in.

megatron-ru doctor           a verdict per line: ok, or what is missing and what to do about it
megatron-ru doctor --json    the same as a list of objects, for programs
"""

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator

NAME = "doctor"
SUMMARY = "say which compiled ops are in use, and why not where they are not"

# Never required; benchmarks compare with them where they are installed.
_PEERS = {
    "liger-kernel": "Liger-Kernel",
    "transformer-engine": "TransformerEngine",
    "apex": "NVIDIA Apex",
    "quack-kernels": "QuACK",
    "flash-attn": "FlashAttention",
    "deepspeed": "DeepSpeed",
    "transformers": "Hugging Face transformers",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    subject: str
    verdict: str
    """ok, missing (something that would help is not there) or absent (nobody needs it)."""
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the form of output."""
    parser.add_argument("--json", action="store_true", help="print a list of objects")


def run(arguments: argparse.Namespace) -> int:
    """Prints the findings. Returns 0: what is missing makes a run slower, not wrong."""
    findings = list(examine())
    if arguments.json:
        json.dump([dataclasses.asdict(finding) for finding in findings], sys.stdout, ensure_ascii=False, indent=2)
        print()
        return 0
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{finding.subject:{width}}  {finding.verdict:7}  {finding.detail}")
    return 0


def examine() -> Iterator[Finding]:
    """The findings, in the order in which one depends on another."""
    yield Finding(subject="python", verdict="ok", detail=f"{platform.python_version()} ({sys.executable})")
    torch_version = _version("torch")
    if torch_version is None:
        yield Finding(subject="torch", verdict="missing", detail="not installed: pip install torch")
        return
    yield from _packages_and_gpus()
    yield from _compilers()
    yield from _ops()
    for distribution, name in _PEERS.items():
        version = _version(distribution)
        verdict = "absent" if version is None else "ok"
        yield Finding(subject=distribution, verdict=verdict, detail=f"{name} {version or 'is not installed: optional'}")


def _packages_and_gpus() -> Iterator[Finding]:
    import torch

    cuda = f"built with CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding(subject="torch", verdict="ok", detail=f"{torch.__version__}, {cuda}")
    core = _version("megatron-core")
    yield Finding(
        subject="megatron-core",
        verdict="missing" if core is None else "ok",
        detail=core or "not installed: pip install megatron-core",
    )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield Finding(
            subject=f"gpu {index}",
            verdict="ok",
            detail=f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}",
        )
    if not count:
        yield Finding(subject="gpu", verdict="absent", detail="torch sees none: runs go to the CPU (--device cpu)")


def _compilers() -> Iterator[Finding]:
    from megatron_ru.ops.build import Torch, default_archs, find_compiler, find_nvccs

    compiler = find_compiler()
    yield Finding(
        subject="c++ compiler",
        verdict="missing" if compiler is None else "ok",
        detail=compiler or "none was found, so the CPU ops cannot be built: apt install g++, or set CXX",
    )
    torch = Torch.running()
    # The first of each version is what a build takes.
    nvccs = {nvcc.version: nvcc for nvcc in reversed(find_nvccs(torch))}.values()
    for nvcc in nvccs:
        version = f"{nvcc.version[0]}.{nvcc.version[1]}"
        fits = torch.cuda is not None and torch.cuda.partition(".")[0] == str(nvcc.version[0])
        archs = ", ".join(f"sm_{arch}" for arch in default_archs(nvcc))
        detail = f"{nvcc.path}, CUDA {version}"
        detail += f", compiles for {archs}" if fits else f": torch needs CUDA {torch.cuda}, another major version"
        yield Finding(subject="nvcc", verdict="ok" if fits else "missing", detail=detail)
    if not nvccs:
        gpu = torch.sees_gpu
        yield Finding(
            subject="nvcc",
            verdict="missing" if gpu else "absent",
            detail="none was found in CUDA_HOME, /usr/local/cuda, PATH or the CUDA wheels; it compiles the CUDA ops",
        )


def _ops() -> Iterator[Finding]:
    from megatron_ru.ops import backend
    from megatron_ru.ops.build import Torch

    status = backend.library_status()
    yield Finding(subject="ops", verdict="missing" if status.path is None else "ok", detail=status.summary())
    devices = ("cpu", "cuda") if Torch.running().sees_gpu else ("cpu",)
    for name in sorted(backend.known()):
        reasons = {device: backend.switch(name).why_not(device) for device in devices}
        forms = [
            f"{device} {'fused' if not reason else f'plain torch: {reason}'}" for device, reason in reasons.items()
        ]
        if status.path is None:
            forms = ["plain torch, without compiled ops"]
        verdict = "missing" if any(reasons.values()) else "ok"
        yield Finding(subject=f"op {name}", verdict=verdict, detail="; ".join(forms))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
