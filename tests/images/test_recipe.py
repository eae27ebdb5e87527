import json
import math
import sys
import types
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from raypipe import UsageError
from raypipe.images import opencv, torchvision
from raypipe.images import recipe as recipe_module
from raypipe.images.catalog import RECIPES
from raypipe.images.decode import Reject
from raypipe.images.recipe import (
    NO_BOXES,
    OPS,
    PURPOSES,
    Affine,
    Brightness,
    CenterCrop,
    ColorJitter,
    Contrast,
    Crop,
    Equalize,
    Erasing,
    Finish,
    Flip,
    GaussianBlur,
    HorizontalFlip,
    IoUCrop,
    LargeScaleJitter,
    MultiScale,
    Noise,
    Pad,
    PadTo,
    PhotometricDistort,
    RandomAffine,
    RandomCrop,
    Recipe,
    Resize,
    SanitizeBoxes,
    ShortSide,
    VerticalFlip,
    ZoomOut,
    affine_matrix,
    boxes_back,
    from_json,
    iou,
    move_boxes,
    output_size,
    sample,
    to_json,
)


@dataclass(frozen=True, kw_only=True)
class Moves:
    purpose: ClassVar[str] = "neutral"


SIZE = (480, 640)
BOXES = np.array([[10, 20, 110, 220], [300, 200, 639, 479], [600, 400, 640, 480]], np.float32)


def recipe(*ops, **settings) -> Recipe:
    return Recipe(name="test", ops=ops, **settings)


def plan(*ops, seed=0, epoch=0, image_id="a", size=SIZE, boxes=BOXES):
    return recipe(*ops).plan(seed=seed, epoch=epoch, image_id=image_id, size=size, boxes=boxes)


# -------------------------------------------------------------------------------------------------------------- plain geometry


@pytest.mark.parametrize(
    ("op", "size", "moved", "keep"),
    [
        (Resize(height=240, width=1280), (240, 1280), [[20, 10, 220, 110], [600, 100, 1278, 239.5], [1200, 200, 1280, 240]], [0, 1, 2]),
        (Flip(), SIZE, [[530, 20, 630, 220], [1, 200, 340, 479], [0, 400, 40, 480]], [0, 1, 2]),
        (Flip(axis="vertical"), SIZE, [[10, 260, 110, 460], [300, 1, 639, 280], [600, 0, 640, 80]], [0, 1, 2]),
        (Pad(top=5, left=7, bottom=1, right=2), (486, 649), [[17, 25, 117, 225], [307, 205, 646, 484], [607, 405, 647, 485]], [0, 1, 2]),
        (Crop(top=100, left=100, height=200, width=300), (200, 300), [[0, 0, 10, 120], [200, 100, 300, 200]], [0, 1]),
        (Crop(top=100, left=100, height=250, width=400, keep="centre"), (250, 400), [[200, 100, 400, 250]], [1]),
        (Crop(top=0, left=0, height=400, width=600), (400, 600), [[10, 20, 110, 220], [300, 200, 600, 400]], [0, 1]),
        (Affine(matrix=(1, 0, 30, 0, 1, -20)), SIZE, [[40, 0, 140, 200], [330, 180, 640, 459], [630, 380, 640, 460]], [0, 1, 2]),
        (Affine(matrix=(0, -1, 480, 1, 0, 0)), SIZE, [[260, 10, 460, 110], [1, 300, 280, 480]], [0, 1]),
        (SanitizeBoxes(min_size=79), SIZE, [[10, 20, 110, 220], [300, 200, 639, 479]], [0, 1]),
        (Brightness(factor=2), SIZE, BOXES, [0, 1, 2]),
    ],
)  # fmt: skip
def test_boxes_and_sizes_by_hand(op, size, moved, keep):
    assert output_size(op, SIZE) == size
    boxes, kept = move_boxes(op, BOXES, SIZE)
    np.testing.assert_allclose(boxes, moved, atol=1e-4)
    assert boxes.dtype == np.float32
    assert kept.tolist() == keep


