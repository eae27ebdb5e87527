import io

import numpy as np
import pytest

from raypipe import UsageError
from raypipe.data.listing import list_images, look
from raypipe.data.location import Location
from raypipe.data.sinks import Sink
from tests.data.conftest import IMAGES, block, write_block

# --- writing ---------------------------------------------------------------------------------


def test_names_and_folders_of_image_files(tmp_path):
    names = ["a.b.c", "deep/er/x", "ü ö"]
    content = block(IMAGES[:3], names=names)
    assert write_block(
        Sink(format="jpeg", root=Location.of(str(tmp_path)), folder="val2017"), content
    ).files == [
        "val2017/a.b.c.jpg",
        "val2017/deep/er/x.jpg",
        "val2017/ü ö.jpg",
    ]
    assert write_block(Sink(format="png", root=Location.of(str(tmp_path))), content).files == [
        "a.b.c.png",
        "deep/er/x.png",
        "ü ö.png",
    ]
    later = block(IMAGES[:3], names=names, epoch=1)
    assert (
        write_block(Sink(format="npy", root=Location.of(str(tmp_path)), folder="v/"), later).files[
            0
        ]
        == "epoch-001/v/a.b.c.npy"
    )


def test_quality_reaches_the_encoder(tmp_path):
    sizes = {}
    for quality in (50, 95):
        sizes[quality] = write_block(
            Sink(format="jpeg", root=Location.of(str(tmp_path)), quality=quality), block(IMAGES)
        ).bytes
    assert sizes[50] < 0.8 * sizes[95]


def test_npy_holds_what_finish_makes(tmp_path):
    def finish(image: np.ndarray) -> np.ndarray:
        return (image.astype(np.float32) / 255).transpose(2, 0, 1)

    write_block(Sink(format="npy", root=Location.of(str(tmp_path))), block(IMAGES), finish=finish)
    for i, image in enumerate(IMAGES):
        array = np.load(tmp_path / f"set/{i:03d}.npy", allow_pickle=False)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, finish(image))


def test_npy_bytes_are_those_of_numpy(tmp_path):
    write_block(Sink(format="npy", root=Location.of(str(tmp_path))), block(IMAGES))
    for i, image in enumerate(IMAGES):
        buffer = io.BytesIO()
        np.save(buffer, image)
        assert (tmp_path / f"set/{i:03d}.npy").read_bytes() == buffer.getvalue()


# --- listing a store: a real S3 server on this machine ---------------------------------------


def test_s3_listing(bucket):
    root, folder = bucket("data"), Location.of(bucket("data"))
    for file in (
        "a/1.jpg",
        "a/2.PNG",
        "b/c/3.jpg",
        "_raypipe/x.jpg",
        ".h/x.jpg",
        "b/notes.txt",
        "z 1.jpg",
    ):
        folder.write(file, file.encode())
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
        Location.of(bucket("odd")).write(file, b"")
    assert list_images(bucket("odd/run[2]"))["image_id"].to_pylist() == ["x.jpg"]
    assert list_images(bucket("odd/run[2]/x.jpg"))["image_id"].to_pylist() == ["x.jpg"]
    assert list_images(bucket("odd/run[23]/*"))["image_id"].to_pylist() == ["run2/y.jpg"]
    for key, message in (("nothing/here", "does not exist"), ("data/*.gif", "no images")):
        with pytest.raises(UsageError, match=message):
            list_images(bucket(key))
    with pytest.raises(UsageError, match="cannot list"):
        list_images(bucket("x*").replace("s3://", "s3://no-such-"))


def test_an_empty_s3_object_beside_keys_below_its_name_stands_for_a_folder(bucket):
    for key, data in (
        ("photos", b""),
        ("photos/a.jpg", b"a"),
        ("photos/sub", b""),
        ("photos/sub/b.jpg", b"b"),
        ("alone.jpg", b""),
    ):
        Location.of(bucket("")).write(key, data)
    found = look(bucket("photos"))
    assert found.rows["image_id"].to_pylist() == ["a.jpg", "sub/b.jpg"] and not found.skipped
    assert look(bucket("alone.jpg")).rows.num_rows == 1
    assert look(bucket("photos/a.jpg")).rows.num_rows == 1
