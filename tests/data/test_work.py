import numpy as np
import pyarrow as pa
import pytest

from raypipe.data.tables import SOURCE, WORK, lists, unlist
from raypipe.data.work import (
    Weights,
    extend,
    make_work,
    named_as_before,
    order_of,
    remaining,
    renewed,
    shard_rows,
    shards,
    wanted_by,
)


def source(*names: str) -> pa.Table:
    n = len(names)
    columns = {
        "image_id": [f"{name}.jpg" for name in names],
        "name": list(names),
        "uri": [f"/photos/{name}.jpg" for name in names],
        "offset": [0] * n,
        "length": [-1] * n,
        "boxes": [[[0.0, 0.0, 1.0, 1.0]]] * n,
        "labels": [[1]] * n,
        "crowds": [[False]] * n,
        "annotation_ids": [[7]] * n,
        "frame": [[0, 0]] * n,
    }
    return pa.table(columns, schema=SOURCE)


def names(count: int) -> list[str]:
    return [f"n{i:03d}" for i in range(count)]


def test_every_row_is_in_exactly_one_shard_and_shards_are_full_but_the_last():
    work = make_work(source(*names(10)), rows_per_shard=4)
    assert work.schema == WORK
    parts = list(shards(work))
    assert [part.num_rows for part in parts] == [4, 4, 2]
    assert (
        pa.concat_tables(parts).column("image_id").to_pylist()
        == work.column("image_id").to_pylist()
    )
    assert [set(part.column("shard").to_pylist()) for part in parts] == [{0}, {1}, {2}]


@pytest.mark.parametrize("weighed", [False, True])
def test_the_first_shards_grow_and_the_last_ones_shrink(weighed):
    def weigh(table: pa.Table) -> Weights:
        ones = np.ones(table.num_rows, np.int64)
        return Weights(out=ones, held=ones, peak=ones, memory=10**6, target=None)

    work = make_work(
        source(*names(2000)), rows_per_shard=125, taper=True, weigh=weigh if weighed else None
    )
    sizes = [part.num_rows for part in shards(work)]
    assert sizes[:9] == [32, 32, 32, 48, 72, 108, 125, 125, 125] and max(sizes) == 125
    assert sorted(sizes[-20:], reverse=True) == sizes[-20:] and set(sizes[-8:-1]) == {32}
    # Actors that take the next shard when they are idle finish together, whatever their number.
    for actors in (2, 3, 6):
        ends = [0] * actors
        for size in sizes:
            ends[ends.index(min(ends))] += size
        assert max(ends) - 2000 / actors <= 32


def test_an_epoch_and_its_first_shard_are_numbered_as_asked():
    work = make_work(source(*names(5)), rows_per_shard=2, epoch=3, first_shard=7)
    assert set(work.column("epoch").to_pylist()) == {3}
    assert work.column("shard").to_pylist() == [7, 7, 8, 8, 9]


def test_an_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    first, second, again, other = (
        order_of(epoch, 50, seed=seed).tolist() for epoch, seed in ((0, 1), (1, 1), (0, 1), (0, 2))
    )
    assert sorted(first) == sorted(second) == list(range(50))
    assert first == again and first != second and first != other


def at(*places: tuple[str, str, int]) -> pa.Table:
    """A source of images with these ids, URIs and offsets."""
    rows = source(*(image_id for image_id, _, _ in places))
    for name, values in zip(("image_id", "uri", "offset"), zip(*places, strict=True), strict=True):
        rows = rows.set_column(
            rows.column_names.index(name),
            SOURCE.field(name),
            pa.array(values, SOURCE.field(name).type),
        )
    return rows


def test_an_image_keeps_its_id_when_another_of_its_name_comes_before_it():
    work = make_work(
        at(("b.jpg", "/val/b.jpg", 0), ("b.jpg#2", "/val/sub/b.jpg", 0)), rows_per_shard=2
    )
    grown = at(
        ("b.jpg", "/train/b.jpg", 0),
        ("b.jpg#2", "/val/b.jpg", 0),
        ("b.jpg#3", "/val/sub/b.jpg", 0),
        ("c.jpg", "/val/c.jpg", 0),
    )
    named = named_as_before(grown, work)
    assert named.column("image_id").to_pylist() == ["b.jpg#3", "b.jpg", "b.jpg#2", "c.jpg"]
    assert extend(work, named, rows_per_shard=2).column("uri").to_pylist()[2:] == [
        "/train/b.jpg",
        "/val/c.jpg",
    ]
    assert named_as_before(work.select(SOURCE.names), work).equals(work.select(SOURCE.names))
    twice = at(("b.jpg", "/new", 0), ("b.jpg#2", "/val/b.jpg", 0), ("b.jpg#3", "/val/b.jpg", 0))
    assert named_as_before(twice, work).column("image_id").to_pylist() == [
        "b.jpg#3",
        "b.jpg",
        "b.jpg#4",
    ]
    first = make_work(at(("b.jpg", "/val/b.jpg", 0)), rows_per_shard=2)
    assert named_as_before(grown.slice(0, 2), first).column("image_id").to_pylist() == [
        "b.jpg#2",
        "b.jpg",
    ]


