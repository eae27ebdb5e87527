"""Random ops: what they draw, and how often."""

from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from raypipe.images import BACKENDS, backend, opencv, torchvision
from raypipe.images.catalog import get
from raypipe.images.decode import read_header
from raypipe.images.ops import random_geometry
from raypipe.images.ops.augment import ColorJitter, Erasing, HorizontalFlip, PhotometricDistort
from raypipe.images.ops.boxes import NO_BOXES, iou
from raypipe.images.ops.random_geometry import IoUCrop, RandomResizedCrop
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
    monkeypatch.setattr(random_geometry, "_MODES", (None, 0.3))
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
    monkeypatch.setattr(random_geometry, "_MODES", (0.9,))
    assert plan(IoUCrop(flavour=flavour), boxes=np.array([[0, 0, 2, 2]], np.float32)).ops == ()


def test_erasing_stays_inside_and_within_its_area():
    for index in range(100):
        for op in plan(Erasing(p=1), image_id=str(index)).ops:
            assert op.top + op.height <= 480 and op.left + op.width <= 640
            assert 0.018 < op.height * op.width / (480 * 640) < 0.34


@pytest.mark.parametrize("size", [(480, 640), (1, 900), (700, 3), (224, 224)])
def test_random_resized_crop_draws_as_torchvision_does(size):
    """The same means of area and ratio over many draws, and the same part where none fits."""
    op = RandomResizedCrop()
    image = torch.zeros(3, *size, dtype=torch.uint8)
    reference = v2.RandomResizedCrop(224, antialias=True)
    torch.manual_seed(0)
    drawn = [reference.make_params([image]) for _ in range(400)]
    theirs = np.array([[one[side] for side in ("top", "left", "height", "width")] for one in drawn])
    parts = [plan(op, image_id=str(at), boxes=None, size=size).ops[0] for at in range(400)]
    ours = np.array([[part.top, part.left, part.height, part.width] for part in parts])
    if 3 in size or 1 in size:  # the middle
        assert (ours == theirs).all()
    scale = np.array([*size, *size])
    np.testing.assert_allclose(
        (ours / scale).mean(axis=0), (theirs / scale).mean(axis=0), atol=0.06
    )
    assert (ours[:, :2] + ours[:, 2:] <= size).all() and (ours[:, 2:] > 0).all()


@pytest.mark.parametrize("name", ["imagenet-224-train", "imagenet-224-val"])
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_imagenet_recipes_are_torchvisions(name, backend_name):
    """Pixels of v2's own functions, for the same parts: equal in torchvision, nearly in OpenCV."""
    recipe, module = get(name), backend(backend_name)
    pixels = (
        np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8).repeat(12, 0).repeat(9, 1)
    )
    data = opencv.encode(pixels, "png", 0)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    seen = set()
    for index in range(6):
        got = recipe.plan(seed=0, epoch=0, image_id=str(index), size=pixels.shape[:2])
        out = np.empty((224, 224, 3), np.uint8)
        module.execute(module.decode(data, read_header(data)), got.ops, out)
        if name.endswith("val"):
            want = v2.functional.center_crop(
                v2.functional.resize(image, 256, antialias=True), [224, 224]
            )
        else:
            part = got.ops[0]
            box = (part.top, part.left, part.height, part.width)
            want = v2.functional.resized_crop(image, *box, [224, 224], antialias=True)
            if flipped := len(got.ops) == 3:
                want = v2.functional.horizontal_flip(want)
            seen.add(flipped)
        delta = np.abs(out.astype(int) - want.permute(1, 2, 0).numpy())
        assert delta.max() <= (0 if module is not opencv else 1), index
    assert name.endswith("val") or seen == {True, False}
    finish = recipe.finish
    normal = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    of_torch = normal(v2.functional.to_dtype(want, torch.float32, scale=True))
    ours = torchvision.finish(want.permute(1, 2, 0)[None], finish)[0]
    torch.testing.assert_close(ours, of_torch, atol=1e-5, rtol=1e-5)
