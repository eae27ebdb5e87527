"""Annotations in columns of Parquet files that others wrote: nulls, texts, NaN, and lists of any
length stay with their row.
"""

import logging
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe.data import journal
from raypipe.data.listing import list_images
from raypipe.data.location import Location
from raypipe.data.tables import ANNOTATION_FIELDS, WORK, has_nulls, unlist
from raypipe.data.work import make_work
from raypipe.errors import UsageError
from tests.data.conftest import ids, names, read, reasons

NAN = math.nan
B0, B1, B2 = [0.0, 0, 5, 5], [1.0, 1, 6, 6], [2.0, 2, 7, 7]
DOUBLES = pa.list_(pa.list_(pa.float64()))


def listed(folder, **columns) -> pa.Table:
    """The rows of a Parquet file with these columns and images of one byte."""
    count = len(next(iter(columns.values())))
    pq.write_table(pa.table({"image": [b"x"] * count, **columns}), folder / "a.parquet")
    table = list_images(str(folder))
    assert not any(has_nulls(table[field.name]) for field in ANNOTATION_FIELDS)
    return table


def boxes(table: pa.Table) -> list[list[list[float] | None]]:
    """The boxes of each row; None for one that is no box, because it is not finite."""
    found = [of.tolist() for of in unlist(table["boxes"])]
    return [[box if np.isfinite(box).all() else None for box in row] for row in found]


@pytest.mark.parametrize("type", [DOUBLES, pa.list_(pa.list_(pa.float32(), 4))])
def test_a_null_box_moves_no_other_box(tmp_path, type):
    given = [[B0, None], [B1], [B2], None, []]
    table = listed(
        tmp_path, boxes=pa.array(given, type), labels=[[1, 2], [3], [4], None, []], x=[0] * 5
    )
    assert boxes(table) == [[B0, None], [B1], [B2], [], []]
    assert table["labels"].to_pylist() == [[1, 2], [3], [4], [], []]
    assert [len(one) for one in unlist(table["boxes"])] == [2, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "odd", [[1.0, 2, 3], [1.0, 2, 3, 4, 5], [], [None, 2, 3, 4], [NAN, 2, 3, 4]]
)
def test_a_box_that_is_not_four_numbers_is_the_only_one_lost(tmp_path, odd):
    table = listed(tmp_path, boxes=pa.array([[B0, odd], [B1]], DOUBLES), labels=[[1, 2], [3]])
    assert boxes(table) == [[B0, None], [B1]]
    assert table["labels"].to_pylist() == [[1, 2], [3]]


def test_a_null_label_loses_its_box(tmp_path):
    table = listed(
        tmp_path,
        boxes=pa.array([[B0, B1], [], [B2]], DOUBLES),
        labels=[[1, None], [7, None], [3]],
        annotation_ids=[[8, 9], [], [10]],
    )
    assert boxes(table) == [[B0, None], [], [B2]]
    assert table["labels"].to_pylist() == [[1, 1], [7], [3]]  # no new class
    assert table["annotation_ids"].to_pylist() == [[8, 9], [], [10]]
    assert listed(tmp_path, labels=[[1, None], [None], [2]])["labels"].to_pylist() == [[1], [], [2]]


def test_null_annotation_ids_are_numbered_and_null_crowds_are_none(tmp_path):
    table = listed(
        tmp_path,
        boxes=pa.array([[B0, B1], [B2]], DOUBLES),
        labels=[[1, 2], [3]],
        crowds=[[True, None], [None]],
        annotation_ids=[[40, None], [None]],
    )
    assert table["annotation_ids"].to_pylist() == [[40, 1], [2]]
    assert table["crowds"].to_pylist() == [[True, False], [False]]
    assert boxes(table) == [[B0, B1], [B2]]


def test_numbers_may_be_written_as_text_or_with_a_point(tmp_path):
    table = listed(
        tmp_path,
        boxes=pa.array([[["1", "1", "6.0", "6"]], [["2", "x", "7", "7"]]]),
        labels=[["3.0"], ["4"]],
        crowds=[["1.0"], ["0"]],
        annotation_ids=[["5"], ["6.0"]],
        height=["60.0", "nonsense"],
        width=["80", "80"],
    )
    assert boxes(table) == [[B1], [None]]
    assert table["labels"].to_pylist() == [[3], [4]]
    assert table["crowds"].to_pylist() == [[True], [False]]
    assert table["annotation_ids"].to_pylist() == [[5], [6]]
    assert table["frame"].to_pylist() == [[60, 80], [0, 0]]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (["1.0", "2", None], [[1], [2], []]),
        ([1.0, NAN, 3.0], [[1], [], [3]]),
        ([True, False, None], [[1], [0], []]),
    ],
)
def test_a_label_may_be_text_or_have_nulls_as_pandas_writes_them(tmp_path, label, expected):
    assert listed(tmp_path, label=label)["labels"].to_pylist() == expected


def test_sizes_and_ids_may_have_nulls_as_pandas_writes_them(tmp_path):
    pixels = bytes(range(36))
    columns = {
        "image": [pixels] * 3,
        "height": [3.0, NAN, 3.0],
        "width": [4.0, 4.0, 4.0],
        "image_id": [7.0, NAN, 9.0],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    table = list_images(str(tmp_path))
    assert table["frame"].to_pylist() == [[3, 4], [0, 0], [3, 4]]
    assert ids(table) == ["7", "a.parquet#1", "9"] and names(table) == ["7", "a/000001", "9"]
    found = read(table)
    assert reasons(found) == [None] * 3
    assert [one.startswith(b"\x93NUMPY") for one in found] == [True, False, True]


def test_a_row_that_makes_no_sense_goes_without_annotations_and_is_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        table = listed(
            tmp_path,
            boxes=pa.array([[B0], [B1], [B2]], DOUBLES),
            labels=[["1"], ["cat"], ["3"]],
        )
    assert boxes(table) == [[B0], [], [B2]]
    assert table["labels"].to_pylist() == [[1], [], [3]]
    assert "annotations of 1 rows make no sense" in caplog.text
    assert "row 1: labels: ValueError: could not convert" in caplog.text


def test_a_table_of_work_with_nulls_in_lists_is_refused(tmp_path):
    root = Location.of(str(tmp_path / "out"))
    table = listed(tmp_path, boxes=pa.array([[B0, B1], [B2]], DOUBLES), labels=[[1, 2], [3]])
    work = make_work(table, rows_per_shard=10)
    labels = pa.array([[1, None], [3]], WORK.field("labels").type)
    work = work.set_column(WORK.get_field_index("labels"), WORK.field("labels"), labels)
    journal.put_work(root, work)
    with pytest.raises(UsageError, match=r"column labels: ValueError: a list has nulls\. It is"):
        journal.read_work(root)
    with pytest.raises(ValueError, match="a list has nulls"):
        unlist(work["labels"])
