"""Lists the known architectures: name, parent, difference, parameters with tied and untied embeddings.

    megatron-ru variants                       the table
    megatron-ru variants ru_7b3 llama2_7b      some of them
    megatron-ru variants --json                every field, for programs
    megatron-ru variants ru_7b3 --arguments    the Megatron-LM flags that --ru-variant ru_7b3 stands for

Parameters are counted on modules built on torch's meta device, without vocabulary padding.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from typing import Any

from megatron_ru.foundation.errors import UserError

NAME = "variants"
SUMMARY = "list the architectures that --ru-variant knows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the names and the two forms of output."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="variants to show; default: all")
    parser.add_argument("--json", action="store_true", help="print a list of objects with every field")
    parser.add_argument(
        "--arguments", action="store_true", help="print the Megatron-LM flags that each NAME stands for"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints what was asked for. Raises `UserError` for an unknown name."""
    from megatron_ru.models.variant import all_variants, find_variant

    if arguments.json and arguments.arguments:
        raise UserError("--json and --arguments are two forms of output; choose one of them")
    if arguments.arguments and not arguments.names:
        raise UserError("--arguments needs the name of a variant, as in `megatron-ru variants ru_7b3 --arguments`")
    chosen = [find_variant(name) for name in arguments.names] or list(all_variants().values())
    if arguments.arguments:
        for variant in chosen:
            _print_arguments(variant)
        return 0
    records = [describe(variant) for variant in chosen]
    if arguments.json:
        json.dump(records, sys.stdout, ensure_ascii=False, indent=2)
        print()
    else:
        print(table(records))
    return 0


def describe(variant: Any) -> dict[str, Any]:
    """Every field of the variant, its derived sizes and its parameters as a JSON object."""
    from megatron_ru.models.parameter_count import parameters_on_meta

    fields = {item.name: getattr(variant, item.name) for item in dataclasses.fields(variant)}
    tied, untied = parameters_on_meta(variant, tied=True), parameters_on_meta(variant, tied=False)
    return {
        **fields,
        "recipe": dict(variant.recipe),
        "ffn_hidden_size": variant.ffn_hidden_size,
        "head_size": variant.head_size,
        "num_query_groups": variant.num_query_groups,
        "tied": variant.tied_embeddings,
        "parameters": tied if variant.tied_embeddings else untied,
        "parameters_tied": tied,
        "parameters_untied": untied,
    }


def table(records: list[dict[str, Any]]) -> str:
    """The records as aligned columns; a star marks the variant's own choice of tied or untied embeddings."""
    header = (
        "variant",
        "parent",
        "tied",
        "untied",
        "layers x hidden/ffn, heads/kv, tokens, context",
        "difference",
    )
    rows = [header]
    for record in records:
        rows.append(
            (
                record["name"],
                record["parent"] or "-",
                _short(record["parameters_tied"]) + ("*" if record["tied"] else " "),
                _short(record["parameters_untied"]) + (" " if record["tied"] else "*"),
                f"{record['num_layers']} x {record['hidden_size']}/{record['ffn_hidden_size']}, "
                f"{record['num_attention_heads']}/{record['num_query_groups']}, {record['vocab_size']}, "
                f"{record['seq_length']}",
                record["difference"],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    right = {2, 3}
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.append("* the variant's own choice; --ru-tie-embeddings and --no-ru-tie-embeddings change it")
    return "\n".join(lines)


def _print_arguments(variant: Any) -> None:
    from megatron_ru.models.variant_arguments import beyond_megatron, command_line

    print(shlex.join(command_line(variant)))
    missing = beyond_megatron(variant)
    if missing:
        print(
            f"megatron-ru: note: Megatron-LM has no flag for {', '.join(missing)}: "
            f"these need --ru-variant {variant.name}",
            file=sys.stderr,
        )


def _short(count: int) -> str:
    for unit, size in (("B", 1_000_000_000), ("M", 1_000_000)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return f"{count / 1000:.0f}k"
