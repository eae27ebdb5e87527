"""How good detections are: COCO's mean average precision."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """What is in an image.

    boxes: (n, 4) float, x1 y1 x2 y2.
    labels: (n,).
    crowds: (n,) bool; empty if there are none.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowds: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a model finds in an image: boxes (m, 4) float, labels (m,), scores (m,) float."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """COCO's average precision, from 0 to 1, with at most 100 detections per image.

    map: mean over IoU thresholds .50 to .95.
    map50, map75: at one threshold.
    by_label: mean over thresholds for each label.

    All areas count together: boxes are in pixels of the image as the recipe left it, so COCO's
    limits for small and large do not apply.
    """

    map: float
    map50: float
    map75: float
    by_label: dict[int, float]


def mean_average_precision(truths: Sequence[Truth], found: Sequence[Found]) -> Precision | None:
    """Compute the precision of `found`, for the same images in the same order as `truths`.

    Labels that are in no truth do not count, as in COCO: there is nothing to find.

    Returns:
        None if no image has a box.
    """
    labels = sorted(
        {
            int(label)
            for truth in truths
            for label, crowd in zip(truth.labels, _crowds(truth), strict=True)
            if not crowd
        }
    )
    if not labels:
        return None
    detections = _detections(found, labels)
    if not len(detections):
        return Precision(map=0.0, map50=0.0, map75=0.0, by_label=dict.fromkeys(labels, 0.0))
    coco = COCO(_dataset(truths, labels), print_function=_silent)
    evaluation = COCOeval_faster(
        coco, coco.loadRes(detections), iouType="bbox", print_function=_silent
    )
    evaluation.evaluate()
    evaluation.accumulate()
    # IoU thresholds x recalls x labels, of all areas and of 100 detections. -1: nothing to find.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return Precision(
        map=_mean(precision),
        map50=_mean(precision[0]),
        map75=_mean(precision[5]),
        by_label={label: _mean(precision[:, :, index]) for index, label in enumerate(labels)},
    )


def _silent(*_: object) -> None:
    pass


def _mean(precision: np.ndarray) -> float:
    return float(precision[precision > -1].mean())


def _crowds(truth: Truth) -> np.ndarray:
    return truth.crowds if len(truth.crowds) else np.zeros(len(truth.labels), bool)


def _dataset(truths: Sequence[Truth], labels: list[int]) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for image, truth in enumerate(truths):
        for (x1, y1, x2, y2), label, crowd in zip(
            truth.boxes.tolist(), truth.labels.tolist(), _crowds(truth).tolist(), strict=True
        ):
            if label in labels:
                annotations.append(
                    {
                        "id": len(annotations) + 1,  # 0 would count as "not matched"
                        "image_id": image,
                        "category_id": label,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": int(crowd),
                    }
                )
    return {
        "images": [{"id": image} for image in range(len(truths))],
        "annotations": annotations,
        "categories": [{"id": label, "name": str(label)} for label in labels],
    }


def _detections(found: Sequence[Found], labels: list[int]) -> np.ndarray:
    """(k, 7) float64: image, x, y, width, height, score, label."""
    rows = []
    for image, one in enumerate(found):
        kept = np.isin(one.labels, labels)
        boxes = np.asarray(one.boxes, np.float64).reshape(-1, 4)[kept]
        columns = (
            boxes[:, :2],
            boxes[:, 2:] - boxes[:, :2],
            one.scores[kept, None],
            one.labels[kept, None],
        )
        rows.append(np.concatenate([np.full((len(boxes), 1), image), *columns], axis=1))
    return np.concatenate(rows) if rows else np.empty((0, 7))
