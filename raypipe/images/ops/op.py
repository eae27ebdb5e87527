"""What an op is: the base classes, the types that ops share, and the bounds of their fields.

An op is a frozen dataclass. A *plain* op has all its numbers, and a backend executes it. Other ops
become plain ones for each image: `Op.expand` by the image's size, `RandomOp.sample` by chance too.

Conventions, everywhere:

- A size is (height, width).
- Boxes are float32 (n, 4), x1 y1 x2 y2, in pixels of the image at that point. Coordinates are pixel
  edges, not pixel centres: (0, 0, width, height) is the whole image.
- Colours are RGB, 0 to 255.

An own op that only changes pixels:

    @dataclass(frozen=True, kw_only=True)
    class Invert(Op):
        purpose = "augment"

    @opencv.apply.register
    def _(op: Invert, image, out=None):
        return 255 - image

It overrides the methods of `Op` in which it differs. In JSON its name is "package.module:Invert".
A dataclass with a `purpose` that does not derive from `Op` is accepted too: it changes pixels only.
"""

import functools
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from raypipe.errors import UsageError
from raypipe.images.header import Reject

Size = tuple[int, int]
Matrix = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f) maps a point (x, y) to (a x + b y + c, d x + e y + f)."""

UNMOVED: Matrix = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

Purpose = Literal["emphasise", "remove", "augment", "neutral"]
"""Emphasise what matters to the model, remove what does not, augment the data set, or neutral."""
PURPOSES: tuple[str, ...] = typing.get_args(Purpose)


# ------------------------------------------------------------------------------------------ bounds


@dataclass(frozen=True)
class Bound:
    """Which values a field may have; stands in the field's type: Annotated[int, at_least(1)].

    holds: whether a value is allowed.
    must_be: the end of the message "height is 0; it must be ...".
    """

    holds: Callable[[Any], bool]
    must_be: str


def at_least(least: float) -> Bound:
    return Bound(lambda value: least <= value < math.inf, f"at least {least}")


def above(limit: float) -> Bound:
    return Bound(lambda value: limit < value < math.inf, f"above {limit}")


def within(least: float, most: float) -> Bound:
    return Bound(lambda value: least <= value <= most, f"within {least} and {most}")


def rising(low: float) -> Bound:
    """Bound a pair: two finite numbers in rising order, the first at least `low`."""
    return Bound(
        lambda pair: low <= pair[0] <= pair[1] < math.inf,
        f"a range from a smaller to a larger number, from {low} on",
    )


def each(bound: Bound, must_be: str) -> Bound:
    """Bound all items of a tuple alike."""
    return Bound(lambda values: all(map(bound.holds, values)), must_be)


Length = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
NonNegative = Annotated[float, at_least(0)]
Probability = Annotated[float, within(0, 1)]
Kernel = Annotated[
    int, Bound(lambda value: value >= 1 and value % 2 == 1, "an odd number of pixels")
]
Range = tuple[float, float]
NonNegativeRange = Annotated[Range, rising(0)]
PositiveRange = Annotated[Range, rising(0.001)]
Colour = Annotated[tuple[int, int, int], each(within(0, 255), "red, green and blue, each 0 to 255")]


def check_bounds(item: object) -> None:
    """Check the fields of a dataclass against their bounds; a field that is None has no bound.

    Raises:
        UsageError: the first field that breaks one, its value, and what it must be.
    """
    cls: type = type(item)
    for name, bound in _bounds(cls):
        value = getattr(item, name)
        if value is not None and not bound.holds(value):
            raise UsageError(f"{name} is {value}; it must be {bound.must_be}")


@functools.cache
def _bounds(cls: type) -> tuple[tuple[str, Bound], ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return tuple(
        (name, bound)
        for name, hint in hints.items()
        for bound in getattr(hint, "__metadata__", ())
        if isinstance(bound, Bound)
    )


# --------------------------------------------------------------------------------------------- ops


class Op:
    """An op without chance. As it stands: a plain op that changes pixels only.

    purpose: what it is for.
    pixels: whether a backend has to execute it. False for an op that only changes boxes.
    """

    purpose: ClassVar[Purpose]
    pixels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_bounds(self)
        conflict = self.conflict()
        if conflict is not None:
            raise UsageError(conflict)

    def conflict(self) -> str | None:
        """Say which fields contradict each other, and what to change; None: they do not."""
        return None

    def expand(self, size: Size) -> tuple["Op", ...]:
        """The plain ops that this op becomes on an image of `size`. May raise Reject."""
        return (self,)

    def output_size(self, size: Size) -> Size:
        """The size after this plain op on an image of `size`. May raise Reject."""
        return size

    def move_boxes(self, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
        """Move boxes as this plain op moves the pixels of an image of `size`.

        Returns:
            The boxes that stay, float32 (m, 4), and their indices in `boxes`, int64 (m,).
        """
        return boxes, np.arange(len(boxes))

    def back(self, size: Size) -> Matrix:
        """The matrix from the result of this plain op back to the image, which is of `size`.

        Raises:
            UsageError: the op moves boxes, and does not define this.
        """
        if type(self).move_boxes is not Op.move_boxes:
            raise UsageError(
                f"{self} moves boxes, but not back: boxes that a model finds could not be placed "
                f"on the original image. Define {type(self).__name__}.back."
            )
        return UNMOVED

    def fixed_size(self, size: Size | None) -> Size | None:
        """The size after this op if it is the same for all images, else None.

        Args:
            size: the size before it, None where it varies.
        """
        return None if size is None else self.largest_size(size)

    def smallest_size(self) -> Size:
        """A size that no result of this op is below, whatever the image."""
        return self.fixed_size(None) or (1, 1)

    def largest_size(self, size: Size) -> Size:
        """A size that no result of this op on an image of `size` is above. May raise Reject."""
        fixed = self.fixed_size(None)
        if fixed is not None:
            return fixed
        for plain in self.expand(size):
            size = as_op(plain).output_size(size)
        return size

    def without_chance(self) -> tuple["Op", ...]:
        """The ops that stand for this one when a model is evaluated or serves."""
        return (self,)


class RandomOp(Op):
    """An op that chance turns into other, plain ops, anew for each image and epoch.

    keeps_size: whether results have the size of the image.
    """

    keeps_size: ClassVar[bool] = False

    def sample(self, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Op, ...]:
        """Draw the plain ops for one image of `size`. All chance is from `rng`. May raise Reject.

        Args:
            boxes: the image's boxes at this point, float32 (n, 4).
        """
        raise NotImplementedError

    def fixed_size(self, size: Size | None) -> Size | None:
        return size if self.keeps_size else None

    def largest_size(self, size: Size) -> Size:
        return self.fixed_size(None) or size

    def without_chance(self) -> tuple[Op, ...]:
        return ()


@dataclass(frozen=True)
class _PixelsOnly(Op):
    """The methods of an own op that is a plain dataclass: those of `Op`, for `own`."""

    own: Op

    def expand(self, size: Size) -> tuple[Op, ...]:
        return (self.own,)

    def without_chance(self) -> tuple[Op, ...]:
        return (self.own,)


def as_op(op: Op) -> Op:
    """The op itself; for an own op that does not derive from `Op`, the default methods."""
    return op if isinstance(op, Op) else _PixelsOnly(op)


_METHODS = ("expand", "sample", "output_size", "move_boxes", "back")


def check_methods(op: Op) -> None:
    """Check the methods of an own op.

    Raises:
        UsageError: a random op lacks `sample`; or an op has methods of `Op` and does not derive
            from it.
    """
    cls = type(op)
    if issubclass(cls, RandomOp) and cls.sample is RandomOp.sample:
        raise UsageError(
            f"{cls.__name__} is a RandomOp and draws nothing; define its sample method"
        )
    if isinstance(op, Op):
        return
    defined = [name for name in _METHODS if callable(getattr(cls, name, None))]
    if getattr(op, "random", False):
        defined.append("random")
    if defined:
        raise UsageError(
            f"{cls.__name__} defines {', '.join(defined)}, but does not derive from Op or RandomOp "
            "of raypipe.images.ops.op, so that would be ignored; derive it from one of them"
        )


def check_contains(op: Op, size: Size, rectangle: Size, at: Sequence[int] = (0, 0)) -> None:
    """Raise Reject, "too small", if an image of `size` does not contain an op's rectangle."""
    if at[0] + rectangle[0] > size[0] or at[1] + rectangle[1] > size[1]:
        raise Reject("too small", f"{size[0]}x{size[1]} (height x width) does not contain {op}")
