"""The predict stage without Ray: boxes on original images, results, and bad checkpoints."""

from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raypipe import UsageError
from raypipe.data.listing import list_images
from raypipe.data.location import Location
from raypipe.data.reader import Reader
from raypipe.data.sinks import Sink
from raypipe.data.tables import PREDICTIONS
from raypipe.data.work import make_work
from raypipe.images.ops.geometry import CenterCrop, Flip, PadTo, Resize, ShortSide
from raypipe.images.recipe import Finish, Recipe
from raypipe.models import checkpoint as checkpoints
from raypipe.models.checkpoint import Checkpoint, Progress
from raypipe.stages.planning import Preprocessing
from raypipe.stages.predict import Predicting, Predictor, load, predict_block
from raypipe.stages.preprocess import preprocess_shard
from tests.conftest import photo
from tests.models.toy import Toy


def toy(root: Path, **settings) -> str:
    """A checkpoint of the model that finds, in each image, the whole of it."""
    settings = {
        "model": {"name": "tests.models.toy:Toy", "arguments": {}},
        "classes": [7],
        "amp": "auto",
    } | settings
    folder = str(root / "storage" / "run-1" / checkpoints.name_of(Progress(step=3)))
    state = {"model": Toy(num_classes=2).state_dict(), "optimizer": {}, "random": []}
    checkpoints.save(
        folder, Checkpoint(settings=settings, progress=Progress(step=3), seen={}, state=state)
    )
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A photo of 90x120; one of 120x90 that EXIF turns to 90x120; and a file that is no image."""
    (tmp_path / "photos").mkdir()
    Image.fromarray(photo(0, height=90, width=120)).save(tmp_path / "photos/a.jpg")
    turned = Image.fromarray(photo(1, height=120, width=90))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "photos/b.jpg", exif=exif)
    (tmp_path / "photos/c.jpg").write_bytes(b"no image")
    return tmp_path


def predicted(root: Path, recipe: Recipe, **given):
    shard = make_work(list_images(str(root / "photos")), rows_per_shard=10)
    block, _ = preprocess_shard(
        shard, Preprocessing(recipe=recipe, backend="opencv"), reader=Reader()
    )
    what = Predicting(
        checkpoint=toy(root),
        recipe=recipe,
        batch_size=4,
        trusted=("tests.models.toy:Toy",),
        **given,
    )
    sink = Sink(format="parquet", root=Location.of(str(root / "out")))
    return predict_block(block, Predictor(what, torch.device("cpu")), sink, reader=Reader())


@pytest.mark.parametrize(
    ("ops", "box"),
    [
        ((Resize(height=30, width=60),), [0, 0, 120, 90]),
        ((CenterCrop(height=40, width=60),), [30, 25, 90, 65]),
        (
            (ShortSide(short=45, long=100), Flip(), CenterCrop(height=45, width=45)),
            [14, 0, 104, 90],
        ),
        ((PadTo(height=100, width=200), Resize(height=50, width=100)), [0, 0, 120, 90]),
    ],
)
def test_boxes_are_on_the_original_images_as_they_are_shown(folder, ops, box):
    recipe = Recipe(name="r", ops=ops, finish=Finish(scale=1 / 255))
    entry = predicted(folder, recipe)
    assert [(w.image_id, w.file, w.height, w.width) for w in entry.written] == [
        ("a.jpg", "predictions/part-000000.parquet", 90, 120),
        ("b.jpg", "predictions/part-000000.parquet", 90, 120),
    ]
    assert [(r.image_id, r.reason) for r in entry.rejected] == [("c.jpg", "not an image")]
    table = pq.read_table(folder / "out/predictions/part-000000.parquet")
    assert table.schema.equals(PREDICTIONS)
    rows = table.to_pylist()
    for row in rows:
        assert (row["height"], row["width"], row["labels"]) == (90, 120, [7])
        np.testing.assert_allclose(row["boxes"], [box], atol=1e-3)
    assert entry.files == ["predictions/part-000000.parquet"] and entry.bytes > 0


def test_weak_boxes_are_left_out_and_strong_ones_drawn_on_the_original(folder):
    recipe = Recipe(name="r", ops=(Resize(height=32, width=32),), finish=Finish(scale=1 / 255))
    entry = predicted(folder, recipe)
    scores = [
        row["scores"][0] for row in pq.read_table(folder / "out" / entry.files[0]).to_pylist()
    ]
    low, high = sorted(scores)
    assert low < high
    entry = predicted(
        folder, recipe, min_score=(low + high) / 2, draw_score=0.0, names={7: "thing"}
    )
    rows = pq.read_table(folder / "out" / entry.files[0]).to_pylist()
    assert sorted(len(row["boxes"]) for row in rows) == [0, 1]
    assert entry.files[1:] == ["drawn/a.jpg", "drawn/b.jpg"]
    for name, original in (
        ("a", photo(0, height=90, width=120)),
        ("b", np.rot90(photo(1, height=120, width=90), -1)),
    ):
        drawn = cv2.cvtColor(cv2.imread(str(folder / f"out/drawn/{name}.jpg")), cv2.COLOR_BGR2RGB)
        changed = np.abs(drawn.astype(int) - original).max(axis=2)
        row = next(row for row in rows if row["image_id"] == f"{name}.jpg")
        assert (np.median(changed[:, 0]) > 40) == bool(row["boxes"])  # its left edge
        assert np.median(changed[40:80, 20:100]) < 12


def test_an_image_that_is_gone_when_it_is_drawn_on_is_unread_and_the_others_are_done(folder):
    recipe = Recipe(name="r", ops=(Resize(height=32, width=32),))
    shard = make_work(list_images(str(folder / "photos")), rows_per_shard=10)
    block, _ = preprocess_shard(
        shard, Preprocessing(recipe=recipe, backend="opencv"), reader=Reader()
    )
    (folder / "photos/b.jpg").unlink()
    what = Predicting(
        checkpoint=toy(folder),
        recipe=recipe,
        batch_size=4,
        draw_score=0.5,
        trusted=("tests.models.toy:Toy",),
    )
    sink = Sink(format="parquet", root=Location.of(str(folder / "out")))
    entry = predict_block(
        block, Predictor(what, torch.device("cpu")), sink, reader=Reader(patience_s=0)
    )
    assert [row.image_id for row in entry.written] == ["a.jpg"]
    assert [row.image_id for row in entry.rejected] == ["c.jpg"]
    (unread,) = entry.unread
    assert unread.image_id == "b.jpg"
    assert unread.detail.startswith("not readable again, to be drawn on: ")
    assert entry.files == ["predictions/part-000000.parquet", "drawn/a.jpg"]
    found = pq.read_table(folder / "out" / entry.files[0]).column("image_id").to_pylist()
    assert found == ["a.jpg"]


def test_a_jpeg_too_large_for_the_actors_memory_is_drawn_on_at_a_reduced_scale(folder):
    recipe = Recipe(name="r", ops=(Resize(height=32, width=32),), finish=Finish(scale=1 / 255))
    whole, half = 9 * 90 * 120, 9 * 45 * 60
    sizes = {}
    for memory in (10**9, whole - 1, half - 1):
        size = len((folder / "photos/a.jpg").read_bytes())
        entry = predicted(folder, recipe, draw_score=0.0, memory=memory + size)
        assert entry.files[1] == "drawn/a.jpg"
        drawn = cv2.imread(str(folder / "out/drawn/a.jpg"))
        sizes[memory] = drawn.shape[:2]
        left = np.abs(drawn[:, 0].astype(int) - drawn[:, 5]).max()  # a box around all of it
        assert left > 40
    assert list(sizes.values()) == [(90, 120), (45, 60), (23, 30)]


def test_a_shard_of_nothing_but_rejects_has_an_entry_and_no_file(folder):
    for name in ("a", "b"):
        (folder / f"photos/{name}.jpg").write_bytes(b"")
    entry = predicted(folder, Recipe(name="r", ops=(Resize(height=32, width=32),)))
    assert (entry.files, entry.written, len(entry.rejected)) == ([], [], 3)
    assert not (folder / "out").exists()


def test_weights_of_another_model_are_refused(tmp_path):
    folder = toy(tmp_path, model={"name": "ssd_tiny", "arguments": {}})
    with pytest.raises(UsageError, match="do not fit the model 'ssd_tiny'"):
        load(folder, torch.device("cpu"))
