import os
import pathlib

import cv2
import numpy as np
import pyarrow as pa
import pytest

from raypipe import UsageError
from raypipe.data.listing import list_images
from raypipe.data.location import Location
from raypipe.data.sinks import FORMATS, Sink, Written
from raypipe.data.tables import BLOCK
from tests.data.conftest import (
    IMAGES,
    WITH_REJECTS,
    block,
    files,
    photo,
    pictures,
    write_block,
)
from tests.support.forks import forks

LOSSY = ("jpeg", "webdataset", "huggingface")

PHOTOS = pathlib.Path("/usr/share/doc/opencv-doc/examples/data")  # Debian's opencv-doc


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_written_is_an_input_again(tmp_path, format):
    content = block(WITH_REJECTS)
    written = write_block(Sink(format=format, root=Location.of(str(tmp_path))), content)
    good = [row for row in content.to_pylist() if row["image"] is not None]
    assert files(tmp_path).keys() == set(written.files)
    assert written.bytes == sum(map(len, files(tmp_path).values()))
    assert len(written.files) == (len(good) if format in ("jpeg", "png", "npy") else 1)

    table = list_images(str(tmp_path))
    column = "image_id" if format == "huggingface" else "name"  # its names are its ids
    assert table["name"].to_pylist() == [row[column] for row in good]
    for found, image in zip(pictures(table), IMAGES, strict=True):
        if format in LOSSY:
            assert found.shape == image.shape and np.abs(found.astype(int) - image).mean() < 3
        else:
            np.testing.assert_array_equal(found, image)
    if format in ("webdataset", "parquet"):
        for column in ("image_id", "boxes", "labels", "crowds", "annotation_ids"):
            assert table[column].to_pylist() == [row[column] for row in good], column


@pytest.mark.parametrize("format", FORMATS)
def test_writing_a_shard_again_changes_nothing(tmp_path, format):
    sink = Sink(format=format, root=Location.of(str(tmp_path)))
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
    assert write_block(
        Sink(format=format, root=Location.of(str(tmp_path))), block([None, None])
    ) == Written(files=[], bytes=0)
    assert write_block(
        Sink(format=format, root=Location.of(str(tmp_path))), BLOCK.empty_table()
    ) == Written(files=[], bytes=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_epochs_do_not_overwrite_each_other(tmp_path, format):
    sink = Sink(format=format, root=Location.of(str(tmp_path)))
    first = write_block(sink, block(IMAGES))
    third = write_block(sink, block([255 - image for image in IMAGES], epoch=2, shard=13))
    assert all(file.startswith("epoch-002/") for file in third.files)
    assert files(tmp_path).keys() == {*first.files, *third.files}
    table = list_images(str(tmp_path))
    assert table.num_rows == 2 * len(IMAGES)
    assert len(set(table["image_id"].to_pylist())) == table.num_rows
    found = {image.tobytes() for image in pictures(table)}
    if format not in LOSSY:
        assert found == {image.tobytes() for one in IMAGES for image in (one, 255 - one)}


@pytest.mark.parametrize("format", FORMATS)
def test_a_failing_encoder_or_disk_leaves_only_whole_files(tmp_path, format, monkeypatch):
    sink = Sink(format=format, root=Location.of(str(tmp_path / "out")))
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
        write_block(Sink(format=format, root=Location.of(str(root))), block(images))
        for found, image in zip(pictures(list_images(str(root))), images, strict=True):
            assert np.abs(found.astype(int) - image).mean() < (4 if format in LOSSY else 1e-9)


def test_settings_that_cannot_be():
    with pytest.raises(UsageError, match=r"'gif'.*jpeg, png, npy, webdataset, parquet"):
        Sink(format="gif", root=Location.of("out"))
    for quality in (0, 101):
        with pytest.raises(UsageError, match=str(quality)):
            Sink(format="jpeg", root=Location.of("out"), quality=quality)


def _write_for_ever(root: str) -> None:
    content = block([photo(300, 300, i) for i in range(20)])
    while True:
        write_block(Sink(format="png", root=Location.of(root)), content)


def test_a_killed_writer_leaves_only_whole_images(tmp_path):
    root = tmp_path / "out"
    process = forks(__name__).Process(target=_write_for_ever, args=(str(root),), daemon=True)
    process.start()
    while not list(root.glob("set/*.png")):
        assert process.is_alive()
    process.kill()
    process.join()
    table = list_images(str(root))
    assert table.num_rows >= 1
    for found, name in zip(pictures(table), table["name"].to_pylist(), strict=True):
        np.testing.assert_array_equal(found, photo(300, 300, int(name.removeprefix("set/"))))


def test_a_root_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        write_block(Sink(format="png", root=Location.of(str(tmp_path / "file"))), block(IMAGES))


@pytest.mark.parametrize("format", FORMATS)
def test_s3_round_trip(bucket, format):
    sink = Sink(format=format, root=Location.of(bucket("out put/ü")))
    written = write_block(
        sink, block(WITH_REJECTS, names=[f"s et/#{i}%25?" for i in range(len(WITH_REJECTS))])
    )
    table = list_images(str(sink.root))
    assert table.num_rows == len(IMAGES)
    assert all(
        uri.startswith("s3://") and "endpoint_override=" in uri for uri in table["uri"].to_pylist()
    )
    for found, image in zip(pictures(table), IMAGES, strict=True):
        assert np.abs(found.astype(int) - image).mean() < (3 if format in LOSSY else 1e-9)
    for file in written.files:  # there is nothing else, and each file alone is an input too
        assert list_images(str(sink.root / file)).num_rows == (
            1 if len(written.files) > 1 else len(IMAGES)
        )
    folder, _, _ = written.files[0].rpartition("/")
    assert sorted((sink.root / folder).names()) == sorted(
        file[len(folder) :].strip("/") for file in written.files
    )
    for pattern in ("/*", "//*.*", "/**"):
        assert list_images(str(sink.root / folder).replace("?", pattern + "?", 1)).num_rows == len(
            IMAGES
        )


def test_s3_write_that_fails_leaves_nothing(bucket):
    root = (
        bucket("out")
        .replace("s3://", "s3://no-such-")
        .replace("allow_bucket_creation=true", "allow_bucket_creation=false")
    )
    with pytest.raises(OSError, match=r"NoSuchBucket|bucket does not exist"):
        write_block(Sink(format="png", root=Location.of(root)), block(IMAGES))
