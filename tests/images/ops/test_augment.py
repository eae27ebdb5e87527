"""Random ops: what they draw, and how often."""

from collections import Counter

import numpy as np
import pytest

from raypipe.images.ops import augment
from raypipe.images.ops.augment import (
    ColorJitter,
    Erasing,
    HorizontalFlip,
    IoUCrop,
    PhotometricDistort,
)
from raypipe.images.ops.boxes import NO_BOXES, iou
from tests.images.planning import BOXES, SIZE, plan


def test_flip_probability():
    flips = sum(
        len(plan(HorizontalFlip(p=0.3), image_id=str(index), boxes=None).ops)
        for index in range(1000)
    )
    assert 240 < flips < 360


def test_color_jitter_draws_within_ranges_in_all_orders():
    orders = Counter()
    for index in range(300):
        ops = plan(
            ColorJitter(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05),
            image_id=str(index),
        ).ops
        orders[tuple(type(op).__name__ for op in ops)] += 1
        values = {
            type(op).__name__: getattr(op, "factor", getattr(op, "shift", None)) for op in ops
        }
        assert 0.875 <= values["Brightness"] <= 1.125
        assert (
            min(values["Contrast"], values["Saturation"]) >= 0.5
            and max(values["Contrast"], values["Saturation"]) <= 1.5
        )
        assert -0.05 <= values["Hue"] <= 0.05
    assert len(orders) == 24


def test_photometric_distort_does_each_part_half_of_the_time():
    counts = Counter(
        type(op).__name__
        for index in range(600)
        for op in plan(PhotometricDistort(), image_id=str(index), boxes=None).ops
    )
    assert set(counts) == {"Brightness", "Contrast", "Saturation", "Hue", "Permute"}
    assert all(240 < count < 360 for count in counts.values())


@pytest.mark.parametrize("flavour", ["mlperf", "torchvision"])
def test_iou_crop_keeps_its_promises(flavour):
    kept = Counter()
    for index in range(300):
        got = plan(IoUCrop(flavour=flavour), image_id=str(index))
        kept[len(got.ops)] += 1
        if not got.ops:
            assert len(got.boxes) == 3
            continue
        (crop,) = got.ops
        height, width = got.size
        assert 0.3 * 480 - 1 <= height <= 480 and 0.3 * 640 - 1 <= width <= 640
        ratio = width / height if flavour == "torchvision" else width / 640 / (height / 480)
        assert 0.48 <= ratio <= 2.1
        assert len(got.boxes) >= 1
        centres = (BOXES[:, :2] + BOXES[:, 2:]) / 2 - (crop.left, crop.top)
        inside = ((centres > 0) & (centres < (width, height))).all(axis=1)
        assert got.keep.tolist() == np.flatnonzero(inside).tolist()
        assert (got.boxes >= 0).all() and (got.boxes <= [width, height, width, height]).all()
    assert kept[0] and kept[1]


@pytest.mark.parametrize("flavour", ["mlperf", "torchvision"])
@pytest.mark.parametrize(
    "boxes",
    [
        NO_BOXES,
        np.array([[0, 0, 1, 1]], np.float32),
        np.array([[5, 5, 5, 5]], np.float32),
        np.array([[0, 0, 640, 480]], np.float32),
    ],
)
@pytest.mark.parametrize("size", [SIZE, (1, 1), (1, 5000)])
def test_iou_crop_ends_whatever_the_boxes(flavour, boxes, size):
    boxes = np.minimum(boxes, np.array([size[1], size[0], size[1], size[0]], np.float32))
    for index in range(20):
        plan(IoUCrop(flavour=flavour), image_id=str(index), boxes=boxes, size=size)


@pytest.mark.parametrize("flavour", ["mlperf", "torchvision"])
def test_iou_crop_tests_the_boxes_its_flavour_says(flavour, monkeypatch):
    monkeypatch.setattr(augment, "_MODES", (None, 0.3))
    boxes = np.array([[100, 80, 500, 400], [150, 100, 420, 380]], np.float32)
    crops = [
        op
        for index in range(300)
        for op in plan(IoUCrop(flavour=flavour), image_id=str(index), boxes=boxes).ops
    ]
    assert len(crops) > 20
    least = []
    for crop in crops:
        overlaps = iou(boxes, (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
        assert overlaps.max() >= 0.3
        least.append(overlaps.min())
    if flavour == "mlperf":
        assert min(least) > 0.3
    else:
        assert min(least) < 0.3


@pytest.mark.parametrize("flavour", ["mlperf", "torchvision"])
def test_iou_crop_gives_up_when_no_mode_can_be_met(flavour, monkeypatch):
    monkeypatch.setattr(augment, "_MODES", (0.9,))
    assert plan(IoUCrop(flavour=flavour), boxes=np.array([[0, 0, 2, 2]], np.float32)).ops == ()


def test_erasing_stays_inside_and_within_its_area():
    for index in range(100):
        for op in plan(Erasing(p=1), image_id=str(index)).ops:
            assert op.top + op.height <= 480 and op.left + op.width <= 640
            assert 0.018 < op.height * op.width / (480 * 640) < 0.34
