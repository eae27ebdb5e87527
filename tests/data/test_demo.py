import contextlib
import itertools
import subprocess
import sys
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from raypipe import UsageError
from raypipe.data import demo
from raypipe.data.listing import list_images
from raypipe.data.reader import Reader
from raypipe.data.tables import SOURCE
from raypipe.images import opencv
from raypipe.images.decode import read_header


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/raypipe"


def test_listing_and_reading():
    table = list_images("demo:12")
    assert table.schema == SOURCE
    assert (
        table["image_id"].to_pylist()
        == table["name"].to_pylist()
        == [f"demo-0-{i:06d}" for i in range(12)]
    )
    with contextlib.closing(Reader()) as reader:
        for data, boxes, labels, index in zip(
            reader.read(table),
            table["boxes"].to_pylist(),
            table["labels"].to_pylist(),
            range(12),
            strict=True,
        ):
            picture = demo.layout(0, index)
            header = read_header(data)
            assert (
                header.format == "jpeg"
                and header.native
                and (header.height, header.width) == picture.size
            )
            np.testing.assert_array_equal(np.array(boxes, np.float32).reshape(-1, 4), picture.boxes)
            assert labels == picture.labels.tolist()
            assert 30_000 < len(data) < 150_000
            # The JPEG is the picture: what quality 88 loses of it is its noise.
            assert (
                np.abs(opencv.decode(data, header).astype(int) - demo.render(0, index)).mean() < 6
            )
    numbers = table["annotation_ids"].combine_chunks().flatten().to_pylist()
    assert len(set(numbers)) == len(numbers) == len(table["labels"].combine_chunks().flatten())


def test_how_many():
    assert list_images("demo:7", limit=3).equals(list_images("demo:3"))
    assert list_images("demo:3", limit=7).num_rows == 3
    assert list_images("demo", limit=5).num_rows == 5
    for input in ("demo:", "demo:0", "demo:-1", "demo:many", "demo:1.5", "demo:²"):
        with pytest.raises(UsageError, match="demo:1000"):
            list_images(input)
    with pytest.raises(UsageError, match="-1"):
        list_images("demo:1", seed=-1)


def test_pictures_are_functions_of_seed_and_index():
    np.testing.assert_array_equal(demo.render(3, 5), demo.render(3, 5))
    assert demo.layout(3, 5).size != demo.layout(3, 6).size or not np.array_equal(
        demo.render(3, 5), demo.render(3, 6)
    )
    first, other = list_images("demo:5"), list_images("demo:5", seed=1)
    assert not set(first["uri"].to_pylist()) & set(other["uri"].to_pylist())
    assert first["boxes"] != other["boxes"]
    assert list_images("demo:5").equals(first)


def test_what_is_in_the_pictures():
    layouts = [demo.layout(0, index) for index in range(300)]
    labels = np.concatenate([one.labels for one in layouts])
    counts = np.bincount(labels)
    assert len(demo.CLASSES) >= 5 and len(counts) == len(demo.CLASSES) + 1
    assert counts[0] == 0 and counts[1:].min() > 0.1 * len(labels)
    for one in layouts:
        height, width = one.size
        assert 480 <= height <= 800 and 480 <= width <= 800
        assert (
            len(one.labels) == len(one.boxes) >= 1
            and one.boxes.dtype == np.float32
            and one.labels.dtype == np.int64
        )
        left, top, right, bottom = one.boxes.T
        assert (
            (left >= 0).all()
            and (top >= 0).all()
            and (right <= width).all()
            and (bottom <= height).all()
        )
        assert (right - left > 12).all() and (bottom - top > 12).all()


