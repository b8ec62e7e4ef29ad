"""Rows of a parquet file as JSON lines, so that every stage that reads lines reads parquet too.

Memory holds a few hundred rows and their column pages, not a row group. A text that is not UTF-8, which a careless
writer can put there, arrives as it is and is found malformed like any other line.
"""

import json
import math
import os
from collections.abc import Iterator
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.extras import require

_ROWS_AT_ONCE = 256


def read_rows(path: str | os.PathLike[str], only_field: str | None = None) -> Iterator[tuple[int, bytes, int]]:
    """Yields the number of each row, from 1, its fields as a JSON object, and an estimate of the bytes read so far.

    With `only_field` the object has this field alone. Raises UserError without pyarrow, for a file that is not sound,
    and when the field is missing from its schema.
    """
    parquet = require("pyarrow.parquet", "reading .parquet", "data")
    arrow = require("pyarrow", "reading .parquet", "data")
    size = os.path.getsize(path)
    try:
        with parquet.ParquetFile(path, memory_map=False, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            if only_field is not None and only_field not in names:
                raise UserError(f"{path} has no column {only_field!r} (its columns: {', '.join(map(repr, names[:8]))})")
            rows = max(file.metadata.num_rows, 1)
            number = 0
            columns = None if only_field is None else [only_field]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
                for fields in _records(arrow, batch):
                    number += 1
                    yield number, _as_json(fields), size * number // rows
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except arrow.ArrowException as error:
        raise UserError(f"{path} is not sound parquet ({error}); get it again") from None


def _records(arrow: Any, batch: Any) -> Iterator[dict[str, Any]]:
    columns = {name: _values(arrow, batch.column(index)) for index, name in enumerate(batch.schema.names)}
    for row in range(batch.num_rows):
        yield {name: values[row] for name, values in columns.items()}


def _values(arrow: Any, column: Any) -> list[Any]:
    # As bytes, because to_pylist would raise on a text that is not UTF-8, and lose the others with it.
    if arrow.types.is_string(column.type):
        return list(column.cast(arrow.binary()).to_pylist())
    if arrow.types.is_large_string(column.type):
        return list(column.cast(arrow.large_binary()).to_pylist())
    if arrow.types.is_dictionary(column.type):
        return _values(arrow, column.dictionary_decode())
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, arrow.ArrowException):
        # Nanoseconds, years beyond 9999, time zones that are not known here, texts in lists that are not UTF-8: what
        # Python has no value for.
        return [_printed(arrow, value) for value in column]


def _printed(arrow: Any, value: Any) -> Any:
    """A scalar as Python has it, otherwise as arrow prints it."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        # Halves of surrogate pairs, which make the line malformed.
        if isinstance(error.object, bytes) and not isinstance(value, arrow.ListScalar | arrow.StructScalar):
            return error.object.decode("utf-8", "surrogateescape")
    except (ValueError, OverflowError, arrow.ArrowException):
        pass
    if isinstance(value, arrow.StructScalar):
        return {name: _printed(arrow, inner) for name, inner in value.items()}
    if isinstance(value, arrow.ListScalar):
        return [_printed(arrow, inner) for inner in value.values]
    try:
        return value.cast(arrow.string()).as_py()
    except arrow.ArrowException:
        return str(value.value)


def _as_json(fields: dict[str, Any]) -> bytes:
    members = (
        json.dumps(name, ensure_ascii=False).encode() + b":" + _value_json(value) for name, value in fields.items()
    )
    return b"{" + b",".join(members) + b"}"


def _value_json(value: Any) -> bytes:
    if isinstance(value, bytes):
        try:
            return json.dumps(value.decode("utf-8"), ensure_ascii=False).encode()
        except UnicodeDecodeError:
            return b'"' + value.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n") + b'"'
    # Dates and the like become what they print.
    try:
        spelled = json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        spelled = json.dumps(_finite(value), ensure_ascii=False, default=str)
    return spelled.encode("utf-8", "surrogatepass")


def _finite(value: Any) -> Any:
    """`value` with null in the place of each number that JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
