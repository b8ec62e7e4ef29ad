"""The console script `megatron-ru`."""

import argparse
import importlib
import pkgutil
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from megatron_ru import __version__, commands
from megatron_ru.foundation.errors import UserError


def discover_commands(word: str = "") -> dict[str, ModuleType]:
    """The command modules of this package by the word that calls them, in alphabetical order.

    Only that of `word` where it is the name of one: a keeper starts with every rank, and needs none of the others.
    """
    names = [entry.name for entry in pkgutil.iter_modules(commands.__path__) if entry.name != "main"]
    found = {}
    for name in [word] if word in names else names:
        module = importlib.import_module(f"{commands.__name__}.{name}")
        found[getattr(module, "NAME", name)] = module
    return dict(sorted(found.items()))


def build_parser(modules: dict[str, ModuleType]) -> argparse.ArgumentParser:
    """The parser of `megatron-ru` with a subparser for each command."""
    parser = argparse.ArgumentParser(
        prog="megatron-ru",
        description="Pretrain LLaMA-style models on an unmodified Megatron-Core and adapt them to Russian.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-ru {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in modules.items():
        raw = hasattr(module, "run_raw")
        subparser = subparsers.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            add_help=not raw,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if not raw:
            module.add_arguments(subparser)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 2 bad input, 1 anything else that failed."""
    words = list(sys.argv[1:] if words is None else words)
    # A terminated command takes its unfinished files with it, as an interrupted one does.
    signal.signal(signal.SIGTERM, _end_on_signal)
    modules = discover_commands(words[0] if words else "")
    try:
        if words and words[0] in modules and hasattr(modules[words[0]], "run_raw"):
            return modules[words[0]].run_raw(words[1:]) or 0
        arguments = build_parser(modules).parse_args(words)
        return modules[arguments.command].run(arguments) or 0
    except UserError as error:
        print(f"megatron-ru: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has seen enough.
        sys.stderr.close()
        return 141


def _end_on_signal(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
