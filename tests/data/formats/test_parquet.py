import io
import itertools
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe import UsageError
from raypipe.data.listing import list_images
from tests.data.conftest import ids, names, read, reasons, tar

PICTURES = [bytes([i]) * (50 + i) for i in range(20)]


def struct(pictures: list[bytes | None]) -> pa.Array:
    rows = [{"bytes": picture, "path": f"p{i}.jpg"} for i, picture in enumerate(pictures)]
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


@pytest.mark.parametrize(
    "columns",
    [
        {"image": pa.array(PICTURES, pa.binary())},
        {"image": pa.array(PICTURES, pa.large_binary()), "mask": pa.array(PICTURES[::-1], pa.binary())},
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
    assert table["offset"].to_pylist() == list(range(20)) and set(table["length"].to_pylist()) == {1}
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
        pq.write_table(pa.table({"image": [b"%d-%d" % (part, i) for i in range(4)]}), tmp_path / f"part-{part}.parquet")
    table = list_images(str(tmp_path))
    assert read(table) == [b"%d-%d" % pair for pair in itertools.product(range(3), range(4))]
    assert list_images(f"{tmp_path}/part-*.parquet").equals(table)
    assert list_images(str(tmp_path), limit=6).equals(table.slice(0, 6))
    tar(tmp_path / "a.tar", ("0.jpg", b"0"))
    with pytest.raises(UsageError, match="1 tars and 3 Parquet files"):
        list_images(str(tmp_path))


def test_parquet_that_cannot_be_an_input(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "one": [b"1"], "two": [b"2"]}), tmp_path / "which.parquet")
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
        pa.table({"image": [os.urandom(5000) for _ in range(8)]}), path, row_group_size=4, use_dictionary=False, compression="gzip"
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
