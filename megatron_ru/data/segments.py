"""What reading leaves of each stretch of text: a digest of each document, and the sizes of each line.

A segment is up to 128 MiB of text, or a million lines. `NAME.digests` holds a record of each document, sorted by
digest; `NAME.lines` one of each line, in order.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

DIGESTS = np.dtype([("high", "<u8"), ("low", "<u8"), ("line", "<u4")])
"""md5 of the text, as `text.jsonl.spelling` spells it, in two halves, and the line within the segment."""

LINES = np.dtype([("bytes", "<u4"), ("characters", "<i4")])
"""Bytes of the line, its end included, and characters of the text; NO_DOCUMENT and BLANK instead of these."""

NO_DOCUMENT = -1
BLANK = -2

DUPLICATES = np.dtype([("segment", "<u4"), ("line", "<u4"), ("kept_segment", "<u4"), ("kept_line", "<u4")])
"""A document that is dropped, and the one with the same text that is kept; sorted."""


def sorted_digests(digests: bytes | bytearray, lines: npt.NDArray[np.uint32]) -> npt.NDArray[Any]:
    """DIGESTS of md5 digests that lie one after the other; equal ones stay in the order of lines."""
    halves = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)
    high = halves[:, 0].astype("<u8")
    order = np.argsort(high, kind="stable")
    records = np.empty(len(order), dtype=DIGESTS)
    records["high"] = high[order]
    records["low"] = halves[order, 1]
    records["line"] = lines[order]
    return records


def open_records(path: Any, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The records of a file, mapped; an empty file has none."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
