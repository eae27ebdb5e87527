"""Recipes: ops in order, and the plan that a recipe makes for one image.

A plan is a list of plain ops with every number in it. Chance comes from (seed, epoch, image id)
only, so the worker, the backend and the number of attempts never change a result. Backends know
plain ops only, and whoever reads a plan sees all that happens to the image.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any, Literal

import numpy as np

from raypipe.errors import UsageError
from raypipe.images import backend
from raypipe.images.frames import sound
from raypipe.images.header import MAX_PIXELS, Reject
from raypipe.images.memory import SCRATCH
from raypipe.images.ops.boxes import NO_BOXES, after, around, inverted, overlapping
from raypipe.images.ops.geometry import Resize, ShortSide
from raypipe.images.ops.op import (
    UNMOVED,
    Matrix,
    Op,
    RandomOp,
    Size,
    above,
    as_op,
    at_least,
    check_bounds,
    check_methods,
    each,
)

_Three = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Finish:
    """How batches of uint8 pixels become what a model takes: (pixel * scale - mean) / std.

    Computed for a whole batch, on the device that consumes it. `mean` and `std` are in the order of
    `channels`. `pad_multiple`: images of a batch are padded to the largest height and width among
    them, rounded up to this multiple. The padding is zeros, after normalising, at the bottom and
    right.
    """

    scale: float = 1.0
    mean: _Three = (0.0, 0.0, 0.0)
    std: Annotated[
        _Three,
        each(above(0), "three numbers above 0: pixels are divided by them"),
    ] = (1.0, 1.0, 1.0)
    channels: Literal["rgb", "bgr"] = "rgb"
    layout: Literal["hwc", "chw"] = "chw"
    pad_multiple: Annotated[int | None, at_least(1)] = None
    dtype: Literal["float32", "float16", "uint8"] = "float32"

    def __post_init__(self) -> None:
        check_bounds(self)
        normalises = (self.scale, self.mean, self.std) != (1.0, (0.0,) * 3, (1.0,) * 3)
        if self.dtype == "uint8" and normalises:
            raise UsageError(
                "dtype 'uint8' holds pixels as they are: leave out scale, mean and std"
            )

    def table(self) -> np.ndarray:
        """The result for each channel and pixel value, float32 (3, 256).

        Computed in float64 and rounded once.
        """
        values = np.arange(256, dtype=np.float64) * self.scale
        mean, std = np.array(self.mean)[:, None], np.array(self.std)[:, None]
        return ((values[None] - mean) / std).astype(np.float32)

    def padded_size(self, sizes: Sequence[Size]) -> Size:
        """The common size of a batch of images of these sizes.

        Raises:
            UsageError: the sizes differ, and there is no `pad_multiple`.
        """
        if self.pad_multiple is None and len(set(sizes)) > 1:
            raise UsageError(
                f"the images of a batch differ in size, {sizes[0]} and others; set the finish's "
                "pad_multiple, or resize"
            )
        by = self.pad_multiple or 1
        height, width = (
            -(-max((size[side] for size in sizes), default=0) // by) * by for side in (0, 1)
        )
        return height, width


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done to one image, with all numbers drawn.

    ops: plain ops, in order.
    size: the size of the result.
    largest: pixels of the largest image on the way.
    boxes: those that stay, float32 (m, 4), in pixels of the result.
    keep: their indices in the boxes that were given, int64 (m,).
    dropped: indices of given boxes that could not be used, each with the reason.
    """

    ops: tuple[Op, ...]
    size: Size
    largest: int
    boxes: np.ndarray
    keep: np.ndarray
    dropped: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Ops in order, under a name.

    reduced_decode: JPEGs may be decoded at 1/2, 1/4 or 1/8 scale if the first op shrinks them at
        least as much. Much faster for large photos; the pixels are not the same.
    needs_boxes: images without boxes are left out of the run, as MLPerf training does. They are not
        rejects.
    drops_crowds: boxes around crowds are removed before that. Otherwise a training learns from
        them as from others.
    """

    name: str
    description: str = ""
    ops: tuple[Op, ...]
    finish: Finish | None = None
    reduced_decode: bool = False
    needs_boxes: bool = False
    drops_crowds: bool = False

    def __post_init__(self) -> None:
        for op in self.ops:
            check_methods(op)
            height, width = as_op(op).smallest_size()
            if height * width > MAX_PIXELS:
                raise UsageError(
                    f"{type(op).__name__} makes images of at least {height}x{width}; a result may "
                    f"have {MAX_PIXELS} pixels at most"
                )

    @property
    def random(self) -> bool:
        """Whether an image's result differs from epoch to epoch."""
        return any(isinstance(op, RandomOp) for op in self.ops)

    @property
    def fixed_size(self) -> Size | None:
        """The size of every result; None if it depends on the image."""
        size: Size | None = None
        for op in self.ops:
            size = as_op(op).fixed_size(size)
        return size

    def reduce(self, size: Size) -> int:
        """The largest of 1, 2, 4, 8 by which decoding may reduce a JPEG of `size`.

        The decoded image is never smaller than the result of the first op, a resize.
        """
        if not self.reduced_decode or not self.ops:
            return 1
        match self.ops[0]:
            case ShortSide() as first:
                height, width = first.resized(size)
            case Resize(height=height, width=width):
                pass
            case _:
                return 1
        for by in (8, 4, 2):
            if -(-size[0] // by) >= height and -(-size[1] // by) >= width:
                return by
        return 1

    def largest(self, size: Size) -> Size:
        """A size that no result for an image of `size` is above; (0, 0) for a rejected image."""
        try:
            for op in self.ops:
                size = as_op(op).largest_size(size)
        except Reject:
            return 0, 0
        return size

    def plan(
        self, *, seed: int, epoch: int, image_id: str, size: Size, boxes: np.ndarray | None = None
    ) -> Plan:
        """Plan one image. The same arguments give the same plan, on any machine, at any time.

        Boxes that stick out are clipped. Boxes that are not finite, have no area or lie outside are
        dropped.

        Args:
            size: of the decoded image.
            boxes: float32 (n, 4), in its pixels.

        Raises:
            Reject: "bad boxes" where the recipe needs boxes and all given ones are dropped; "too
                small" for an op; "too many pixels" in a result.
        """
        given = NO_BOXES if boxes is None else boxes
        boxes, keep, dropped = sound(given, size) if len(given) else (NO_BOXES, np.arange(0), ())
        if self.needs_boxes and len(given) and not len(boxes):
            raise Reject(
                "bad boxes",
                f"none of its {len(given)} boxes can be used; the first: {dropped[0][1]}",
            )
        rng: np.random.Generator | None = None
        done = []
        largest = size[0] * size[1]
        for op in self.ops:
            if isinstance(op, RandomOp):
                if rng is None:
                    rng = generator(seed, epoch, image_id)
                plain_ops = op.sample(rng, size, boxes)
            else:
                plain_ops = as_op(op).expand(size)
            for plain in map(as_op, plain_ops):
                if len(boxes):
                    boxes, kept = plain.move_boxes(boxes, size)
                    keep = keep[kept]
                size = plain.output_size(size)
                largest = max(largest, size[0] * size[1])
                if size[0] * size[1] > MAX_PIXELS:
                    raise Reject(
                        "too many pixels",
                        f"{plain} makes {size[0]}x{size[1]}, more than {MAX_PIXELS} pixels",
                    )
            done += [plain for plain in plain_ops if getattr(plain, "pixels", True)]
        return Plan(tuple(done), size, largest, boxes, keep, dropped)


def generator(seed: int, epoch: int, image_id: str) -> np.random.Generator:
    """The random numbers of one image in one epoch. Takes 20 us."""
    key = blake2b(
        f"{seed}/{epoch}/{image_id}".encode("utf-8", "surrogatepass"), digest_size=16
    ).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def left_of(values: np.ndarray, keep: np.ndarray, *, boxes: int) -> np.ndarray:
    """The values (labels, ids) of the boxes that a plan kept.

    Args:
        values: (n,), one for each of the `boxes` that the plan was given. A source may have none:
            then none are returned. Without boxes the values belong to the whole image, and stay.
        keep: the plan's `keep`, (m,).
    """
    if not boxes:
        return values
    return values[keep] if len(values) > keep.max(initial=-1) else values[:0]


def for_evaluation(recipe: Recipe) -> Recipe:
    """The recipe without chance, for evaluation and inference of a model that it trained.

    Random ops that decide the size become a fixed op: the largest or middle of what they draw. The
    others are removed. Images without boxes stay.
    """
    ops = tuple(kept for op in recipe.ops for kept in as_op(op).without_chance())
    return dataclasses.replace(
        recipe, name=f"{recipe.name}-evaluation", ops=ops, needs_boxes=False, drops_crowds=False
    )


# ----------------------------------------------------------------------------------- back and forth


def boxes_back(recipe: Recipe, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Map boxes on the result of a recipe without chance back to the image, which is of `size`.

    Args:
        boxes: float32 (n, 4), x1 y1 x2 y2, in pixels of the result.

    Returns:
        The boxes, float32 (m, 4), in pixels of the image and clipped to it; where an op turns the
        image, the upright boxes around their corners. And their indices in `boxes`, int64 (m,): a
        box outside the image, such as one in the padding, is left out.

    Raises:
        UsageError: an op cannot be undone (`Op.back`).
        Reject: as `Recipe.plan`.
    """
    matrix, _ = _backward(recipe.plan(seed=0, epoch=0, image_id="", size=size).ops, size)
    return overlapping(around(matrix, boxes), size)


def forward(plain_ops: Sequence[Op], size: Size) -> tuple[Matrix, Size]:
    """The matrix from an image of `size` to the result of plain ops, and the result's size.

    Raises:
        UsageError: an op moves boxes and does not define `Op.back`.
    """
    matrix, at = _backward(plain_ops, size)
    return inverted(matrix), at


def _backward(plain_ops: Sequence[Op], size: Size) -> tuple[Matrix, Size]:
    """The matrix from the result back to the image of `size`, and the result's size."""
    matrix, at = UNMOVED, size
    for op in map(as_op, plain_ops):
        matrix, at = after(matrix, op.back(at)), op.output_size(at)
    return matrix, at


# ----------------------------------------------------------------------------------------- backends


def check_ops(
    recipe: Recipe,
    apply: "functools._SingleDispatchCallable[Any]",
    backend: str,
    remedies: Mapping[type, str],
) -> None:
    """Check that a backend can execute the recipe.

    Args:
        apply: the backend's function, with which plain ops are registered.
        remedies: the end of the message for ops that the backend cannot have.

    Raises:
        UsageError: an op is not registered with `apply`, and does not become other ops.
    """
    for index, kind in _executed(recipe):
        if apply.dispatch(kind) is not apply.dispatch(object):
            continue
        remedy = remedies.get(kind, f"register a function with raypipe.images.{backend}.apply")
        raise UsageError(
            f"recipe {recipe.name!r}, op {index} ({kind.__name__}): the {backend} backend has no "
            f"such op; {remedy}"
        )


def check_backend(recipe: Recipe, name: str) -> None:
    """Check that a backend can execute the recipe.

    The backend is imported only for an op that is not in its table: torch and torchvision take 5 s
    of CPU.

    Raises:
        UsageError: it cannot.
    """
    if not all(kind in SCRATCH[name] for _, kind in _executed(recipe)):
        backend(name).check(recipe)


def _executed(recipe: Recipe) -> Iterator[tuple[int, type]]:
    """The place and class of each op that a backend has to know."""
    for index, op in enumerate(recipe.ops):
        if getattr(op, "pixels", True) and not _becomes_others(type(op)):
            yield index, type(op)


def _becomes_others(kind: type) -> bool:
    return issubclass(kind, RandomOp) or (issubclass(kind, Op) and kind.expand is not Op.expand)
