"""The schemas of tables, how their rows are made, and how lists and pixels are read out of them.

Also the one rule for numbers in foreign text: `whole`, `real`, `flag`, `frame`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe.errors import shown

# --- the schemas -----------------------------------------------------------------------------

BOXES = pa.list_(pa.list_(pa.float32(), 4))
"""Boxes of one image: float32, xyxy, absolute pixels."""

FRAME = pa.list_(pa.int32(), 2)
"""Height and width, in pixels, of the image that boxes were drawn on; 0, 0 if unknown. 1, 1: boxes
are shares of the upright image (`raypipe.images.frames.UNIT`)."""

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
"""What a source lists: where each image's bytes are, and its annotations. No column has nulls.

- name: where the result goes, without extension: relative, posix, safe on every file system,
  unique even if case is ignored.
- uri: an absolute local path or a full URI.
- offset, length: a range of bytes; length -1 means up to the end. In a Parquet file, offset is
  the row number and length is 1.
- boxes: in pixels of `frame`. If that is unknown, of the upright image (EXIF orientation applied).
- labels: class numbers of the source. crowds, annotation_ids: as in COCO.

These four have one entry a box. Labels without boxes are labels of the whole image.
"""

EMPTY = SOURCE.empty_table()

WORK = pa.schema([pa.field("epoch", pa.int32()), pa.field("shard", pa.int64()), *SOURCE])
"""The table of work: rows of SOURCE with their epoch and their shard."""

DROPPED_BOXES = pa.list_(
    pa.struct(
        [
            pa.field("box", pa.list_(pa.float32(), 4)),
            pa.field("annotation_id", pa.int64()),  # null: it has none
            pa.field("reason", pa.string()),
        ]
    )
)
"""Boxes of one image that cannot be used, as the source has them, and why."""

BLOCK = pa.schema(
    [
        pa.field("epoch", pa.int32()),
        pa.field("shard", pa.int64()),
        pa.field("image_id", pa.string()),
        pa.field("name", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        # Of the upright image, before the recipe.
        pa.field("source_height", pa.int32()),
        pa.field("source_width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        # HWC RGB uint8; null: rejected. Large, because 16 photos of 50 MP exceed 2 GiB.
        pa.field("image", pa.large_binary()),
        pa.field("reason", pa.string()),  # null: fine
        # Of the reason; without a reason, what is damaged in an image that was kept.
        pa.field("detail", pa.string()),
        *ANNOTATION_FIELDS,
        # The EXIF number of the turn that made the picture upright; null: rejected.
        pa.field("orientation", pa.int8()),
        # The frame that boxes were in (raypipe.images.frames); null: unknown.
        pa.field("boxes_from", pa.string()),
        pa.field("boxes_dropped", DROPPED_BOXES),
    ]
)
"""A shard after preprocessing: the same rows in the same order, with pixels or with a reason.

uri, offset, length and the source's size stay, so that the original can be looked at again.
"""

DONE = pa.schema([(name, pa.int64()) for name in ("shard", "images", "rejected", "unread")])
"""What the last stage says of a shard that is in the journal."""

PREDICTIONS = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("boxes", BOXES),
        pa.field("labels", pa.list_(pa.int64())),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("orientation", pa.int8()),
    ]
)
"""A row an image that could be preprocessed.