def test_keep_counts_from_the_given_boxes_over_several_ops():
    got = plan(
        Crop(top=150, left=200, height=330, width=440),
        Flip(),
        Crop(top=0, left=0, height=330, width=100),
        SanitizeBoxes(min_size=50),
    )
    assert got.keep.tolist() == [0 + 1]
    np.testing.assert_allclose(got.boxes, [[1, 50, 100, 329]])
    assert (got.size, got.keep.dtype) == ((330, 100), np.int64)


@pytest.mark.parametrize("name", ["resize", "flip", "vertical", "pad", "crop", "affine"])
def test_boxes_and_sizes_are_torchvisions(name):
    boxes = tv_tensors.BoundingBoxes(torch.from_numpy(BOXES), format="XYXY", canvas_size=SIZE)
    angle, shear = 20.0, 7.0
    matrix = affine_matrix(
        SIZE, angle=math.radians(angle), shear=math.radians(shear), scale=1.2, shift=(15, -9)
    )
    op, expected = {
        "resize": (Resize(height=333, width=111), lambda: functional.resize(boxes, [333, 111])),
        "flip": (Flip(), lambda: functional.horizontal_flip(boxes)),
        "vertical": (Flip(axis="vertical"), lambda: functional.vertical_flip(boxes)),
        "pad": (Pad(top=1, left=2, bottom=3, right=4), lambda: functional.pad(boxes, [2, 1, 4, 3])),
        "crop": (
            Crop(top=50, left=30, height=420, width=600),
            lambda: functional.crop(boxes, 50, 30, 420, 600),
        ),
        "affine": (
            Affine(matrix=matrix),
            lambda: functional.affine(boxes, angle, [15, -9], 1.2, [shear, 0.0]),
        ),
    }[name]
    theirs = expected()
    ours, keep = move_boxes(op, BOXES, SIZE)
    assert tuple(theirs.canvas_size) == output_size(op, SIZE)
    np.testing.assert_allclose(ours, theirs.numpy()[keep], atol=0.01)
    sides = theirs.numpy()[:, 2:] - theirs.numpy()[:, :2]
    assert keep.tolist() == np.flatnonzero((sides > 0).all(axis=1)).tolist()


GEOMETRY = [
    HorizontalFlip(p=1),
    VerticalFlip(p=1),
    ZoomOut(p=1, fill=(0, 0, 0)),
    IoUCrop(),
    IoUCrop(flavour="mlperf"),
    RandomCrop(height=300, width=280),
    CenterCrop(height=301, width=400),
    ShortSide(short=300, long=350),
    MultiScale(sizes=(200, 333), long=900),
    LargeScaleJitter(height=300, width=300, scale=(0.7, 1.5), fill=(0, 0, 0)),
    PadTo(height=500, width=700),
    RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.8, 1.1), shear=5),
    Resize(height=123, width=456),
]


@pytest.mark.parametrize("backend", [opencv, torchvision])
@pytest.mark.parametrize("op", GEOMETRY, ids=lambda op: type(op).__name__)
def test_boxes_stay_on_what_they_show(op, backend):
    """Paints a rectangle, and looks for it where its box has gone."""
    image = np.zeros((400, 500, 3), np.uint8)
    image[150:260, 180:330] = 255
    box = np.array([[180, 150, 330, 260]], np.float32)
    for epoch in range(6):
        got = plan(op, epoch=epoch, size=(400, 500), boxes=box)
        out = np.empty((*got.size, 3), np.uint8)
        source = image if backend is opencv else torch.from_numpy(image).permute(2, 0, 1)
        backend.execute(source, got.ops, out)
        white = np.argwhere(out[..., 0] > 127)
        if not len(got.boxes):
            continue  # cut off: by the rule of its crop the box went with its centre
        found = [white[:, 1].min(), white[:, 0].min(), white[:, 1].max() + 1, white[:, 0].max() + 1]
        np.testing.assert_allclose(got.boxes[0], found, atol=1.6)


PLAIN_GEOMETRY = [
    Resize(height=240, width=1280),
    Crop(top=7, left=30, height=400, width=500),
    Flip(),
    Flip(axis="vertical"),
    Pad(top=5, left=7, bottom=1, right=2),
    Affine(matrix=(0.8, 0, 30, 0, 0.7, 20)),
    Affine(matrix=(0, -1, 480, 1, 0, 0)),  # a quarter turn
    CenterCrop(height=301, width=400),
    ShortSide(short=300, long=350),
    PadTo(height=500, width=700),
]
INSIDE = np.array([[130, 100, 160, 220], [300, 200, 420, 311]], np.float32)


