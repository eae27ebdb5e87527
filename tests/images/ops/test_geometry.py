"""Ops without chance: sizes, boxes, and the way back."""

import math

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from raypipe.images import opencv, torchvision
from raypipe.images.ops.boxes import SanitizeBoxes
from raypipe.images.ops.colour import Brightness
from raypipe.images.ops.geometry import (
    Affine,
    CenterCrop,
    Crop,
    Flip,
    Pad,
    PadTo,
    Resize,
    ShortSide,
    affine_matrix,
)
from raypipe.images.recipe import Recipe, boxes_back
from tests.images.planning import BOXES, INSIDE, SIZE, plan, recipe


@pytest.mark.parametrize(
    ("op", "size", "moved", "keep"),
    [
        (
            Resize(height=240, width=1280),
            (240, 1280),
            [[20, 10, 220, 110], [600, 100, 1278, 239.5], [1200, 200, 1280, 240]],
            [0, 1, 2],
        ),
        (Flip(), SIZE, [[530, 20, 630, 220], [1, 200, 340, 479], [0, 400, 40, 480]], [0, 1, 2]),
        (
            Flip(axis="vertical"),
            SIZE,
            [[10, 260, 110, 460], [300, 1, 639, 280], [600, 0, 640, 80]],
            [0, 1, 2],
        ),
        (
            Pad(top=5, left=7, bottom=1, right=2),
            (486, 649),
            [[17, 25, 117, 225], [307, 205, 646, 484], [607, 405, 647, 485]],
            [0, 1, 2],
        ),
        (
            Crop(top=100, left=100, height=200, width=300),
            (200, 300),
            [[0, 0, 10, 120], [200, 100, 300, 200]],
            [0, 1],
        ),
        (
            Crop(top=100, left=100, height=250, width=400, keep="centre"),
            (250, 400),
            [[200, 100, 400, 250]],
            [1],
        ),
        (
            Crop(top=0, left=0, height=400, width=600),
            (400, 600),
            [[10, 20, 110, 220], [300, 200, 600, 400]],
            [0, 1],
        ),
        (
            Affine(matrix=(1, 0, 30, 0, 1, -20)),
            SIZE,
            [[40, 0, 140, 200], [330, 180, 640, 459], [630, 380, 640, 460]],
            [0, 1, 2],
        ),
        (
            Affine(matrix=(0, -1, 480, 1, 0, 0)),
            SIZE,
            [[260, 10, 460, 110], [1, 300, 280, 480]],
            [0, 1],
        ),
        (SanitizeBoxes(min_size=79), SIZE, [[10, 20, 110, 220], [300, 200, 639, 479]], [0, 1]),
        (Brightness(factor=2), SIZE, BOXES, [0, 1, 2]),
    ],
)
def test_boxes_and_sizes_by_hand(op, size, moved, keep):
    assert op.output_size(SIZE) == size
    boxes, kept = op.move_boxes(BOXES, SIZE)
    np.testing.assert_allclose(boxes, moved, atol=1e-4)
    assert boxes.dtype == np.float32
    assert kept.tolist() == keep


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
    ours, keep = op.move_boxes(BOXES, SIZE)
    assert tuple(theirs.canvas_size) == op.output_size(SIZE)
    np.testing.assert_allclose(ours, theirs.numpy()[keep], atol=0.01)
    sides = theirs.numpy()[:, 2:] - theirs.numpy()[:, :2]
    assert keep.tolist() == np.flatnonzero((sides > 0).all(axis=1)).tolist()


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


@pytest.mark.parametrize("mode", ["reflect", "symmetric", "edge"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 5), (7, 4), (40, 50)])
def test_a_border_wider_than_the_image_is_np_pads(mode, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    op = Pad(top=7, left=11, bottom=13, right=9, mode=mode)
    expected = np.pad(image, ((7, 13), (11, 9), (0, 0)), mode=mode)
    plan = Recipe(name="pad", ops=(op,)).plan(seed=0, epoch=0, image_id="", size=size)
    assert plan.size == expected.shape[:2]
    np.testing.assert_array_equal(opencv.apply(op, image), expected)
    theirs = torchvision.apply(op, torch.from_numpy(image).permute(2, 0, 1))
    np.testing.assert_array_equal(theirs.permute(1, 2, 0).numpy(), expected)
