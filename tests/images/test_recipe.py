"""Plans of recipes: what they depend on, boxes, sizes, reduced decoding."""

import math

import numpy as np
import pytest

from raypipe.images.catalog import RECIPES
from raypipe.images.header import Reject
from raypipe.images.ops.augment import ColorJitter, HorizontalFlip, Noise
from raypipe.images.ops.boxes import SanitizeBoxes
from raypipe.images.ops.colour import Contrast
from raypipe.images.ops.geometry import Crop, Flip, Pad, PadTo, Resize, ShortSide
from raypipe.images.ops.random_geometry import IoUCrop, RandomCrop, ZoomOut
from raypipe.images.recipe import Finish, for_evaluation
from tests.images.planning import BOXES, SIZE, plan, recipe


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


def test_a_result_of_too_many_pixels_is_rejected_before_it_is_made():
    with pytest.raises(Reject, match="too many pixels"):
        plan(Pad(bottom=10_000, right=10_000), ZoomOut(scale=(4, 4), p=1))


@pytest.mark.parametrize(
    ("size", "by"),
    [
        ((3000, 4000), 8),
        ((2400, 2400), 8),
        ((2399, 2399), 8),
        ((2392, 2392), 4),
        ((480, 640), 1),
        ((600, 600), 2),
        ((599, 9000), 2),
        ((598, 9000), 1),
        ((100, 100), 1),
    ],
)
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


def test_recipes_are_values():
    assert recipe(Contrast(factor=2), finish=Finish()) == recipe(
        Contrast(factor=2.0), finish=Finish()
    )
    assert len({recipe(Flip()), recipe(Flip())}) == 1


def test_evaluation_of_a_training_recipe_is_its_validation_recipe():
    assert for_evaluation(RECIPES["ssd-300-train"]).ops == RECIPES["ssd-300-val"].ops
    scaled = for_evaluation(RECIPES["torchvision-multiscale"])
    assert scaled.plan(seed=0, epoch=0, image_id="x", size=(480, 640)).size == (800, 1066)
    cut = for_evaluation(recipe(RandomCrop(height=20, width=30)))
    assert cut.plan(seed=0, epoch=0, image_id="x", size=(40, 50)).ops == (
        Crop(top=10, left=10, height=20, width=30),
    )