@pytest.mark.parametrize("op", PLAIN_GEOMETRY, ids=str)
@pytest.mark.parametrize(
    "then",
    [(), (ShortSide(short=200, long=260), Flip(), PadTo(height=300, width=300))],
    ids=["alone", "then"],
)
def test_boxes_go_back_to_where_they_came_from(op, then):
    there = plan(op, *then, boxes=INSIDE)
    assert there.keep.tolist() == [0, 1]
    assert np.allclose(there.boxes, INSIDE, atol=1) == (isinstance(op, PadTo) and not then)
    back, kept = boxes_back(recipe(op, *then), there.boxes, SIZE)
    np.testing.assert_allclose(back, INSIDE, atol=1e-3)
    assert (back.dtype, kept.tolist()) == (np.float32, [0, 1])


def test_going_back_a_turned_box_is_the_upright_one_around_it():
    turned = Affine(
        matrix=affine_matrix(SIZE, angle=math.radians(30), shear=0.1, scale=0.5, shift=(3, 4))
    )
    a, b, c, d, e, f = turned.matrix
    corners = np.array([[200, 100], [260, 100], [260, 180], [200, 180]]) @ np.array(
        [[a, d], [b, e]]
    ) + [c, f]
    for (x, y), corner in zip(
        [(200, 100), (260, 100), (260, 180), (200, 180)], corners, strict=True
    ):
        (x1, y1, x2, y2), *_ = boxes_back(
            recipe(turned), np.array([[*corner - 1e-2, *corner + 1e-2]], np.float32), SIZE
        )[0]
        assert ((x1 + x2) / 2, (y1 + y2) / 2) == pytest.approx((x, y), abs=0.01)
    around = np.array([[*corners.min(0), *corners.max(0)]], np.float32)
    (x1, y1, x2, y2), *_ = boxes_back(recipe(turned), around, SIZE)[0]
    assert x1 < 200 and y1 < 100 and x2 > 260 and y2 > 180


def test_boxes_in_the_padding_are_in_no_image_and_those_half_in_it_are_clipped():
    found = np.array([[0, 0, 640, 480], [600, 470, 700, 500], [650, 0, 700, 480]], np.float32)
    back, kept = boxes_back(recipe(PadTo(height=500, width=700)), found, SIZE)
    assert back.tolist() == [[0, 0, 640, 480], [600, 470, 640, 480]]
    assert kept.tolist() == [0, 1]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_as_it_is_judged_can_be_undone(name):
    judged = recipe_module.for_evaluation(RECIPES[name])
    there = judged.plan(seed=0, epoch=0, image_id="x", size=SIZE, boxes=INSIDE)
    np.testing.assert_allclose(boxes_back(judged, there.boxes, SIZE)[0], INSIDE, atol=1e-3)


def test_an_own_op_that_moves_boxes_and_does_not_say_how_back_is_refused():
    @move_boxes.register(Moves)
    def _(op, boxes, size):
        return boxes + 1, np.arange(len(boxes))

    with pytest.raises(UsageError, match=r"Moves\(\) moves boxes, but not back.*recipe\.back"):
        boxes_back(recipe(Moves()), INSIDE, SIZE)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((427, 640), (800, 1199)),
        ((300, 1000), (400, 1333)),
        ((800, 800), (800, 800)),
    ],
)
def test_short_side_as_mask_rcnn(size, expected):
    assert plan(ShortSide(short=800, long=1333), size=size, boxes=None).size == expected


# ------------------------------------------------------------------------------------------------------------------- randomness


def flatten(got) -> tuple:
    return got.ops, got.size, got.boxes.tolist(), got.keep.tolist()


