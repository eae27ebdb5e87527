import contextlib
import functools
import io
import json
import multiprocessing
import os
import pathlib
import tarfile
import threading

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe import UsageError
from raypipe.data import location
from raypipe.data.formats.coco import write_annotations
from raypipe.data.listing import list_images, look
from raypipe.data.reader import Reader
from raypipe.data.sinks import FORMATS, Sink, Written, write_shard
from raypipe.data.tables import BLOCK
from raypipe.images import opencv
from raypipe.images.decode import Reject, read_header

PHOTOS = pathlib.Path(
    "/usr/share/doc/opencv-doc/examples/data"
)  # Debian's opencv-doc, where it is installed


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Like a photo: smooth in the large, some texture in the small."""
    rng = np.random.default_rng(seed)
    large = cv2.resize(
        rng.uniform(0, 255, (4, 5, 3)).astype(np.float32),
        (width, height),
        interpolation=cv2.INTER_CUBIC,
    )
    return np.clip(large + rng.normal(0, 4, (height, width, 1)), 0, 255).astype(np.uint8)


def block(
    images: list[np.ndarray | None],
    *,
    names: list[str] | None = None,
    epoch: int = 0,
    shard: int = 12,
) -> pa.Table:
    rows = []
    for i, image in enumerate(images):
        rows.append(
            {
                "epoch": epoch,
                "shard": shard,
                "image_id": f"id-{i}",
                "name": names[i] if names else f"set/{i:03d}",
                "uri": f"/in/{i}.jpg",
                "height": None if image is None else image.shape[0],
                "width": None if image is None else image.shape[1],
                "image": None if image is None else image.tobytes(),
                "reason": "corrupt" if image is None else None,
                "detail": "half of it is missing" if image is None else None,
                "boxes": [[1.5, 2, 3, 4 + i]] * (i % 3),
                "labels": [5, 6][: i % 3],
                "crowds": [False, True][: i % 3],
                "annotation_ids": [10 * i, 10 * i + 1][: i % 3],
            }
        )
    return pa.Table.from_pylist(rows, schema=BLOCK)


IMAGES = [photo(40 + i, 60 - i, i) for i in range(7)]
WITH_REJECTS = [None, *IMAGES[:3], None, *IMAGES[3:], None]

write_block = functools.partial(write_shard, encode=opencv.encode)


def files(root: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def pictures(table: pa.Table) -> list[np.ndarray]:
    with contextlib.closing(Reader()) as reader:
        results = list(reader.read(table))
    assert not [one for one in results if isinstance(one, Reject)]
    return [opencv.decode(data, read_header(data)) for data in results]  # type: ignore[arg-type]


# --- every format ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_written_is_an_input_again(tmp_path, format):
    content = block(WITH_REJECTS)
    written = write_block(Sink(format=format, root=str(tmp_path)), content)
    good = [row for row in content.to_pylist() if row["image"] is not None]
    assert files(tmp_path).keys() == set(written.files)
    assert written.bytes == sum(map(len, files(tmp_path).values()))
    assert len(written.files) == (len(good) if format in ("jpeg", "png", "npy") else 1)

    table = list_images(str(tmp_path))
    assert table["name"].to_pylist() == [row["name"] for row in good]
    for found, image in zip(pictures(table), IMAGES, strict=True):
        if format in ("jpeg", "webdataset"):
            assert found.shape == image.shape and np.abs(found.astype(int) - image).mean() < 3
        else:
            np.testing.assert_array_equal(found, image)
    if format in ("webdataset", "parquet"):
        for column in ("image_id", "boxes", "labels", "crowds", "annotation_ids"):
            assert table[column].to_pylist() == [row[column] for row in good], column


@pytest.mark.parametrize("format", FORMATS)
def test_writing_a_shard_again_changes_nothing(tmp_path, format):
    sink = Sink(format=format, root=str(tmp_path))
    first = write_block(sink, block(WITH_REJECTS))
    before = files(tmp_path)
    assert write_block(sink, block(WITH_REJECTS)) == first
    assert files(tmp_path) == before
    # Nor does it matter in which pieces the block arrives.
    content = block(WITH_REJECTS)
    pieces = pa.concat_tables([content.slice(0, 3), content.slice(3, 1), content.slice(4)])
    assert write_block(sink, pieces) == first
    assert files(tmp_path) == before


@pytest.mark.parametrize("format", FORMATS)
def test_a_shard_of_rejects_writes_nothing(tmp_path, format):
    assert write_block(Sink(format=format, root=str(tmp_path)), block([None, None])) == Written(
        files=[], bytes=0
    )
    assert write_block(Sink(format=format, root=str(tmp_path)), BLOCK.empty_table()) == Written(
        files=[], bytes=0
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_epochs_do_not_overwrite_each_other(tmp_path, format):
    sink = Sink(format=format, root=str(tmp_path))
    first = write_block(sink, block(IMAGES))
    third = write_block(sink, block([255 - image for image in IMAGES], epoch=2, shard=13))
    assert all(file.startswith("epoch-002/") for file in third.files)
    assert files(tmp_path).keys() == {*first.files, *third.files}
    table = list_images(str(tmp_path))
    assert table.num_rows == 2 * len(IMAGES)
    assert len(set(table["image_id"].to_pylist())) == table.num_rows
    found = {image.tobytes() for image in pictures(table)}
    if format not in ("jpeg", "webdataset"):
        assert found == {image.tobytes() for one in IMAGES for image in (one, 255 - one)}


@pytest.mark.parametrize("format", FORMATS)
def test_a_failing_encoder_or_disk_leaves_only_whole_files(tmp_path, format, monkeypatch):
    sink = Sink(format=format, root=str(tmp_path / "out"))
    write_block(sink, block(IMAGES))
    before = files(tmp_path / "out")
    other = block([255 - image for image in IMAGES])
    calls = 0

    def full(descriptor, data, write=os.write):
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[: max(1, len(data) // 2)])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write_block(sink, other)
    monkeypatch.undo()
    after = files(tmp_path / "out")
    assert after.keys() == before.keys()
    write_block(sink, other)
    final = files(tmp_path / "out")
    assert all(after[file] in (before[file], final[file]) for file in after)


def test_photos_of_this_machine(tmp_path):
    images = [
        image[..., ::-1]
        for path in sorted(PHOTOS.glob("*.jpg"))[:4]
        if (image := cv2.imread(str(path))) is not None
    ]
    if not images:
        pytest.skip("opencv-doc is not installed")
    for format in FORMATS:
        root = tmp_path / format
        write_block(Sink(format=format, root=str(root)), block(images))
        for found, image in zip(pictures(list_images(str(root))), images, strict=True):
            assert np.abs(found.astype(int) - image).mean() < (
                4 if format in ("jpeg", "webdataset") else 1e-9
            )


# --- image files -----------------------------------------------------------------------------------------------------------


def test_names_and_folders_of_image_files(tmp_path):
    names = ["a.b.c", "deep/er/x", "ü ö"]
    content = block(IMAGES[:3], names=names)
    assert write_block(
        Sink(format="jpeg", root=str(tmp_path), folder="val2017"), content
    ).files == [
        "val2017/a.b.c.jpg",
        "val2017/deep/er/x.jpg",
        "val2017/ü ö.jpg",
    ]
    assert write_block(Sink(format="png", root=str(tmp_path)), content).files == [
        "a.b.c.png",
        "deep/er/x.png",
        "ü ö.png",
    ]
    later = block(IMAGES[:3], names=names, epoch=1)
    assert (
        write_block(Sink(format="npy", root=str(tmp_path), folder="v/"), later).files[0]
        == "epoch-001/v/a.b.c.npy"
    )


def test_quality_reaches_the_encoder(tmp_path):
    sizes = {}
    for quality in (50, 95):
        sizes[quality] = write_block(
            Sink(format="jpeg", root=str(tmp_path), quality=quality), block(IMAGES)
        ).bytes
    assert sizes[50] < 0.8 * sizes[95]


def test_npy_holds_what_finish_makes(tmp_path):
    def finish(image: np.ndarray) -> np.ndarray:
        return (image.astype(np.float32) / 255).transpose(2, 0, 1)

    write_block(Sink(format="npy", root=str(tmp_path)), block(IMAGES), finish=finish)
    for i, image in enumerate(IMAGES):
        array = np.load(tmp_path / f"set/{i:03d}.npy", allow_pickle=False)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, finish(image))


def test_npy_bytes_are_those_of_numpy(tmp_path):
    write_block(Sink(format="npy", root=str(tmp_path)), block(IMAGES))
    for i, image in enumerate(IMAGES):
        buffer = io.BytesIO()
        np.save(buffer, image)
        assert (tmp_path / f"set/{i:03d}.npy").read_bytes() == buffer.getvalue()


def test_settings_that_cannot_be():
    with pytest.raises(UsageError, match=r"'gif'.*jpeg, png, npy, webdataset, parquet"):
        Sink(format="gif", root="out")
    for quality in (0, 101):
        with pytest.raises(UsageError, match=str(quality)):
            Sink(format="jpeg", root="out", quality=quality)


# --- tars and Parquet ------------------------------------------------------------------------------------------------------


def test_webdataset_layout(tmp_path):
    content = block(IMAGES[:3], names=["a/x.1", "100%", "c"])
    rows = content.to_pylist()
    rows[2] |= {"boxes": [], "labels": [9], "crowds": [], "annotation_ids": []}
    written = write_block(
        Sink(format="webdataset", root=str(tmp_path)), pa.Table.from_pylist(rows, schema=BLOCK)
    )
    assert written.files == ["shard-000012.tar"]
    with tarfile.open(tmp_path / "shard-000012.tar") as archive:
        members = archive.getmembers()
        assert [one.name for one in members] == [
            "a/x%2E1.jpg", "a/x%2E1.json", "100%25.jpg", "100%25.json", "c.jpg", "c.json", "c.cls",
        ]  # fmt: skip
        assert {
            (one.mtime, one.uid, one.gid, one.uname, one.gname, one.mode) for one in members
        } == {(0, 0, 0, "", "", 0o644)}
        sidecar = json.load(archive.extractfile("100%25.json"))  # type: ignore[arg-type]
        assert archive.extractfile("c.cls").read() == b"9"  # type: ignore[union-attr]
    assert sidecar == {
        "image_id": "id-1",
        "height": 41,
        "width": 59,
        "boxes": [[1.5, 2.0, 3.0, 5.0]],
        "labels": [5],
        "crowds": [False],
        "annotation_ids": [10],
    }
    table = list_images(str(tmp_path))
    assert table["name"].to_pylist() == ["a/x.1", "100%", "c"]
    assert table["labels"].to_pylist()[2] == [9]


def test_parquet_is_readable_by_anyone(tmp_path):
    write_block(Sink(format="parquet", root=str(tmp_path)), block(WITH_REJECTS))
    table = pq.read_table(tmp_path / "part-000012.parquet")
    assert table.column_names == [
        "image_id", "name", "height", "width", "image", "boxes", "labels", "crowds", "annotation_ids",
    ]  # fmt: skip
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
    write_block(Sink(format="parquet", root=str(tmp_path)), block([image]))
    np.testing.assert_array_equal(pictures(list_images(str(tmp_path)))[0], image)


def test_parquet_row_groups_stay_small(tmp_path):
    """A reader of shuffled rows decodes a row group for each: 8 MiB, not a whole shard."""
    write_block(Sink(format="parquet", root=str(tmp_path)), block([photo(600, 800)] * 12))
    metadata = pq.read_metadata(tmp_path / "part-000012.parquet")
    assert metadata.num_row_groups == 3
    assert len(pictures(list_images(str(tmp_path)))) == 12


# --- whole or not at all ---------------------------------------------------------------------------------------------------


def test_readers_never_see_half_a_file(tmp_path):
    versions = [bytes([i]) * (1 << 20) for i in range(2)]
    location.write(str(tmp_path), "x/y.bin", versions[0])
    stop = threading.Event()

    failures = []

    def rewrite(version: bytes) -> None:
        try:
            while not stop.is_set():
                location.write(str(tmp_path), "x/y.bin", version)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=rewrite, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    try:
        assert all((tmp_path / "x/y.bin").read_bytes() in versions for _ in range(200))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert files(tmp_path).keys() == {"x/y.bin"}


def _write_for_ever(root: str) -> None:
    content = block([photo(300, 300, i) for i in range(20)])
    while True:
        write_block(Sink(format="png", root=root), content)


def test_a_killed_writer_leaves_only_whole_images(tmp_path):
    root = tmp_path / "out"
    process = multiprocessing.get_context("spawn").Process(
        target=_write_for_ever, args=(str(root),), daemon=True
    )
    process.start()
    while not list(root.glob("set/*.png")):
        assert process.is_alive()
    process.kill()
    process.join()
    table = list_images(str(root))
    assert table.num_rows >= 1
    for found, name in zip(pictures(table), table["name"].to_pylist(), strict=True):
        np.testing.assert_array_equal(found, photo(300, 300, int(name.removeprefix("set/"))))


def test_folders_that_vanish_come_back(tmp_path):
    root = str(tmp_path / "out")
    location.write(root, "a/b/c.bin", b"1")
    location.delete_folder(root)
    location.write(root, "a/b/c.bin", b"2")
    assert location.read(f"{root}/a/b/c.bin") == b"2"
    assert location.names(f"{root}/a/b") == ["c.bin"] and location.names(f"{root}/nowhere") == []


def test_a_root_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        write_block(Sink(format="png", root=str(tmp_path / "file")), block(IMAGES))


# --- COCO annotations ------------------------------------------------------------------------------------------------------


def test_annotations_of_written_images(tmp_path):
    source = {
        "info": {"year": 2017},
        "licenses": [{"id": 1}],
        "categories": [{"id": 18, "name": "dog", "supercategory": "animal"}],
        "my_own_key": [1, 2],
        "images": [
            {"id": 5, "file_name": "a.png", "height": 100, "width": 200, "coco_url": "http://x"},
            {"id": 3, "file_name": "rejected.jpg", "height": 100, "width": 200},
            {"id": 9, "file_name": "sub/empty.jpg", "height": 10, "width": 20},
        ],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 18, "bbox": [20, 10, 40, 20], "area": 400, "iscrowd": 0, "segmentation": [[1, 2, 3]],
             "keypoints": [1, 2, 2], "num_keypoints": 1, "score": 0.5},
            {"id": 2, "image_id": 5, "category_id": 18, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0},
            {"id": 4, "image_id": 3, "category_id": 18, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0},
            {"id": 7, "image_id": 5, "category_id": 18, "bbox": [0, 0, 200, 100], "area": 20000, "iscrowd": 1},
        ],
    }  # fmt: skip
    path = tmp_path / "instances_val.json"
    path.write_text(json.dumps(source))
    root = tmp_path / "out"
    # From 100x200 to 300x300: x is stretched 1.5 times, y 3 times. Annotation 2 was dropped by the recipe.
    rows = [
        ("9", "val/sub/empty.jpg", 30, 30, np.empty((0, 4), np.float32), []),
        (
            "5",
            "val/a.jpg",
            300,
            300,
            np.array([[0, 0, 300, 300], [30, 30, 90, 90]], np.float32),
            [7, 1],
        ),
    ]
    assert (
        write_annotations(str(path), str(root), rows, folder="val").file
        == "annotations/instances_val.json"
    )
    assert files(root).keys() == {"annotations/instances_val.json"}
    result = json.loads((root / "annotations/instances_val.json").read_text())
    assert result == source | {
        "images": [
            {"id": 5, "file_name": "a.jpg", "height": 300, "width": 300, "coco_url": "http://x"},
            {"id": 9, "file_name": "sub/empty.jpg", "height": 30, "width": 30},
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 5,
                "category_id": 18,
                "bbox": [30, 30, 60, 60],
                "area": 1800,
                "iscrowd": 0,
                "score": 0.5,
            },
            {
                "id": 7,
                "image_id": 5,
                "category_id": 18,
                "bbox": [0, 0, 300, 300],
                "area": 90000,
                "iscrowd": 1,
            },
        ],
    }
    (root / "val").mkdir()
    again = list_images(str(root / "val"), annotations=str(root / "annotations/instances_val.json"))
    assert again["boxes"].to_pylist() == [[[30, 30, 90, 90], [0, 0, 300, 300]], []]


def test_annotations_whose_ids_are_unique_within_their_image_only_and_odd_values(tmp_path):
    source = {
        "images": [
            {"id": 1, "file_name": "a.jpg"},
            {"id": 2, "file_name": "b.jpg"},
            {"id": 3, "file_name": "left-out.jpg"},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": None},
            {"id": 1, "image_id": 2, "category_id": 1, "bbox": ["5", "5", "10", "20"], "area": 200},
            {"id": "2", "image_id": 2, "category_id": 1, "bbox": [0, 0, 10, 10]},
            {"id": 1, "image_id": 3, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100},
            {"id": 1, "image_id": 1, "category_id": 1, "caption": "no box"},
        ],
    }
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(source))
    listed = list_images(str(tmp_path), annotations=str(path)).slice(0, 2).to_pylist()
    rows = [
        (
            row["image_id"],
            f"{row['name']}.jpg",
            20,
            20,
            [[2 * v for v in box] for box in row["boxes"]],
            row["annotation_ids"],
        )
        for row in listed
    ]
    write_annotations(str(path), str(tmp_path / "out"), rows)
    result = json.loads((tmp_path / "out/annotations/boxes.json").read_text())["annotations"]
    assert [(one["image_id"], one["id"], one["bbox"], one.get("area")) for one in result] == [
        (1, 1, [0, 0, 20, 20], None),
        (2, 1, [10, 10, 20, 40], 800),
        (2, "2", [0, 0, 20, 20], None),
    ]


def test_annotations_from_something_else(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UsageError, match="not COCO"):
        write_annotations(str(tmp_path / "x.json"), str(tmp_path / "out"), [])
    assert not (tmp_path / "out").exists()


# --- S3, a real server on this machine -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_s3_round_trip(bucket, format):
    sink = Sink(format=format, root=bucket("out put/ü"))
    written = write_block(
        sink, block(WITH_REJECTS, names=[f"s et/#{i}%25?" for i in range(len(WITH_REJECTS))])
    )
    table = list_images(sink.root)
    assert table.num_rows == len(IMAGES)
    assert all(
        uri.startswith("s3://") and "endpoint_override=" in uri for uri in table["uri"].to_pylist()
    )
    for found, image in zip(pictures(table), IMAGES, strict=True):
        assert np.abs(found.astype(int) - image).mean() < (
            3 if format in ("jpeg", "webdataset") else 1e-9
        )
    for file in written.files:  # there is nothing else, and each file alone is an input too
        assert list_images(location.join(sink.root, file)).num_rows == (
            1 if len(written.files) > 1 else len(IMAGES)
        )
    folder, _, _ = written.files[0].rpartition("/")
    assert sorted(location.names(location.join(sink.root, folder))) == sorted(
        file[len(folder) :].strip("/") for file in written.files
    )
    for pattern in ("/*", "//*.*", "/**"):
        assert list_images(
            location.join(sink.root, folder).replace("?", pattern + "?", 1)
        ).num_rows == len(IMAGES)


def test_s3_listing(bucket):
    root = bucket("data")
    for file in (
        "a/1.jpg",
        "a/2.PNG",
        "b/c/3.jpg",
        "_raypipe/x.jpg",
        ".h/x.jpg",
        "b/notes.txt",
        "z 1.jpg",
    ):
        location.write(root, file, file.encode())
    table = list_images(root)
    assert table["image_id"].to_pylist() == ["a/1.jpg", "a/2.PNG", "b/c/3.jpg", "z 1.jpg"]
    assert list_images(bucket("data/**/*.jpg"))["image_id"].to_pylist() == [
        "a/1.jpg",
        "b/c/3.jpg",
        "z 1.jpg",
    ]
    assert list_images(bucket("data/{b,a}/**"), limit=2)["image_id"].to_pylist() == [
        "c/3.jpg",
        "1.jpg",
    ]
    assert list_images(bucket("data/z 1.jpg"))["image_id"].to_pylist() == ["z 1.jpg"]
    assert list_images(bucket("data/"), limit=2)["uri"].to_pylist() == table["uri"].to_pylist()[:2]
    for file in ("run[2]/x.jpg", "run2/y.jpg"):
        location.write(bucket("odd"), file, b"")
    assert list_images(bucket("odd/run[2]"))["image_id"].to_pylist() == ["x.jpg"]
    assert list_images(bucket("odd/run[2]/x.jpg"))["image_id"].to_pylist() == ["x.jpg"]
    assert list_images(bucket("odd/run[23]/*"))["image_id"].to_pylist() == ["run2/y.jpg"]
    for key, message in (("nothing/here", "does not exist"), ("data/*.gif", "no images")):
        with pytest.raises(UsageError, match=message):
            list_images(bucket(key))
    with pytest.raises(UsageError, match="cannot list"):
        list_images(bucket("x*").replace("s3://", "s3://no-such-"))


def test_s3_coco(bucket, tmp_path):
    location.write(bucket("set"), "images/one.jpg", b"one")
    content = {
        "images": [{"id": 1, "file_name": "one.jpg"}, {"id": 2, "file_name": "gone.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 2, 2]}],
    }
    location.write(bucket("set"), "annotations.json", json.dumps(content).encode())
    table = list_images(bucket("set/images"), annotations=bucket("set/annotations.json"))
    assert table["boxes"].to_pylist() == [[[1, 1, 3, 3]], []]
    with contextlib.closing(Reader()) as reader:
        first, second = reader.read(table)
    assert (
        first == b"one"
        and isinstance(second, Reject)
        and second.reason == "unreadable"
        and "gone.jpg" in second.detail
    )
    file = write_annotations(
        bucket("set/annotations.json"), bucket("out"), [("1", "one.jpg", 4, 4, [[0, 0, 1, 1]], [1])]
    ).file
    assert json.loads(location.read(location.join(bucket("out"), file)))["annotations"][0][
        "bbox"
    ] == [0, 0, 1, 1]


def test_an_empty_s3_object_beside_keys_below_its_name_stands_for_a_folder(bucket):
    for key, data in (
        ("photos", b""),
        ("photos/a.jpg", b"a"),
        ("photos/sub", b""),
        ("photos/sub/b.jpg", b"b"),
        ("alone.jpg", b""),
    ):
        location.write(bucket(""), key, data)
    found = look(bucket("photos"))
    assert found.rows["image_id"].to_pylist() == ["a.jpg", "sub/b.jpg"] and not found.skipped
    assert look(bucket("alone.jpg")).rows.num_rows == 1
    assert look(bucket("photos/a.jpg")).rows.num_rows == 1


def test_s3_failures_while_reading_are_rejects(bucket):
    write_block(Sink(format="webdataset", root=bucket("out")), block(IMAGES))
    table = list_images(bucket("out"))
    location.write(
        bucket("out"),
        "shard-000012.tar",
        location.read(location.join(bucket("out"), "shard-000012.tar"))[:6000],
    )
    with contextlib.closing(Reader(patience_s=5.0)) as reader:
        results = list(reader.read(table))
        assert (
            isinstance(results[0], bytes)
            and isinstance(results[-1], Reject)
            and results[-1].reason == "unreadable"
        )
    location.delete(table["uri"][0].as_py())
    with contextlib.closing(Reader(patience_s=1.0)) as reader:
        assert {one.reason for one in reader.read(table) if isinstance(one, Reject)} == {"unread"}


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
    location.write(bucket("set"), "a.parquet", first)
    location.write(bucket("set"), "b.parquet", parquet(contents[12:]))
    table = list_images(bucket("set"))
    location.write(
        bucket("set"), "a.parquet", first[:45000] + bytes(600) + first[45600:]
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


def test_s3_write_that_fails_leaves_nothing(bucket):
    root = (
        bucket("out")
        .replace("s3://", "s3://no-such-")
        .replace("allow_bucket_creation=true", "allow_bucket_creation=false")
    )
    with pytest.raises(OSError, match=r"NoSuchBucket|bucket does not exist"):
        write_block(Sink(format="png", root=root), block(IMAGES))


def test_s3_deletes(bucket):
    root = bucket("out")
    for file in ("a/1", "a/2", "b/3"):
        location.write(root, file, b"x")
    location.delete(location.join(root, "a/1"))
    location.delete(location.join(root, "a/1"))
    assert location.names(location.join(root, "a")) == ["2"]
    location.delete_folder(location.join(root, "a"))
    location.delete_folder(location.join(root, "nowhere"))
    assert location.names(location.join(root, "a")) == [] and location.names(
        location.join(root, "b")
    ) == ["3"]
    with pytest.raises(FileNotFoundError):
        location.read(location.join(root, "a/2"))
