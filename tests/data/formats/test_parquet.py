import contextlib
import io
import itertools
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe import UsageError
from raypipe.data.formats import parquet, parquetfile
from raypipe.data.listing import list_images
from raypipe.data.location import Location
from raypipe.data.patience import Patience
from raypipe.data.reader import Reader
from raypipe.data.sinks import Sink
from raypipe.images.header import Reject
from tests.data.conftest import (
    IMAGES,
    WITH_REJECTS,
    block,
    ids,
    names,
    photo,
    pictures,
    read,
    reasons,
    tar,
    write_block,
)
from tests.support.objects import objects

PICTURES = [bytes([i]) * (50 + i) for i in range(20)]


def struct(pictures: list[bytes | None]) -> pa.Array:
    rows = [{"bytes": picture, "path": f"p{i}.jpg"} for i, picture in enumerate(pictures)]
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


@pytest.mark.parametrize(
    "columns",
    [
        {"image": pa.array(PICTURES, pa.binary())},
        {
            "image": pa.array(PICTURES, pa.large_binary()),
            "mask": pa.array(PICTURES[::-1], pa.binary()),
        },
        {"jpg": pa.array(PICTURES, pa.binary()), "__key__": [str(i) for i in range(20)]},
        {"picture": pa.array(PICTURES, pa.binary()), "height": [9] * 20, "width": [9] * 20},
        {"image": struct(PICTURES)},
        {"label": list(range(20)), "content": struct(PICTURES)},
    ],
)
def test_parquet_of_encoded_images(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=6)
    table = list_images(str(tmp_path / "a.parquet"))
    assert ids(table) == [f"a.parquet#{i}" for i in range(20)]
    assert names(table) == [f"a/{i:06d}" for i in range(20)]
    assert table["offset"].to_pylist() == list(range(20)) and set(table["length"].to_pylist()) == {
        1
    }
    assert read(table) == PICTURES
    order = np.random.default_rng(0).permutation(20)
    assert read(table.take(order)) == [PICTURES[i] for i in order]
    assert list_images(str(tmp_path / "a.parquet"), limit=7).equals(table.slice(0, 7))
    if "label" in columns:
        assert table["labels"].to_pylist() == [[i] for i in range(20)]