def test_a_plan_depends_on_seed_epoch_and_image_and_on_nothing_else():
    ssd = RECIPES["ssd-300-train"]
    given = {"seed": 3, "epoch": 1, "image_id": "x/y.jpg", "size": SIZE, "boxes": BOXES}
    first = ssd.plan(**given)
    np.random.seed(99)
    assert flatten(ssd.plan(**given)) == flatten(first)
    for change in ({"seed": 4}, {"epoch": 2}, {"image_id": "x/z.jpg"}):
        assert flatten(ssd.plan(**given | change)) != flatten(first)


def test_drawn_numbers_never_change():
    """A resumed run must continue what an older version began: these were written down once."""
    got = plan(
        HorizontalFlip(),
        ColorJitter(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05),
        image_id="000000000139",
    )
    assert [type(op).__name__ for op in got.ops] == [
        "Flip",
        "Contrast",
        "Hue",
        "Brightness",
        "Saturation",
    ]
    numbers = [getattr(op, "factor", getattr(op, "shift", None)) for op in got.ops[1:]]
    np.testing.assert_allclose(
        numbers, [0.99086464, -0.046234123, 1.097868757, 1.145965535], atol=1e-8
    )


def test_no_generator_without_chance():
    assert not recipe(Resize(height=3, width=3), ShortSide(short=3, long=4)).random
    assert recipe(Resize(height=3, width=3), HorizontalFlip()).random


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
    monkeypatch.setattr(recipe_module, "_MODES", (None, 0.3))
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
    monkeypatch.setattr(recipe_module, "_MODES", (0.9,))
    assert plan(IoUCrop(flavour=flavour), boxes=np.array([[0, 0, 2, 2]], np.float32)).ops == ()


def test_iou_by_hand():
    boxes = np.array([[0, 0, 10, 10], [5, 5, 15, 15], [20, 20, 30, 30], [3, 3, 3, 3]], np.float32)
    np.testing.assert_allclose(iou(boxes, (0, 0, 10, 10)), [1, 25 / 175, 0, 0])


def test_erasing_stays_inside_and_within_its_area():
    for index in range(100):
        for op in plan(Erasing(p=1), image_id=str(index)).ops:
            assert op.top + op.height <= 480 and op.left + op.width <= 640
            assert 0.018 < op.height * op.width / (480 * 640) < 0.34


RANDOM_SIZES = [(1, 1), (1, 700), (900, 2), (37, 53), SIZE, (1000, 400)]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_plans_every_size(name):
    """Boxes stay inside, sizes are positive, and are the fixed ones if it has some."""
    made = RECIPES[name]
    for size in RANDOM_SIZES:
        boxes = np.array([[0, 0, size[1], size[0]], [0, 0, size[1] / 2, size[0] / 2]], np.float32)
        for epoch in range(20):
            got = made.plan(seed=1, epoch=epoch, image_id="q", size=size, boxes=boxes)
            height, width = got.size
            assert height >= 1 and width >= 1
            assert made.fixed_size in (None, got.size)
            assert (got.boxes >= 0).all() and (
                got.boxes <= np.array([width, height, width, height]) + 0.01
            ).all()
            assert len(got.boxes) == len(got.keep)


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        ((Resize(height=30, width=40), HorizontalFlip(), ColorJitter(hue=0.1)), (30, 40)),
        ((Resize(height=30, width=40), Pad(top=2), ShortSide(short=64, long=99)), (64, 80)),
        ((Resize(height=30, width=40), PadTo(height=50, width=20)), (50, 40)),
        ((Resize(height=30, width=40), ZoomOut()), None),
        ((IoUCrop(), Resize(height=30, width=40), Noise()), (30, 40)),
        ((ShortSide(short=3, long=4),), None),
        ((), None),
    ],
)
def test_fixed_size(ops, expected):
    assert recipe(*ops).fixed_size == expected


# ------------------------------------------------------------------------------------------------------------------ bad boxes


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([1, 2, math.nan, 4], "not finite"),
        ([1, 2, math.inf, 4], "not finite"),
        ([10, 2, 5, 4], "corners swapped"),
        ([640, 2, 700, 4], "outside the image"),
        ([-9, 2, 0, 4], "outside the image"),
        ([1, 481, 5, 481], "no area"),
        ([5, 5, 5, 9], "no area"),
    ],
)
def test_a_bad_box_is_dropped_with_the_reason_and_its_image_stays(box, problem):
    got = plan(boxes=np.array([[1, 1, 2, 2], box, [3, 3, 4, 4]], np.float32))
    np.testing.assert_array_equal(got.boxes, [[1, 1, 2, 2], [3, 3, 4, 4]])
    assert got.keep.tolist() == [0, 2] and got.dropped == ((1, problem),)


