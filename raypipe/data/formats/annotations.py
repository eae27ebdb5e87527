"""The annotations in columns of a Parquet file, which somebody else wrote.

Columns of the right type without nulls are cast at once. Others are read value by value, by the
rule for numbers in foreign text (`raypipe.data.tables`): 1, 1.0 and "1" are the same number, and
NaN is a null, as pandas writes it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data.formats.huggingface import flattened
from raypipe.data.location import Location
from raypipe.data.stores import ERRORS
from raypipe.data.tables import (
    ANNOTATION_FIELDS,
    BOXES,
    flag,
    has_nulls,
    lists_of,
    real,
    whole,
)
from raypipe.errors import UsageError, logger, words

log = logger(__name__)

COLUMNS = ("boxes", "labels", "crowds", "annotation_ids", "label", "height", "width", "objects")
"""The columns that annotations are read from."""

_NO_BOX = [math.nan] * 4
"""Stands for a null, or for a box that is not four numbers. It is dropped later, and counted."""


def annotations(place: Location, table: pa.Table) -> dict[str, Any]:
    """The arguments of `tables.rows` for the annotations in `table` (columns of COLUMNS).

    A row that makes no sense has no annotations. A warning counts these, and names the first.

    Raises:
        UsageError: a row has not as many labels as boxes.
    """
    unfit: list[str] = []
    bad: dict[int, str] = {}
    table = flattened(table)

    def read(name: str, type: pa.DataType, one: Callable[[Any], Any]) -> pa.Array | None:
        if name not in table.column_names:
            return None
        values, wrong = cast(table[name], type, one)
        if wrong and len(wrong) == len(table) - table[name].null_count:
            unfit.append(name)
            return None
        bad.update({row: f"{name}: {why}" for row, why in wrong.items() if row not in bad})
        return values

    of_lists = {
        field.name: read(field.name, field.type, _list_of(one))
        for field, one in zip(ANNOTATION_FIELDS, (_box, _whole, _flag, _whole), strict=True)
    }
    label = read("label", pa.int64(), _whole)
    height, width = (read(name, pa.int32(), _side) for name in ("height", "width"))
    if unfit:
        log.warning(
            "%s: the columns %s are of types that annotations do not have; they are ignored",
            place,
            ", ".join(unfit),
        )
    if bad:
        first = min(bad)
        log.warning(
            "%s: the annotations of %d rows make no sense; their images go without annotations. "
            "The first is row %d: %s",
            place,
            len(bad),
            first,
            bad[first],
        )
    found = {
        name: None if values is None else _emptied(values, bad) for name, values in of_lists.items()
    }
    if of_lists["labels"] is None and label is not None:
        counts = label.is_valid().cast(pa.int64()).to_numpy(zero_copy_only=False)
        found["labels"] = lists_of(counts, label.drop_null())
    return {**_joined(place, **found), "frames": _frames(height, width)}


def cast(
    column: pa.ChunkedArray, type: pa.DataType, one: Callable[[Any], Any]
) -> tuple[pa.Array, dict[int, str]]:
    """The column as `type`; and the rows whose value makes no sense, with the reason.

    These rows are null, as rows without a value are. Lists may contain nulls.

    Args:
        one: makes a value that is not null fit, or raises any exception.
    """
    try:
        values = column.cast(type).combine_chunks()
        if not has_nulls(values):
            return values, {}
    except ERRORS:
        pass
    out: list[Any] = []
    wrong: dict[int, str] = {}
    for row, value in enumerate(column.to_pylist()):
        try:
            out.append(None if value is None else one(value))
        except Exception as error:  # foreign values
            out.append(None)
            wrong[row] = words(error)
    return pa.array(out, type), wrong


def sides(column: pa.ChunkedArray) -> np.ndarray:
    """A column of heights or widths as int64 (n,); 0 where it has none."""
    values, _ = cast(column, pa.int32(), _side)
    return values.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


# --- values ----------------------------------------------------------------------------------


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _whole(value: Any) -> int | None:
    return None if _is_null(value) else whole(value)


def _flag(value: Any) -> bool:
    return not _is_null(value) and flag(value)


def _side(value: Any) -> int | None:
    try:
        return whole(value, below=2**31)
    except (TypeError, ValueError, OverflowError):
        return None  # as in `tables.frame`: it is unknown


def _box(value: Any) -> list[float]:
    if value is None:
        return _NO_BOX
    if not isinstance(value, list):
        raise TypeError("a box is no list")
    try:
        box = [real(side) for side in value]
    except (TypeError, ValueError):
        return _NO_BOX
    return box if len(box) == 4 else _NO_BOX


def _list_of(one: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    def each(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise TypeError("no list")
        return [one(element) for element in value]

    return each


# --- rows ------------------------------------------------------------------------------------


def _emptied(lists: pa.ListArray, rows: Iterable[int]) -> pa.ListArray:
    """The lists without nulls; those of `rows` are empty."""
    keep = np.ones(len(lists), bool)
    keep[list(rows)] = False
    if keep.all() and not lists.null_count:
        return lists
    kept = pc.if_else(pa.array(keep), lists, pa.scalar(None, lists.type))
    return lists_of(kept.value_lengths().fill_null(0), kept.flatten()).cast(lists.type)


def _joined(
    place: Location,
    boxes: pa.ListArray | None,
    labels: pa.ListArray | None,
    crowds: pa.ListArray | None,
    annotation_ids: pa.ListArray | None,
) -> dict[str, pa.Array | None]:
    """The four columns without nulls, with one entry a box."""
    if boxes is None:
        return {"labels": None if labels is None else _without_nulls(labels)}
    counts = boxes.value_lengths().to_numpy(zero_copy_only=False)
    found = (
        np.zeros_like(counts)
        if labels is None
        else labels.value_lengths().to_numpy(zero_copy_only=False)
    )
    if (wrong := np.flatnonzero((counts > 0) & (counts != found))).size:
        row = wrong[0]
        raise UsageError(
            f"{str(place)!r}: row {row} has {counts[row]} boxes, but {found[row]} labels "
            f"({wrong.size} rows are like that); it is not clear what is in which box. Write as "
            "many `labels` as `boxes`, or rename the column `boxes`"
        )
    if labels is not None and has_nulls(labels):
        boxes, labels = _with_labels(boxes, labels)
    if crowds is None or not crowds.value_lengths().equals(boxes.value_lengths()):
        crowds = lists_of(counts, np.zeros(counts.sum(), bool))
    numbers = pa.array(np.arange(counts.sum()))
    if annotation_ids is None or not annotation_ids.value_lengths().equals(boxes.value_lengths()):
        annotation_ids = lists_of(counts, numbers)
    elif has_nulls(annotation_ids):  # as in a COCO JSON: the box's number in the file
        annotation_ids = lists_of(counts, pc.coalesce(annotation_ids.flatten(), numbers))
    return {"boxes": boxes, "labels": labels, "crowds": crowds, "annotation_ids": annotation_ids}


def _without_nulls(lists: pa.ListArray) -> pa.ListArray:
    if not has_nulls(lists):
        return lists
    kept = [[value for value in row if value is not None] for row in lists.to_pylist()]
    return pa.array(kept, lists.type)


def _with_labels(boxes: pa.ListArray, labels: pa.ListArray) -> tuple[pa.ListArray, pa.ListArray]:
    """A box without a label is no box, and is dropped later. A label without a box is left out."""
    of_boxes, of_labels = [], []
    spare = pc.min(labels.flatten()).as_py() or 0  # of the dropped box: a class that there is
    for row, found in zip(boxes.to_pylist(), labels.to_pylist(), strict=True):
        of_boxes.append(
            [_NO_BOX if label is None else box for box, label in zip(row, found, strict=bool(row))]
        )
        of_labels.append(
            [spare if label is None else label for label in found if row or label is not None]
        )
    return pa.array(of_boxes, BOXES), pa.array(of_labels, labels.type)


def _frames(height: pa.Array | None, width: pa.Array | None) -> np.ndarray | None:
    """Height and width of each image, int32 (n, 2); 0, 0 where the table has none."""
    if height is None or width is None:
        return None
    frames = np.stack(
        [side.fill_null(0).to_numpy(zero_copy_only=False) for side in (height, width)], axis=1
    )
    return np.where((frames > 0).all(axis=1, keepdims=True), frames, 0)
