"""Compile the ops of csrc for the torch of this environment.

    megatron-ru build                        CPU ops, and CUDA ops where torch sees a GPU
    megatron-ru build --kind cuda            CUDA ops too, on a machine that has nvcc and no GPU
    megatron-ru build --kind cuda --archs 90 for one architecture, which takes less time
    megatron-ru build --force                every file again

The library goes into the installed package, or into ~/.cache/megatron_ru where that cannot be written to, under a name
that tells its torch, kind and sources. MEGATRON_RU_BUILD and MEGATRON_RU_CUDA_ARCHES stand for --kind and --archs;
MAX_JOBS limits how many files are compiled at a time. `megatron-ru doctor` says which library is used.
"""

import argparse

from megatron_ru.ops.build import KINDS, build, parse_archs

NAME = "build"
SUMMARY = "compile the CPU and CUDA ops for the installed torch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what to build."""
    parser.add_argument(
        "--kind", choices=KINDS, default="auto",
        help="auto takes CUDA ops where torch sees a GPU or --archs is given (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--archs", default="", metavar="N,N",
        help="compute capabilities to compile for (default: 80,90, and 70 too where nvcc can)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="compile every file again")


def run(arguments: argparse.Namespace) -> int:
    """Builds, and says what and where. Returns 0; raises UserError."""
    archs = parse_archs(arguments.archs) if arguments.archs else ()
    built = build(arguments.kind, archs, force=arguments.force, say=print)
    if built.path is None:
        print(f"nothing was built: {built.plan.reason}")
    elif built.compiled:
        print(f"{built.path}: {built.compiled} files compiled in {built.seconds:.0f} s")
    else:
        print(f"{built.path}: up to date ({built.plan.reason})")
    return 0