def test_boxes_are_where_the_things_are(monkeypatch):
    """Painting a thing changes pixels up to its box on every side, and beyond only its shadow."""
    monkeypatch.setattr(cv2, "ellipse", lambda *args: None)  # no shadows
    for index in range(40):
        picture = demo.layout(1, index)
        for shape, box in zip(picture.shapes, picture.boxes, strict=True):
            image = np.zeros((*picture.size, 3), np.uint8)
            demo._paint(image, shape, 0.3)
            rows, columns = np.nonzero(image.max(axis=2) > 8)
            found = np.array((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            assert np.abs(found - box).max() < 2, (index, demo.CLASSES[shape.label - 1], found, box)


def test_classes_can_be_told_apart():
    """A crude classifier is enough: the nearest mean colour and fill of the box."""

    def features(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        vectors, labels = [], []
        for index in range(count):
            image, picture = demo.render(seed, index), demo.layout(seed, index)
            for (left, top, right, bottom), label in zip(
                picture.boxes.round().astype(int), picture.labels, strict=True
            ):
                crop = cv2.resize(
                    image[top:bottom, left:right], (8, 8), interpolation=cv2.INTER_AREA
                ).astype(np.float32)
                vectors.append(crop.ravel())
                labels.append(label)
        return np.array(vectors), np.array(labels)

    known, known_labels = features(0, 60)
    asked, asked_labels = features(1, 40)
    means = np.stack(
        [known[known_labels == label].mean(axis=0) for label in range(1, len(demo.CLASSES) + 1)]
    )
    guesses = 1 + np.argmin(((asked[:, None] - means[None]) ** 2).sum(axis=2), axis=1)
    assert (guesses == asked_labels).mean() > 0.8  # by chance: 0.17


def test_a_picture_missing_from_the_cache_is_made_again(cache):
    table = list_images("demo:3")
    with contextlib.closing(Reader()) as reader:
        before = list(reader.read(table))
        (jpeg,) = cache.rglob("000001.jpg")
        jpeg.unlink()
        assert list(reader.read(table)) == before
        assert jpeg.exists()
        assert [file for file in cache.rglob("*") if file.is_file() and file.suffix != ".jpg"] == []


def test_listing_makes_only_what_is_missing(cache, monkeypatch):
    list_images("demo:4")
    rendered = []
    original = demo.render
    monkeypatch.setattr(
        demo, "render", lambda seed, index: rendered.append(index) or original(seed, index)
    )
    list_images("demo:6")
    list_images("demo:6")
    assert sorted(rendered) == [4, 5]


def test_making_many_tells_how_far_it_is(monkeypatch):
    now = itertools.count()  # a second a picture
    monkeypatch.setattr(demo, "time", SimpleNamespace(monotonic=lambda: next(now)))
    told = []
    assert demo.render_missing(0, 12, told.append) == 12
    assert told == [
        "Making demo photos, once: 2 of 12 done, about 10 s left",
        "Making demo photos, once: 7 of 12 done, about 5 s left",
        "Making demo photos, once: 12 of 12 done, about 0 s left",
    ]
    assert demo.render_missing(0, 12, told.append) == 0 and len(told) == 3


def test_making_few_says_nothing(caplog):
    demo.render_missing(0, 2)
    assert caplog.messages == []


def test_a_terminal_shows_it():
    """A warning reaches the user of a job, who has set up no logging."""
    code = (
        "from raypipe.data import demo, listing; demo.TELL_AFTER_S = 0.0; "
        "listing.list_images('demo:3')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Making demo photos, once: 1 of 3 done" in done.stderr


def test_the_cache_falls_back_to_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(demo.tempfile, "gettempdir", lambda: str(tmp_path))
    demo._cache_dir.cache_clear()
    assert demo.cache_dir().startswith(str(tmp_path))
    with contextlib.closing(Reader()) as reader:
        assert isinstance(next(reader.read(list_images("demo:1"))), bytes)
    monkeypatch.setattr(demo.tempfile, "gettempdir", lambda: "/proc/nowhere")
    demo._cache_dir.cache_clear()
    with pytest.raises(UsageError, match="XDG_CACHE_HOME"):
        list_images("demo:1")
    demo._cache_dir.cache_clear()


def test_it_is_quick():
    demo._clouds(), demo._grain()
    start = time.process_time()
    for index in range(20):
        demo._jpeg(0, index)
    assert (time.process_time() - start) / 20 < 0.05  # 0.010 s on one core of a 2026 server
    start = time.process_time()
    for index in range(100):
        demo.layout(0, index)
    assert (time.process_time() - start) / 100 < 0.005  # 0.0005 s