def test_ids_that_images_bring_along_are_theirs_wherever_these_are():
    work = make_work(
        at(("7", "/old/a.jpg", 0), ("9#1", "/x.tar", 512), ("a.parquet#0", "/a.parquet", 0)),
        rows_per_shard=2,
    )
    moved = at(("7", "/new/a.jpg", 0), ("9#1", "/x.tar", 4096), ("a.parquet#0", "/a.parquet", 1))
    assert named_as_before(moved, work).equals(moved)


def test_what_is_still_to_do_is_as_the_source_has_it_now_and_what_is_done_stays():
    work = make_work(
        at(*((name, f"/old/{name}", 0) for name in "abcdef")), rows_per_shard=2
    )  # shards ab, cd, ef
    now = at(("f", "/new/f", 9), ("d", "/new/d", 5), ("a", "/new/a", 7), ("g", "/new/g", 1))
    after = renewed(work, now, {0})
    assert after.schema == WORK
    columns = ("image_id", "shard", "name", "uri", "offset")
    assert list(zip(*(after.column(name).to_pylist() for name in columns), strict=True)) == [
        ("a", 0, "a", "/old/a", 0),
        ("b", 0, "b", "/old/b", 0),
        ("d", 1, "d", "/new/d", 5),
        ("f", 2, "f", "/new/f", 9),
    ]
    assert renewed(work, work.select(SOURCE.names), set()).equals(work)
    assert renewed(work, now.slice(0, 0), set()).num_rows == 0


def test_rows_found_later_get_new_shards_and_old_rows_keep_theirs():
    before = make_work(source("a", "c"), rows_per_shard=2)
    after = extend(before, source("a", "b", "c", "d", "e"), rows_per_shard=2)
    assert after.slice(0, 2).equals(before)
    assert after.column("name").to_pylist() == ["a", "c", "b", "d", "e"]
    assert after.column("shard").to_pylist() == [0, 0, 1, 1, 2]
    assert extend(after, source("a", "b"), rows_per_shard=2).equals(after)


def test_a_row_found_later_never_takes_a_name_that_is_on_disk():
    before = make_work(source("a"), rows_per_shard=2)
    late = source("A").set_column(0, "image_id", pa.array(["other/a.jpg"]))
    assert extend(before, late, rows_per_shard=2).column("name").to_pylist() == ["a", "A-2"]


def test_remaining_is_the_table_less_the_shards_that_are_done():
    work = make_work(source(*names(6)), rows_per_shard=2)
    assert remaining(work, {0, 2}).column("name").to_pylist() == ["n002", "n003"]
    assert remaining(work, set()).num_rows == 6
    assert list(shards(remaining(work, {0, 1, 2}))) == []


@pytest.mark.parametrize(
    ("rows", "row_bytes", "expected"),
    [
        (100_000, 300 * 300 * 3, 248),  # 64 MiB
        (100_000, 1200 * 1200 * 3, 16),  # a few large ones are enough to make a task worth it
        (100_000, 10, 256),
        (1000, 300 * 300 * 3, 63),  # 16 shards, so that several actors have something to do
        (3, 300 * 300 * 3, 8),
    ],
)
def test_shard_rows(rows, row_bytes, expected):
    assert shard_rows(rows=rows, row_bytes=row_bytes) == expected


def test_lists_and_back():
    boxes = [
        np.arange(8, dtype=np.float32).reshape(2, 4),
        np.empty((0, 4), np.float32),
        np.ones((1, 4), np.float32),
    ]
    column = lists(boxes, SOURCE.field("boxes").type)
    assert column.to_pylist() == [b.tolist() for b in boxes]
    for got, want in zip(unlist(column), boxes, strict=True):
        np.testing.assert_array_equal(got, want)
    assert (
        lists([], SOURCE.field("labels").type).to_pylist()
        == []
        == unlist(lists([], SOURCE.field("labels").type))
    )


def test_unlist_reads_slices_and_nulls():
    column = pa.chunked_array([pa.array([[1, 2], None, [], [3]], pa.list_(pa.int64()))]).slice(1)
    assert [a.tolist() for a in unlist(column)] == [[], [], [3]]


def test_crowds_are_left_out_before_images_without_boxes():
    rows = source("a", "b", "c").to_pylist()
    rows[0] |= {
        "boxes": [[0, 0, 1, 1], [2, 2, 3, 3]],
        "labels": [5, 6],
        "crowds": [True, False],
        "annotation_ids": [1, 2],
    }
    rows[1] |= {"crowds": [True]}
    rows[2] |= {"boxes": [], "labels": [], "crowds": [], "annotation_ids": []}
    table = pa.Table.from_pylist(rows, schema=SOURCE)
    kept = wanted_by(table, needs_boxes=True, drops_crowds=True).to_pylist()
    assert [(r["name"], r["boxes"], r["labels"], r["annotation_ids"]) for r in kept] == [
        ("a", [[2, 2, 3, 3]], [6], [2])
    ]
    assert wanted_by(table, needs_boxes=True, drops_crowds=False).num_rows == 2
    assert wanted_by(table, needs_boxes=False, drops_crowds=False).equals(table)
