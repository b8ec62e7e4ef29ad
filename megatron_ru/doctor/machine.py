"""What this machine offers: packages, GPUs, compilers, and the form that each op runs in."""

import dataclasses
import importlib
import importlib.util
import os
import platform
import socket
import sys
from collections.abc import Iterator
from typing import Any

from megatron_ru.doctor import versions
from megatron_ru.doctor.finding import Finding
from megatron_ru.doctor.gpus import GpuTrouble, gpu_findings, read_gpus


def examine() -> Iterator[Finding]:
    """The findings, in the order in which one depends on another."""
    yield Finding(subject="python", verdict="ok", detail=f"{platform.python_version()} ({sys.executable})")
    ranges = versions.supported_ranges()
    core = {name: versions.version_of(name) for name in ("torch", "megatron-core", *versions.needed_always())}
    yield from versions.core_findings(core, ranges)
    if core["torch"] is None:
        return
    try:
        import torch
    except (ImportError, OSError) as error:
        detail = f"is installed and cannot be imported ({_first_line(error)}): install it again"
        yield Finding(subject="torch", verdict="broken", detail=detail)
        return
    cuda = f"built with CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding(subject="cuda", verdict="ok" if torch.version.cuda else "absent", detail=f"torch is {cuda}")
    yield from _gpus()
    yield from _compilers()
    yield from _ops()
    optional = {name: versions.version_of(name) for name in versions.OPTIONAL}
    yield from versions.optional_findings(optional, ranges)
    apex = versions.apex_finding(optional["apex"], versions.has_apex_extensions())
    if apex is not None:
        yield apex


def describe() -> dict[str, Any]:
    """What a node tells the others: the fields of `measurements.Description`, with its findings as objects."""
    findings = [dataclasses.asdict(finding) for finding in examine()]
    installed = {"python": versions.python_version()}
    installed |= {name: version for name in versions.SHARED if (version := versions.version_of(name)) is not None}
    gpus, gpu = 0, ""
    if importlib.util.find_spec("torch") is not None:
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        gpu = torch.cuda.get_device_name(0) if gpus else ""
        nccl: Any = importlib.import_module("torch.cuda.nccl")
        if gpus and torch.distributed.is_nccl_available():
            installed["nccl"] = ".".join(map(str, nccl.version()))
    loopback = name_is_loopback()
    return {"versions": installed, "gpus": gpus, "gpu": gpu, "loopback": loopback, "findings": findings}


def name_is_loopback() -> bool:
    """Whether this host's own name stands for an address that no other host reaches, as in Debian's /etc/hosts."""
    try:
        return socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        return False


def _gpus() -> Iterator[Finding]:
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        gpus = read_gpus()
    except GpuTrouble as trouble:
        yield Finding(subject="nvidia-smi", verdict="broken", detail=str(trouble))
        gpus = None
    if gpus:
        yield from gpu_findings(gpus)
        if not seen and os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            yield Finding(subject="gpu", verdict="absent", detail="CUDA_VISIBLE_DEVICES hides all from torch")
        elif not seen:
            detail = f"the driver sees {len(gpus)}, torch {torch.__version__} none: install the build of torch for CUDA"
            detail += " that the driver can run, and look at CUDA_VISIBLE_DEVICES"
            yield Finding(subject="gpu", verdict="broken", detail=detail)
        return
    for index in range(seen):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        detail = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}; no nvidia-smi, errors unknown"
        yield Finding(subject=f"gpu {index}", verdict="ok", detail=detail)
    if not seen:
        yield Finding(subject="gpu", verdict="absent", detail="torch sees none: runs go to the CPU (--device cpu)")


def _compilers() -> Iterator[Finding]:
    from megatron_ru.ops import backend
    from megatron_ru.ops.build import Torch, default_archs, find_compiler, find_nvccs

    # Whoever has the library needs no compiler.
    lacking = "slow" if backend.library_status().path is None else "absent"
    compiler = find_compiler()
    yield Finding(
        subject="c++ compiler",
        verdict=lacking if compiler is None else "ok",
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
        yield Finding(subject="nvcc", verdict="ok" if fits else "absent", detail=detail)
    if not nvccs:
        detail = "none was found in CUDA_HOME, /usr/local/cuda, PATH or the CUDA wheels; it compiles the CUDA ops"
        yield Finding(subject="nvcc", verdict=lacking if torch.sees_gpu else "absent", detail=detail)


def _ops() -> Iterator[Finding]:
    from megatron_ru.ops import backend
    from megatron_ru.ops.build import Torch

    status = backend.library_status()
    yield Finding(subject="ops", verdict="slow" if status.path is None else "ok", detail=status.summary())
    devices = ("cpu", "cuda") if Torch.running().sees_gpu else ("cpu",)
    for name in sorted(backend.known()):
        reasons = {device: backend.switch(name).why_not(device) for device in devices}
        forms = [
            f"{device} {'fused' if not reason else f'plain torch: {reason}'}" for device, reason in reasons.items()
        ]
        if status.path is None:
            forms = ["plain torch, without compiled ops"]
        # What runs on a GPU is what counts where there is one.
        verdict = "slow" if reasons[devices[-1]] or status.path is None else "ok"
        yield Finding(subject=f"op {name}", verdict=verdict, detail="; ".join(forms))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
