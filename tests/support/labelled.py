"""Labelled photos, small enough to train on in a test, and settings to do so."""

import json
from collections import Counter
from pathlib import Path

import cv2

from raypipe.train.plan import plan
from raypipe.train.settings import Settings
from tests.conftest import photo
from tests.support.runs import texts

RECIPE = {
    "name": "small",
    "ops": [{"op": "HorizontalFlip"}, {"op": "Resize", "height": 64, "width": 64}],
    "finish": {"scale": 1 / 255, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
}


def make_labelled(root: Path) -> Path:
    """45 photos with one or two squares of category 3 or 90, a COCO JSON and a recipe.

    Photo 7 is corrupt, and each ninth photo has one more box, without an area.
    """
    (root / "photos").mkdir()
    images, annotations = [], []
    for number in range(45):
        image = photo(number, height=90, width=120)
        images.append(
            {"id": number + 1, "file_name": f"{number:03d}.jpg", "height": 90, "width": 120}
        )
        for which in range(1 + number % 2):
            x, y, side = 5 + 55 * which, 10 + number % 30, 30 + number % 10
            category = 3 if (number + which) % 3 else 90
            image[y : y + side, x : x + side] = (250, 20, 20) if category == 3 else (20, 20, 250)
            box = {
                "bbox": [x, y, side, side],
                "category_id": category,
                "area": side * side,
                "iscrowd": 0,
            }
            annotations.append({"id": len(annotations) + 1, "image_id": number + 1, **box})
        if number % 9 == 0:
            annotations.append(
                {
                    "id": 1000 + number,
                    "image_id": number + 1,
                    "bbox": [5, 5, 0, 9],
                    "category_id": 3,
                }
            )
        data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
        (root / "photos" / f"{number:03d}.jpg").write_bytes(data[:300] if number == 7 else data)
    categories = [{"id": 3, "name": "red"}, {"id": 90, "name": "blue"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "boxes.json").write_text(json.dumps(content))
    (root / "small.json").write_text(json.dumps(RECIPE))
    return root


def settings(root: Path, **given) -> Settings:
    defaults = {
        "input": root / "photos",
        "annotations": root / "boxes.json",
        "recipe": root / "small.json",
        "storage": root / "storage",
        "row_log": root / "log",
        "epochs": 2,
        "batch_size": 8,
        "actors": 1,
        "shard_rows": 5,
        "cpu": True,
        "max_reject_fraction": 0.05,
    }
    return Settings.of(**texts(defaults | given))


def lineage(root: Path) -> list[str]:
    """The rows that the final weights were trained on, as epoch/image, from the row log.

    Of each attempt it has the steps before the first one of the next attempt.
    """
    attempts: dict[str, dict[int, list[str]]] = {}
    for path in sorted((root / "log").iterdir(), key=lambda path: path.stat().st_ctime_ns):
        steps = attempts.setdefault(path.stem.rpartition("-")[0], {})
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], []).extend(
                f"{record['epoch']}/{i}" for i in record["image_ids"]
            )
    rows: list[str] = []
    begun = [steps for steps in attempts.values() if steps]  # others ended before their first step
    firsts = [min(steps) for steps in begun]
    for steps, first_of_next in zip(begun, [*firsts[1:], 10**9], strict=True):
        rows += [row for step, those in steps.items() if step < first_of_next for row in those]
    return rows


def every_row(given: Settings) -> Counter[str]:
    """Each row of each epoch once, as epoch/image."""
    epochs = plan(given).epochs
    ids = epochs.source["image_id"].to_pylist()
    return Counter(f"{epoch}/{image_id}" for epoch in range(epochs.epochs) for image_id in ids)
