"""What predictions are judged by, and what a training can learn from: without Ray."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raypipe import UsageError
from raypipe.data.batches import rows_of, trainable
from raypipe.data.listing import list_images
from raypipe.data.reader import Reader
from raypipe.data.tables import PREDICTIONS
from raypipe.run.predictions import precision_of, truths_of
from raypipe.stages.preprocess import preprocess_shard
from raypipe.train.plan import plan
from raypipe.train.position import Position
from raypipe.train.settings import Settings
from tests.conftest import jpeg


def coco(folder: Path, images: list[dict], annotations: list[dict]) -> str:
    whole = [{"id": k, "iscrowd": 0, "category_id": 1, **one} for k, one in enumerate(annotations)]
    (folder / "a.json").write_text(
        json.dumps({"images": images, "annotations": whole, "categories": [{"id": 1, "name": "a"}]})
    )
    return str(folder / "a.json")


def test_predictions_are_judged_in_the_pictures_frame_without_boxes_that_are_none(tmp_path):
    images = [
        {"id": 0, "file_name": "turned.jpg", "height": 200, "width": 100},
        {"id": 1, "file_name": "doubled.jpg", "height": 50, "width": 100},
        {"id": 2, "file_name": "other.jpg", "height": 70, "width": 70},
    ]
    boxes = [[20, 90, 40, 80], [15, 10, 40, 20], [0, 0, 1e999, 5], [1, 1, 9, 9]]
    owners = [0, 1, 1, 2]
    annotations = [{"image_id": of, "bbox": box} for of, box in zip(owners, boxes, strict=True)]
    source = list_images(str(tmp_path), annotations=coco(tmp_path, images, annotations))
    rows = [
        {
            "image_id": str(n),
            "uri": str(n),
            "height": 100,
            "width": 200,
            "boxes": [[30, 20, 110, 60]],
            "labels": [1],
            "scores": [0.9],
        }
        for n in range(3)
    ]
    tables = [
        pa.Table.from_pylist(
            [row | {"orientation": 6 if n == 0 else 1} for n, row in enumerate(rows)],
            schema=PREDICTIONS,
        )
    ]
    truths = truths_of(source, tables)
    assert (
        truths.by_image is not None and set(truths.by_image) == {"0", "1"} and truths.strangers == 1
    )
    for truth in truths.by_image.values():
        np.testing.assert_allclose(truth.boxes, [[30, 20, 110, 60]], atol=1e-3)
    assert [(one.image_id, one.annotation_id, one.reason) for one in truths.dropped] == [
        ("1", 2, "not finite")
    ]
    assert truths.boxes_from == {"stored": 1, "scaled": 1}
    precision = precision_of(truths, tables)
    assert precision is not None and precision.map == pytest.approx(1.0)


@pytest.mark.parametrize("recipe", ["retinanet-train", "ssd-300-train", "ssd-300-train-no-crowds"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iscrowd": 1}, "6 boxes .* 6 are crowds"),
        ({"iscrowd": "1"}, "6 are crowds"),
        ({"bbox": [5, 5, 0, 9]}, "6 have no area"),
        ({"bbox": [None, 5, 3, 9]}, "6 have no area or are no numbers"),
        ({"iscrowd": "0"}, None),
        ({"iscrowd": False}, None),
    ],
)
def test_a_training_that_would_see_no_box_is_refused_before_it_starts(
    tmp_path, recipe, change, message
):
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(6)]
    annotations = [{"image_id": n, "bbox": [1, 1, 9, 9], **change} for n in range(6)]
    given = Settings.of(
        input=str(tmp_path),
        annotations=coco(tmp_path, images, annotations),
        storage=str(tmp_path / "s"),
        recipe=recipe,
        holdout=0.0,
    )
    if message is None:
        assert plan(given).epochs.rows
        return
    with pytest.raises(UsageError, match=message):
        plan(given)


@pytest.mark.parametrize(
    ("recipe", "learned"),
    [
        ("ssd-300-train", [1, 2]),  # as MLPerf's training does
        ("ssd-300-train-no-crowds", [1]),
        ("mask-rcnn-train", [1]),
        ("retinanet-train", [1]),
        ("torchvision-ssdlite", [1]),
    ],
)
def test_a_training_learns_from_crowds_if_the_recipe_keeps_them(tmp_path, recipe, learned):
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    given = Settings.of(
        input=str(tmp_path),
        annotations=coco(
            tmp_path,
            [{"id": 0, "file_name": "0.jpg"}],
            [
                {"image_id": 0, "bbox": [9, 9, 90, 90]},
                {"image_id": 0, "bbox": [8, 8, 95, 95], "iscrowd": 1, "category_id": 2},
            ],
        ),
        storage=str(tmp_path / "s"),
        recipe=recipe,
        model="ssd_tiny" if recipe.startswith("ssd") else "fasterrcnn_resnet50_fpn_v2",
        holdout=0.0,
        epochs=8,  # a crop may lose a box
    )
    todo = plan(given)
    assert list(todo.training.classes.ids) == learned
    work = todo.epochs.next(Position(), ranks=1).work
    block, _ = preprocess_shard(work, todo.pixels, reader=Reader())
    labels = {int(label) for row in rows_of(block) for label in trainable(row)[1]}
    assert sorted(labels) == learned