def test_parquet_of_raw_pixels(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (3 + i, 4, 3), np.uint8) for i in range(5)]
    columns = {
        "image": [i.tobytes() for i in images],
        "height": [i.shape[0] for i in images],
        "width": [4] * 5,
        "image_id": [5, 4, 3, 2, 1],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    table = list_images(str(tmp_path))
    assert ids(table) == ["5", "4", "3", "2", "1"]
    for data, image in zip(read(table), images, strict=True):
        np.testing.assert_array_equal(np.load(io.BytesIO(data)), image)


def test_parquet_of_thumbnails_as_long_as_their_pixels(tmp_path):
    jpeg = b"\xff\xd8\xff" + bytes(297)  # 300 bytes, as 10 x 10 raw pixels have
    columns = {"image": [jpeg, b"\xfe" + jpeg[1:]], "height": [10, 10], "width": [10, 10]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    first, second = read(list_images(str(tmp_path)))
    assert first == jpeg and second.startswith(b"\x93NUMPY")


def test_parquet_with_annotations_and_holes(tmp_path):
    columns = {
        "image": pa.array([b"a", None, b""], pa.binary()),
        "image_id": ["x", None, "x"],
        "boxes": pa.array([[[1, 2, 3, 4]], None, []], pa.list_(pa.list_(pa.float64()))),
        "labels": pa.array([[3], None, []], pa.list_(pa.int32())),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.pq")
    table = list_images(str(tmp_path))
    assert ids(table) == ["x", "a.pq#1", "x#2"]
    assert table["boxes"].to_pylist() == [[[1, 2, 3, 4]], [], []]
    assert table["labels"].to_pylist() == [[3], [], []]
    results = read(table)
    assert results[0] == b"a" and reasons(results) == [None, "empty", "empty"]


def test_parquet_directory_in_order(tmp_path):
    for part in range(3):
        pq.write_table(
            pa.table({"image": [b"%d-%d" % (part, i) for i in range(4)]}),
            tmp_path / f"part-{part}.parquet",
        )
    table = list_images(str(tmp_path))
    assert read(table) == [b"%d-%d" % pair for pair in itertools.product(range(3), range(4))]
    assert list_images(f"{tmp_path}/part-*.parquet").equals(table)
    assert list_images(str(tmp_path), limit=6).equals(table.slice(0, 6))
    tar(tmp_path / "a.tar", ("0.jpg", b"0"))
    with pytest.raises(UsageError, match="1 tars and 3 Parquet files"):
        list_images(str(tmp_path))


def test_parquet_that_cannot_be_an_input(tmp_path):
    pq.write_table(
        pa.table({"text": ["a"], "one": [b"1"], "two": [b"2"]}), tmp_path / "which.parquet"
    )
    (tmp_path / "noise.parquet").write_bytes(b"PAR1" + os.urandom(200))
    with pytest.raises(UsageError, match=r"no column with images.*one \(binary\)"):
        list_images(str(tmp_path / "which.parquet"))
    with pytest.raises(UsageError, match="cannot read the Parquet file"):
        list_images(str(tmp_path / "noise.parquet"))


def test_parquet_annotations_fit_each_other(tmp_path):
    boxes = pa.array([[[1, 2, 3, 4], [5, 6, 7, 8]], []], pa.list_(pa.list_(pa.float32())))
    columns = {"image": [b"a", b"b"], "boxes": boxes, "labels": [[1, 2], [3]]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    table = list_images(str(tmp_path))
    assert table["crowds"].to_pylist() == [[False, False], []]
    assert table["annotation_ids"].to_pylist() == [[0, 1], []]
    assert table["labels"].to_pylist() == [[1, 2], [3]]
    pq.write_table(pa.table(columns | {"labels": [[1], []]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="row 0 has 2 boxes, but 1 labels"):
        list_images(str(tmp_path))
    foreign = {
        "image": [b"a", b"b"],
        "boxes": ["no", "boxes"],
        "name": [[1], [2]],
        "labels": ["cat", "dog"],
        "image_id": [1.5, 2.5],
    }
    pq.write_table(pa.table(foreign), tmp_path / "a.parquet")
    table = list_images(str(tmp_path))
    assert table["boxes"].to_pylist() == table["labels"].to_pylist() == [[], []]


def test_parquet_without_rows(tmp_path):
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="no images"):
        list_images(str(tmp_path))
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "b.parquet")
    assert ids(list_images(str(tmp_path))) == ["b.parquet#0"]


def test_parquet_damaged_after_listing(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"image": [os.urandom(5000) for _ in range(8)]}),
        path,
        row_group_size=4,
        use_dictionary=False,
        compression="gzip",
    )
    table = list_images(str(path))
    data = bytearray(path.read_bytes())
    data[2000:2600] = bytes(600)  # within the first row group
    path.write_bytes(data)
    assert reasons(read(table)) == ["unreadable"] * 4 + [None] * 4
    pq.write_table(pa.table({"image": [b"x"]}), path)
    assert reasons(read(table)) == [None] + ["unreadable"] * 7
    path.unlink()
    assert reasons(read(table, patience_s=1.0)) == ["unread"] * 8


def test_a_large_row_group_is_read_in_pieces_and_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(parquetfile, "LARGE_GROUP", 10_000)
    monkeypatch.setattr(parquetfile, "_PIECE", 2000)
    pictures = [os.urandom(500 + i) for i in range(60)]
    pq.write_table(
        pa.table({"image": pictures, "label": list(range(60))}),
        tmp_path / "a.parquet",
        row_group_size=40,
    )
    table = list_images(str(tmp_path))
    assert read(table) == pictures
    assert table["labels"].to_pylist() == [[i] for i in range(60)]
    order = np.random.default_rng(0).permutation(60)
    assert read(table.take(order)) == [pictures[i] for i in order]
    pieces = list(
        parquetfile.pieces(
            parquetfile.images_in(Location.of(str(tmp_path / "a.parquet"))).file,
            0,
            ["image"],
            20_000,
        )
    )
    assert len(pieces) > 8 and sum(piece.num_rows for piece in pieces) == 40


PEAK = """
import contextlib, resource, sys
from raypipe.data.listing import list_images
from raypipe.data.reader import Reader
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
before = peak()
table = list_images(sys.argv[1])
with contextlib.closing(Reader(1)) as reader:
    assert sum(len(data) for data in reader.read(table)) == table.num_rows * 100_000
print(peak() - before)
"""


@pytest.mark.soak
def test_memory_does_not_grow_with_the_row_group(tmp_path):
    rng = np.random.default_rng(0)
    pq.write_table(
        pa.table({"image": [rng.bytes(100_000) for _ in range(12_000)]}),
        tmp_path / "a.parquet",
        row_group_size=12_000,
    )
    out = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(out.stdout) < 600  # of 1,200 MB in one row group; 2,000 and more before


def promising(data: bytes, rows: int, more: int) -> bytes:
    """A Parquet file with one row group of `rows`.

    Its footer says that file and group have `more`, and its column `rows`.
    """
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    places = [
        at for at in range(start, len(data) - 8) if data[at] == 2 * rows
    ]  # thrift's zigzag numbers
    for pair in itertools.combinations(places, 2):
        out = bytearray(data)
        for at in pair:
            out[at] = 2 * more
        try:
            found = pq.read_metadata(io.BytesIO(bytes(out)))
            if (
                found.num_rows,
                found.row_group(0).num_rows,
                found.row_group(0).column(0).num_values,
            ) == (more, more, rows):
                return bytes(out)
        except (OSError, UnicodeDecodeError):
            continue
    raise AssertionError("no such footer")


def test_rows_that_only_the_footer_has_are_rejects(tmp_path):
    out = io.BytesIO()
    pq.write_table(pa.table({"image": [b"%d" % i * 9 for i in range(21)]}), out)
    (tmp_path / "a.parquet").write_bytes(promising(out.getvalue(), 21, 29))
    table = list_images(str(tmp_path))
    results = read(table)
    assert results[:21] == [b"%d" % i * 9 for i in range(21)]
    assert reasons(results)[21:] == ["unreadable"] * 8
    assert "fewer rows than the footer says" in results[28].detail


class Evil:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_parquet_file_is_unpickled(tmp_path):
    pytest.importorskip(
        "ray.data"
    )  # which registers a type whose values are unpickled when they are looked at
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    mark = tmp_path / "ran"
    evil = ArrowPythonObjectArray.from_objects([Evil(str(mark))] * 2)
    paths = pa.StructArray.from_arrays([pa.array([b"a", b"b"]), evil], names=["bytes", "path"])
    for name, columns in {
        "a": {
            "image": [b"a", b"b"],
            "height": evil,
            "width": evil,
            "name": evil,
            "boxes": evil,
            "label": evil,
        },
        "b": {"image": paths},
    }.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        assert read(list_images(str(tmp_path / f"{name}.parquet"))) == [b"a", b"b"]
    pq.write_table(pa.table({"image": evil}), tmp_path / "c.parquet")
    with pytest.raises(UsageError, match="no column with images"):
        list_images(str(tmp_path / "c.parquet"))
    data = io.BytesIO()
    pq.write_table(pa.table({"epoch": pa.array([1, 2], pa.int32()), "image_id": evil}), data)
    with pytest.raises(UsageError, match="cannot read it"):
        parquet.read_table(
            data.getvalue(),
            pa.schema([("image_id", pa.string()), ("no", pa.int64())]),
            "it",
            remedy="",
        )
    assert not mark.exists()


def test_bytes_that_are_stored_as_a_dictionary(tmp_path):
    column = pa.array([b"one", b"two", b"one", None], pa.binary()).dictionary_encode()
    pq.write_table(
        pa.table({"image": column, "other": pa.array([b"x"] * 4)}), tmp_path / "a.parquet"
    )
    results = read(list_images(str(tmp_path)))
    assert results[:3] == [b"one", b"two", b"one"] and reasons(results)[3] == "empty"


# --- writing, and reading what was written ---------------------------------------------------


def test_parquet_is_readable_by_anyone(tmp_path):
    write_block(Sink(format="parquet", root=Location.of(str(tmp_path))), block(WITH_REJECTS))
    table = pq.read_table(tmp_path / "part-000012.parquet")
    assert table.column_names == [
        "image_id",
        "name",
        "height",
        "width",
        "image",
        "boxes",
        "labels",
        "crowds",
        "annotation_ids",
    ]
    for row, image in zip(table.to_pylist(), IMAGES, strict=True):
        np.testing.assert_array_equal(
            np.frombuffer(row["image"], np.uint8).reshape(row["height"], row["width"], 3), image
        )
    assert (
        os.path.getsize(tmp_path / "part-000012.parquet")
        < sum(image.nbytes for image in IMAGES) + 20_000
    )


def test_parquet_pixels_that_begin_like_a_jpeg(tmp_path):
    image = photo(20, 30)
    image[0, 0] = (0xFF, 0xD8, 0xFF)
    write_block(Sink(format="parquet", root=Location.of(str(tmp_path))), block([image]))
    np.testing.assert_array_equal(pictures(list_images(str(tmp_path)))[0], image)


def test_parquet_row_groups_stay_small(tmp_path):
    """A reader of shuffled rows decodes a row group for each: 8 MiB, not a whole shard."""
    write_block(
        Sink(format="parquet", root=Location.of(str(tmp_path))), block([photo(600, 800)] * 12)
    )
    metadata = pq.read_metadata(tmp_path / "part-000012.parquet")
    assert metadata.num_row_groups == 3
    assert len(pictures(list_images(str(tmp_path)))) == 12


def test_s3_parquet_with_a_damaged_row_group(bucket, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    contents = [os.urandom(5000) for _ in range(32)]

    def parquet(pictures: list[bytes]) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(
            pa.table({"image": pictures}),
            buffer,
            row_group_size=4,
            use_dictionary=False,
            compression="gzip",
        )
        return buffer.getvalue()

    first = parquet(contents[:12])
    Location.of(bucket("set")).write("a.parquet", first)
    Location.of(bucket("set")).write("b.parquet", parquet(contents[12:]))
    table = list_images(bucket("set"))
    Location.of(bucket("set")).write(
        "a.parquet", first[:45000] + bytes(600) + first[45600:]
    )  # its last row group
    for threads in (
        0,
        1,
        4,
    ):  # with 0 and 1, one thread reads the end of the first file and the start of the second
        with contextlib.closing(Reader(threads)) as reader:
            results = list(reader.read(table))
        assert results[:8] == contents[:8] and results[12:] == contents[12:]
        assert [one.reason for one in results[8:12] if isinstance(one, Reject)] == [
            "unreadable"
        ] * 4


def test_a_store_that_fails_while_a_parquet_file_is_listed(monkeypatch):
    monkeypatch.setattr(Patience.__init__, "__defaults__", (2.0,))
    data = io.BytesIO()
    pq.write_table(pa.table({"image": [b"a", b"b"], "label": [4, 5]}), data)
    with objects(**{"a.parquet": data.getvalue()}) as store:
        place = Location.of(store.uri("a.parquet"))
        whole = parquet.list_parquet(place, "a.parquet", None).rows
        asked = len(store.asked)
        for once in range(asked):  # each of its requests fails once
            store.asked.clear()
            store.fails = lambda key, n, once=once: 503 if n == once else None
            assert parquet.list_parquet(place, "a.parquet", None).rows.equals(whole)
        for bad in range(asked):  # from each of its requests on, all fail
            store.asked.clear()
            store.fails = lambda key, n, bad=bad: 503 if n >= bad else None
            with pytest.raises(UsageError, match=r"HTTP 503.*try again") as told:
                parquet.list_parquet(place, "a.parquet", None)
            assert "Remove it" not in str(told.value)


def test_a_parquet_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    pq.write_table(pa.table({"image": [b"a"]}), tmp_path / "a.parquet")

    def refuse(self: Location, *, patient: bool = False) -> pa.NativeFile:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Location, "open", refuse)
    with pytest.raises(UsageError, match=r"Permission denied.*make it readable") as told:
        list_images(str(tmp_path))
    assert "Remove it" not in str(told.value)
