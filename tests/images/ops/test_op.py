"""What an op is: own ops, purposes, sizes that no op may have."""

import math
import sys
import types
import typing
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import pytest

from raypipe import UsageError
from raypipe.images import opencv, torchvision
from raypipe.images.header import Header, Reject
from raypipe.images.memory import needed
from raypipe.images.ops.augment import HorizontalFlip
from raypipe.images.ops.colour import Brightness, Equalize, Hue, Permute
from raypipe.images.ops.filters import GaussianBlur
from raypipe.images.ops.geometry import Affine, CenterCrop, Crop, Flip, Pad, Resize, ShortSide
from raypipe.images.ops.op import PURPOSES, Op, RandomOp, at_least, within
from raypipe.images.ops.random_geometry import MultiScale, RandomAffine, RandomCrop, ZoomOut
from raypipe.images.recipe import Finish, boxes_back, for_evaluation
from raypipe.images.recipe_json import OPS, from_json, to_json
from tests.images.planning import BOXES, INSIDE, SIZE, plan, recipe


@dataclass(frozen=True, kw_only=True)
class Moves(Op):
    purpose = "neutral"

    def move_boxes(self, boxes, size):
        return boxes + 1, np.arange(len(boxes))


@dataclass(frozen=True, kw_only=True)
class Invert:
    """An own op may be a plain dataclass, if it only changes pixels."""

    purpose: ClassVar[str] = "augment"


@dataclass(frozen=True, kw_only=True)
class MaybeInvert(RandomOp):
    purpose = "augment"

    def sample(self, rng, size, boxes):
        return (Invert(),) if rng.random() < 0.5 else ()


@dataclass(frozen=True, kw_only=True)
class Forgotten(Op):
    purpose = "neutral"


def test_own_ops(monkeypatch):
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


def test_an_own_op_that_moves_boxes_and_does_not_say_how_back_is_refused():
    with pytest.raises(UsageError, match=r"Moves\(\) moves boxes, but not back.*Moves\.back"):
        boxes_back(recipe(Moves()), INSIDE, SIZE)


def test_a_plain_dataclass_has_the_defaults_of_an_op():
    own = recipe(Resize(height=30, width=40), Invert())
    assert own.fixed_size == (30, 40) and own.largest(SIZE) == (30, 40) and not own.random
    assert for_evaluation(own).ops == own.ops
    planned = own.plan(seed=0, epoch=0, image_id="a", size=SIZE, boxes=INSIDE)
    assert planned.ops == own.ops
    back, _ = boxes_back(own, planned.boxes, SIZE)
    np.testing.assert_allclose(back, INSIDE, atol=1e-3)
    header = Header(format="jpeg", height=480, width=640, native=True)
    assert needed(header, planned.ops, "opencv") > 0


class Draws:
    def sample(self, rng, size, boxes):
        return ()


class Grows:
    def output_size(self, size):
        return size[0] + 1, size[1]


class IsRandom:
    random = True


@pytest.mark.parametrize(
    ("own", "named"), [(Draws, "sample"), (Grows, "output_size"), (IsRandom, "random")]
)
def test_an_op_whose_methods_would_be_ignored_is_refused(own, named):
    with pytest.raises(UsageError, match=rf"{own.__name__} defines {named}, but .* derive it from"):
        recipe(own())


@dataclass(frozen=True, kw_only=True)
class DrawsNothing(RandomOp):
    purpose = "augment"


def test_a_random_op_without_sample_is_refused_before_the_run():
    with pytest.raises(UsageError, match="DrawsNothing is a RandomOp and draws nothing"):
        recipe(DrawsNothing())


# ------------------------------------------------------------------------------------------- bounds


@dataclass(frozen=True, kw_only=True)
class Tilt(Op):
    purpose = "augment"
    most: Annotated[float, within(0, 90)]
    times: Annotated[int | None, at_least(1)] = None


def test_an_own_op_declares_bounds_in_its_types():
    assert Tilt(most=90).times is None
    with pytest.raises(UsageError, match="most is 91; it must be within 0 and 90"):
        Tilt(most=91)
    with pytest.raises(UsageError, match="times is 0; it must be at least 1"):
        Tilt(most=1, times=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Brightness(factor=-1), "factor is -1; it must be at least 0"),
        (lambda: Brightness(factor=math.inf), "factor is inf; it must be at least 0"),
        (lambda: Brightness(factor=math.nan), "factor is nan; it must be at least 0"),
        (lambda: GaussianBlur(kernel=3, sigma=0), "sigma is 0; it must be above 0"),
        (lambda: GaussianBlur(kernel=-3, sigma=1), "kernel is -3; it must be an odd number"),
        (lambda: HorizontalFlip(p=math.nan), "p is nan; it must be within 0 and 1"),
        (lambda: Hue(shift=0.6), "shift is 0.6; it must be within -0.5 and 0.5"),
        (lambda: ZoomOut(scale=(0.5, 2)), r"scale is \(0.5, 2\); it must be a range .* from 1 on"),
        (lambda: ZoomOut(scale=(2, math.inf)), "scale is .* a smaller to a larger"),
        (lambda: Pad(fill=(0, -1, 0)), r"fill is \(0, -1, 0\); it must be red, green and blue"),
        (lambda: Pad(left=-1), "left is -1; it must be at least 0"),
        (lambda: Permute(order=(0, 1, 1)), r"order is \(0, 1, 1\); .* channels 0, 1 and 2"),
        (lambda: MultiScale(sizes=(9, 0), long=9), "sizes is .* one or more lengths"),
        (lambda: RandomAffine(translate=(0, 2)), "translate is .* two shares"),
        (lambda: Affine(matrix=(1, 0, math.nan, 0, 1, 0)), "matrix is .* cannot be inverted"),
        (lambda: Resize(height=1, width=1, antialias=True, area=True), "two ways to shrink"),
        (lambda: ShortSide(short=1, long=1, area=True), "two ways to shrink"),
        (lambda: Resize(height=1, width=1, rounding="down"), "'down' is for arithmetic 'float'"),
        (
            lambda: Resize(height=1, width=1, arithmetic="float", area=True),
            "'float' is for plain bilinear",
        ),
        (lambda: Finish(pad_multiple=0), "pad_multiple is 0; it must be at least 1"),
        (lambda: Finish(std=(1, 1, math.inf)), "std is .* three numbers above 0"),
        (lambda: Finish(dtype="uint8", scale=2), "dtype 'uint8' holds pixels as they are"),
    ],
)
def test_values_out_of_bounds_are_refused_with_the_value_and_what_it_must_be(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_number_of_an_op_has_a_bound(op):
    for name, hint in typing.get_type_hints(op, include_extras=True).items():
        kind = typing.get_origin(hint)
        if kind is not typing.ClassVar and kind is not typing.Literal and hint is not bool:
            assert kind is Annotated, f"{op.__name__}.{name}"


def test_every_op_has_a_purpose_and_a_docstring():
    for name, op in OPS.items():
        assert op.purpose in PURPOSES, name
        assert op.__doc__ and not op.__doc__.startswith(name + "(")
    assert {op.purpose for op in OPS.values()} == set(PURPOSES)


def test_an_image_too_small_for_an_op_is_rejected():
    for op in (
        Crop(top=0, left=0, height=481, width=1),
        RandomCrop(height=1, width=641),
        CenterCrop(height=481, width=1),
        GaussianBlur(kernel=963, sigma=9.0),
    ):
        with pytest.raises(Reject, match="too small"):
            plan(op)


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