Size and boxes are of the original image, upright. Labels are the data set's category ids.
orientation: the EXIF number of the turn of the stored image.
"""

REJECTS = pa.schema([(name, pa.string()) for name in ("image_id", "uri", "reason", "detail")])
"""The rows of rejects.parquet."""

DROPPED = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("box", pa.list_(pa.float32(), 4)),
        pa.field("annotation_id", pa.int64()),
        pa.field("reason", pa.string()),
    ]
)
"""The rows of boxes_dropped.parquet."""


# --- making rows -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """What a lister found.

    rows: the images (schema SOURCE). skipped: how many files or members it left out, by suffix.
    classes: the name of each label from 0 on; empty: not known.
    """

    rows: pa.Table
    skipped: Counter[str] = field(default_factory=Counter)
    classes: tuple[str, ...] = ()


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
    """A table of schema SOURCE. Columns that are not given are empty.

    Args:
        frames: int (n, 2), height and width.
    """
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
    """The name with what is not Unicode escaped: Arrow holds only UTF-8."""
    return name.encode(errors="backslashreplace").decode()


# --- reading lists and pixels ----------------------------------------------------------------


def frames_of(table: pa.Table) -> np.ndarray:
    """The column `frame` of a table as int32 (n, 2), height and width."""
    column = table.column("frame").combine_chunks()
    return np.asarray(column.flatten(), np.int32).reshape(-1, 2)


def image_column(block: pa.Table) -> pa.LargeBinaryArray:
    """The pixels of a block (schema BLOCK) as one array."""
    chunks = block.column("image")
    # combine_chunks copies even a single chunk.
    return chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()


def images_of(block: pa.Table) -> list[np.ndarray | None]:
    """The image of each row of a block (schema BLOCK); None for a rejected row.

    Images are HWC RGB uint8, views of the block's memory.
    """
    column = image_column(block)
    _, offsets, values = column.buffers()
    if values is None:  # none has pixels
        return [None] * len(column)
    flat = np.frombuffer(values, np.uint8)
    ends = np.frombuffer(offsets, np.int64)[
        column.offset : column.offset + len(column) + 1
    ].tolist()
    shapes = zip(
        block.column("height").to_pylist(),
        block.column("width").to_pylist(),
        column.is_valid().to_pylist(),
        strict=True,
    )
    rows = zip(ends[:-1], ends[1:], shapes, strict=True)
    return [
        flat[start:end].reshape(height, width, 3) if good else None
        for start, end, (height, width, good) in rows
    ]


def lists(values: Iterable[np.ndarray], type_: pa.ListType) -> pa.Array:
    """An Arrow array of `type_` with one list a row of `values`, arrays of shape (n,) or (n, 4).

    No Python object is made for an element.
    """
    arrays = list(values)
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    element = type_.value_type
    flat: pa.Array
    if pa.types.is_fixed_size_list(element):
        boxes = [np.asarray(a, np.float32).reshape(-1) for a in arrays]
        numbers = np.concatenate(boxes) if boxes else np.empty(0, np.float32)
        flat = pa.FixedSizeListArray.from_arrays(
            pa.array(numbers, element.value_type), element.list_size
        )
    else:
        flat = pa.array(np.concatenate(arrays) if arrays else np.empty(0), element)
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=type_)


def has_nulls(values: pa.Array | pa.ChunkedArray) -> bool:
    """Whether there is a null inside the lists of a column. Null lists do not count."""
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
        if array.null_count:
            return True
    return False


def unlist(column: pa.ChunkedArray | pa.Array) -> list[np.ndarray]:
    """The inverse of `lists`: an array a row, (n,) or (n, 4). A null becomes an empty array.

    Raises:
        ValueError: a null is inside a list. `flatten` would move all later elements.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    element = array.type.value_type
    flat = array.flatten()
    if flat.null_count:
        raise ValueError("a list has nulls")
    if not len(flat):
        # np.split costs 16 us a row, 1% of a small image. Most sources have no boxes.
        of_one = element.value_type if pa.types.is_fixed_size_list(element) else element
        shape = (0, element.list_size) if pa.types.is_fixed_size_list(element) else (0,)
        return [np.empty(shape, of_one.to_pandas_dtype())] * len(array)
    if pa.types.is_fixed_size_list(element):
        values = flat.flatten().to_numpy(zero_copy_only=False).reshape(-1, element.list_size)
    else:
        values = flat.to_numpy(zero_copy_only=False)
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []


# --- numbers in foreign text: 1, 1.0, "1" and "1.0" are the same number -----------------------

INT64 = 2**63


def whole(value: Any, *, below: int = INT64) -> int:
    """A whole number, also one that is written as 1.0 or "1".

    Raises:
        ValueError, TypeError: it is none, or is not at least -`below` and less than `below`.
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
    """A number of any size. Null, and what exceeds a float, is not finite: its box is a bad box.

    Raises:
        ValueError, TypeError: it is no number.
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
    """Yes or no: true, false, null (no), or a number, of which 0 is no.

    Raises:
        ValueError, TypeError: it is none of these.
    """
    return value if isinstance(value, bool) else value is not None and whole(value) != 0


def frame(of: Any) -> tuple[int, int]:
    """The image's height and width by a JSON object; 0, 0 if they are not whole numbers there."""
    try:
        height, width = whole(of["height"], below=2**31), whole(of["width"], below=2**31)
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0, 0
    return (height, width) if height > 0 and width > 0 else (0, 0)