def test_an_image_of_bad_boxes_only_is_rejected_where_the_recipe_needs_boxes():
    bad = np.array([[10, 2, 5, 4], [1, 2, math.nan, 4]], np.float32)
    assert len(plan(boxes=bad).boxes) == 0
    with pytest.raises(
        Reject, match="bad boxes: none of its 2 boxes can be used; the first: corners swapped"
    ):
        recipe(needs_boxes=True).plan(seed=0, epoch=0, image_id="a", size=(480, 640), boxes=bad)


def test_boxes_that_stick_out_are_clipped():
    given = np.array([[-1, -2, 641, 100]], np.float32)
    got = plan(boxes=given)
    np.testing.assert_array_equal(got.boxes, [[0, 0, 640, 100]])
    assert given[0, 0] == -1 and not got.dropped


def test_an_image_too_small_for_an_op_is_rejected():
    for op in (Crop(top=0, left=0, height=481, width=1), RandomCrop(height=1, width=641), CenterCrop(height=481, width=1),
               GaussianBlur(kernel=963, sigma=9.0)):  # fmt: skip
        with pytest.raises(Reject, match="too small"):
            plan(op)


def test_a_result_of_too_many_pixels_is_rejected_before_it_is_made():
    with pytest.raises(Reject, match="too many pixels"):
        plan(Pad(bottom=10_000, right=10_000), ZoomOut(scale=(4, 4), p=1))


@pytest.mark.parametrize(
    "op",
    [
        {"op": "Resize", "height": 30_000, "width": 30_000},
        {"op": "Crop", "top": 0, "left": 0, "height": 30_000, "width": 30_000},
        {"op": "CenterCrop", "height": 30_000, "width": 30_000},
        {"op": "RandomCrop", "height": 30_000, "width": 30_000},
        {"op": "LargeScaleJitter", "height": 30_000, "width": 30_000},
        {"op": "Pad", "bottom": 30_000, "right": 30_000},
        {"op": "PadTo", "height": 30_000, "width": 30_000},
        {"op": "ShortSide", "short": 30_000, "long": 40_000},
        {"op": "MultiScale", "sizes": [30_000, 40_000], "long": 50_000},
        {"op": "ZoomOut", "scale": [30_000, 40_000], "p": 1},
    ],
    ids=lambda op: op["op"],
)
def test_ops_whose_every_result_would_be_too_large_are_refused(op):
    with pytest.raises(
        UsageError,
        match=r"makes images of at least \d+x\d+; a result may have 178956970 pixels at most",
    ):
        from_json({"name": "large", "ops": [op]})


@pytest.mark.parametrize("size", [(480, 640), (37, 500), (3000, 200)])
@pytest.mark.parametrize("name", RECIPES)
def test_no_result_is_larger_than_the_recipe_says_beforehand(name, size):
    most = RECIPES[name].largest(size)
    for image in range(40):
        try:
            found = RECIPES[name].plan(
                seed=0, epoch=0, image_id=str(image), size=size, boxes=np.array([[1, 2, 30, 30]])
            )
        except Reject:
            continue
        assert found.size[0] * found.size[1] <= most[0] * most[1]


# ---------------------------------------------------------------------------------------------------------- reduced decoding


@pytest.mark.parametrize(
    ("size", "by"),
    [((3000, 4000), 8), ((2400, 2400), 8), ((2399, 2399), 8), ((2392, 2392), 4), ((480, 640), 1), ((600, 600), 2), ((599, 9000), 2), ((598, 9000), 1), ((100, 100), 1)],
)  # fmt: skip
def test_reduced_decoding_never_goes_below_the_target(size, by):
    assert recipe(Resize(height=300, width=300), reduced_decode=True).reduce(size) == by
    assert recipe(Resize(height=300, width=300)).reduce(size) == 1


