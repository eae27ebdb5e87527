"""The schema of what a source lists, how its rows are made, and the one rule for numbers in foreign text."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe.errors import shown

BOXES = pa.list_(pa.list_(pa.float32(), 4))
"""Boxes of one image: float32, xyxy, absolute pixels."""

FRAME = pa.list_(pa.int32(), 2)
"""Height and width, in pixels, of the image that boxes were drawn on; 0, 0 where the source does not say."""

ANNOTATION_FIELDS = (
    pa.field("boxes", BOXES),
    pa.field("labels", pa.list_(pa.int64())),
    pa.field("crowds", pa.list_(pa.bool_())),
    pa.field("annotation_ids", pa.list_(pa.int64())),
)

SOURCE = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("name", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        *ANNOTATION_FIELDS,
        pa.field("frame", FRAME),
    ]
)
"""What a source lists: where each image's bytes are, and what is known of it. No column has nulls.

- name: where the result goes, without extension: relative, posix, safe on every file system, unique whatever the case.
- uri: an absolute local path or a full URI. offset, length: a range of bytes, length -1 for all to the end. In a Parquet file
  offset is the number of the row, and length is 1.
- boxes: in pixels of `frame`, or where that is unknown of the image as it is shown (EXIF orientation applied); labels: as the
  source numbers its classes; crowds, annotation_ids: COCO's. All four have one entry a box, and none where the source has
  none; only labels may be there without boxes, and then they are of the whole image.
"""

EMPTY = SOURCE.empty_table()


@dataclass(frozen=True)
class Listed:
    """What a lister found: `rows` (schema SOURCE), and how many files or members it `skipped`, by suffix."""

    rows: pa.Table
    skipped: Counter[str] = field(default_factory=Counter)


def rows(
    ids: pa.Array | Sequence[str],
    names: pa.Array | Sequence[str],
    uris: pa.Array | Sequence[str],
    offsets: Any = 0,
    lengths: Any = -1,
    *,
    boxes: Any = None,
    labels: Any = None,
    crowds: Any = None,
    annotation_ids: Any = None,
    frames: Any = None,
) -> pa.Table:
    """A table of schema SOURCE. What is left out is empty: no annotations, no frame. `frames`: int (n, 2), height and width."""
    count = len(ids)
    columns = {
        "image_id": ids,
        "name": names,
        "uri": uris,
        "offset": np.broadcast_to(np.asarray(offsets, np.int64), count),
        "length": np.broadcast_to(np.asarray(lengths, np.int64), count),
        "boxes": boxes,
        "labels": labels,
        "crowds": crowds,
        "annotation_ids": annotation_ids,
        "frame": _frame_column(np.zeros((count, 2), np.int32) if frames is None else frames),
    }
    arrays = []
    for column in SOURCE:
        values = columns[column.name]
        if values is None:
            values = pa.ListArray.from_arrays(
                pa.array(np.zeros(count + 1, np.int32)),
                pa.array([], column.type.value_type),
                type=column.type,
            )
        elif not isinstance(values, pa.Array | pa.ChunkedArray):
            values = pa.array(values, column.type)
        arrays.append(values)
    return pa.table(arrays, schema=SOURCE)


def _frame_column(frames: Any) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.asarray(frames, np.int32).reshape(-1)), type=FRAME
    )


def frames_of(table: pa.Table) -> np.ndarray:
    """The column `frame` of a table as int32 (n, 2), height and width."""
    column = table.column("frame").combine_chunks()
    return np.asarray(column.flatten(), np.int32).reshape(-1, 2)


def lists_of(counts: Sequence[int] | np.ndarray, values: Any) -> pa.ListArray:
    """`values` cut into lists of `counts` elements."""
    offsets = np.concatenate(([0], np.cumsum(np.asarray(counts, np.int64)))).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), values if isinstance(values, pa.Array) else pa.array(values)
    )


def box_lists(counts: Sequence[int] | np.ndarray, boxes: np.ndarray) -> pa.ListArray:
    """`boxes`, (n, 4), cut into lists of `counts` boxes."""
    flat = pa.array(np.ascontiguousarray(boxes, np.float32).reshape(-1))
    return lists_of(counts, pa.FixedSizeListArray.from_arrays(flat, 4)).cast(BOXES)


def text(name: str) -> str:
    """The name with whatever is not Unicode in it written out: Arrow holds only UTF-8."""
    return name.encode(errors="backslashreplace").decode()


# --- numbers in foreign text: 1, 1.0, "1" and "1.0" are the same number, everywhere ----------------------------------------

INT64 = 2**63


def whole(value: Any, *, below: int = INT64) -> int:
    """A whole number, also one that is written as 1.0 or "1".

    Raises ValueError or TypeError if it is none, or does not fit into `below` (exclusive, and its negative).
    """
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, int | float | str | bytes):
            raise TypeError(f"{shown(value)} is no number")
        try:
            number: int | float = int(value) if isinstance(value, int | str | bytes) else value
        except ValueError:
            number = float(value)
        if isinstance(number, float) and not number.is_integer():
            raise ValueError(f"{shown(value)} is no whole number")
        value = int(number)
    if not -below <= value < below:
        raise ValueError(
            f"{value} does not fit into 64 bits" if below == INT64 else f"{value} is too large"
        )
    return value


def real(value: Any) -> float:
    """A number of any size; null, and what is beyond a float, is not finite (a box with one is a bad box, and no more).

    Raises ValueError or TypeError if it is no number.
    """
    if type(value) is float:
        return value
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"{shown(value)} is no number")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def flag(value: Any) -> bool:
    """Yes or no: true, false, null, or a number of which 0 is no. Raises ValueError or TypeError if it is neither."""
    return value if isinstance(value, bool) else value is not None and whole(value) != 0


def frame(of: Any) -> tuple[int, int]:
    """The height and width that an object of a JSON says its image has; 0, 0 where it does not say so in whole numbers."""
    try:
        height, width = whole(of["height"], below=2**31), whole(of["width"], below=2**31)
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0, 0
    return (height, width) if height > 0 and width > 0 else (0, 0)