def test_reduced_decoding_only_before_a_resize():
    assert (
        recipe(HorizontalFlip(), Resize(height=300, width=300), reduced_decode=True).reduce(
            (3000, 3000)
        )
        == 1
    )
    assert recipe(ShortSide(short=300, long=500), reduced_decode=True).reduce((3000, 4000)) == 8


# ----------------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", RECIPES)
def test_json_round_trip(name, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(to_json(RECIPES[name])))
    assert from_json(str(path)) == RECIPES[name]
    assert hash(from_json(path)) == hash(RECIPES[name])


FINE = {
    "name": "own",
    "ops": [{"op": "Resize", "height": 300, "width": 300}, {"op": "HorizontalFlip"}],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ops": [{"op": "Resise", "height": 1, "width": 1}]},
            r"recipe 'own', op 0: unknown op 'Resise'; did you mean 'Resize'\?",
        ),
        ({"ops": [{"op": "horizontalflip"}]}, "did you mean 'HorizontalFlip'"),
        (
            {"ops": [{"op": "Flip"}, {"op": "Resize", "height": 1}]},
            r"op 1 \(Resize\): field 'width' is missing",
        ),
        (
            {"ops": [{"op": "Resize", "height": 1, "widht": 1}]},
            "unknown field 'widht'; did you mean 'width'",
        ),
        (
            {"ops": [{"op": "Resize", "height": "1", "width": 1}]},
            "field 'height' is '1'; it must be of type int",
        ),
        (
            {"ops": [{"op": "Resize", "height": 1.5, "width": 1}]},
            "field 'height' is 1.5; it must be of type int",
        ),
        ({"ops": [{"op": "Resize", "height": True, "width": 1}]}, "field 'height' is True"),
        (
            {"ops": [{"op": "Resize", "height": 0, "width": 1}]},
            "height is 0; it must be at least 1",
        ),
        ({"ops": [{"op": "HorizontalFlip", "p": 1.5}]}, "p is 1.5; it must be within 0 and 1"),
        ({"ops": [{"op": "IoUCrop", "flavour": "mlpref"}]}, "did you mean 'mlperf'"),
        (
            {"ops": [{"op": "ZoomOut", "scale": [4, 1]}]},
            "scale is .*a range from a smaller to a larger",
        ),
        ({"ops": [{"op": "ZoomOut", "scale": [1]}]}, "must be a list of 2 float"),
        ({"ops": [{"op": "MultiScale", "sizes": [], "long": 5}]}, "sizes"),
        ({"ops": [{"op": "Pad", "fill": [0, 0, 256]}]}, "fill"),
        ({"ops": [{"op": "Affine", "matrix": [1, 1, 0, 1, 1, 0]}]}, "cannot be inverted"),
        (
            {"ops": [{"op": "GaussianBlur", "kernel": 4, "sigma": 1}]},
            "kernel is 4; it must be an odd",
        ),
        ({"ops": ["Flip"]}, "op 0: 'Flip' must be an object"),
        ({"ops": [{"height": 3}]}, 'no "op"'),
        ({"ops": {"op": "Flip"}}, "must be a list"),
        ({"ops": [{"op": "no.such.module:Op"}]}, "cannot be imported"),
        ({"ops": [{"op": "json:JSONDecoder"}]}, "is no op"),
        ({"name": 3}, "field 'name' is 3"),
        ({"finish": {"std": [1, 1, 0]}}, "recipe 'own', finish: std"),
        ({"finish": {"layout": "nchw"}}, "did you mean 'chw'"),
        ({"finish": 3}, "finish: 3 must be an object"),
        ({"reduced_decod": True}, "did you mean 'reduced_decode'"),
        ({"reduced_decode": 1}, "must be of type bool"),
        ({"ops": [{"op": "Brightness", "factor": math.nan}]}, "factor is nan"),
    ],
)
def test_json_errors_say_where_what_and_what_instead(change, message):
    with pytest.raises(UsageError, match=message):
        from_json(FINE | change)


def test_json_numbers_become_what_fields_are():
    made = from_json(
        FINE
        | {"ops": [{"op": "ZoomOut", "scale": [1, 2], "fill": [1, 2, 3]}], "finish": {"scale": 1}}
    )
    assert made.ops == (ZoomOut(scale=(1.0, 2.0), fill=(1, 2, 3)),)
    assert isinstance(made.ops[0].scale[0], float) and isinstance(made.finish.scale, float)


def test_json_files_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        from_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        from_json(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UsageError, match=r"list.json: recipe: \[\] must be an object"):
        from_json(tmp_path / "list.json")


# -------------------------------------------------------------------------------------------------------------------- own ops


@dataclass(frozen=True, kw_only=True)
class Invert:
    purpose: ClassVar[str] = "augment"


@dataclass(frozen=True, kw_only=True)
class MaybeInvert:
    purpose: ClassVar[str] = "augment"
    random: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    purpose: ClassVar[str] = "neutral"


def test_own_ops(monkeypatch):
    @sample.register(MaybeInvert)
    def _(op, rng, size, boxes):
        return (Invert(),) if rng.random() < 0.5 else ()

    @opencv.apply.register(Invert)
    def _(op, image, out=None):
        return 255 - image

    module = types.ModuleType("own_ops")
    module.Invert, module.MaybeInvert = Invert, MaybeInvert
    monkeypatch.setitem(sys.modules, "own_ops", module)
    own = from_json(
        {
            "name": "own",
            "ops": [{"op": "own_ops:Invert"}, {"op": "own_ops:MaybeInvert"}, {"op": "Flip"}],
        }
    )
    assert own.ops == (Invert(), MaybeInvert(), Flip())
    assert to_json(recipe(Invert()))["ops"] == [{"op": f"{Invert.__module__}:Invert"}]
    plans = [
        own.plan(seed=0, epoch=epoch, image_id="a", size=SIZE, boxes=BOXES) for epoch in range(20)
    ]
    assert {len(one.ops) for one in plans} == {2, 3}
    image, out = np.full((*SIZE, 3), 5, np.uint8), np.empty((*SIZE, 3), np.uint8)
    opencv.execute(image, plans[0].ops, out)
    assert (out == (250 if len(plans[0].ops) == 2 else 5)).all()
    opencv.check(own)
    with pytest.raises(
        UsageError, match=r"op 0 \(Invert\): the torchvision backend has no such op; register"
    ):
        torchvision.check(own)
    with pytest.raises(UsageError, match=r"op 1 \(Forgotten\): the opencv backend has no such op"):
        opencv.check(recipe(Equalize(), Forgotten()))


def test_every_op_has_a_purpose_and_a_docstring():
    for name, op in OPS.items():
        assert op.purpose in PURPOSES, name
        assert op.__doc__ and not op.__doc__.startswith(name + "(")
    assert {op.purpose for op in OPS.values()} == set(PURPOSES)


def test_recipes_are_values():
    assert recipe(Contrast(factor=2), finish=Finish()) == recipe(
        Contrast(factor=2.0), finish=Finish()
    )
    assert len({recipe(Flip()), recipe(Flip())}) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_evaluation_takes_chance_out_of_a_recipe_and_keeps_its_size_and_finish(name):
    judged = recipe_module.for_evaluation(RECIPES[name])
    assert not judged.random
    assert judged.finish == RECIPES[name].finish
    assert not judged.needs_boxes and not judged.drops_crowds
    if RECIPES[name].fixed_size is not None:
        assert (
            judged.plan(seed=0, epoch=0, image_id="x", size=(480, 640)).size
            == RECIPES[name].fixed_size
        )


def test_evaluation_of_a_training_recipe_is_its_validation_recipe():
    assert recipe_module.for_evaluation(RECIPES["ssd-300-train"]).ops == RECIPES["ssd-300-val"].ops
    scaled = recipe_module.for_evaluation(RECIPES["torchvision-multiscale"])
    assert scaled.plan(seed=0, epoch=0, image_id="x", size=(480, 640)).size == (800, 1066)
    cut = recipe_module.for_evaluation(recipe(recipe_module.RandomCrop(height=20, width=30)))
    assert cut.plan(seed=0, epoch=0, image_id="x", size=(40, 50)).ops == (
        Crop(top=10, left=10, height=20, width=30),
    )
