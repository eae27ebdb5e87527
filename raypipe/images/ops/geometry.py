"""Ops without chance that move pixels: resizing, cutting, padding, mirroring, mapping."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from raypipe.images.ops.boxes import around, centred, clip, inverted, overlapping
from raypipe.images.ops.op import Bound, Colour, Length, Matrix, Natural, Op, Size, check_contains


@dataclass(frozen=True, kw_only=True)
class Resize(Op):
    """Stretches to height x width, bilinear.

    `antialias=False` is cv2.INTER_LINEAR: it skips source pixels when it shrinks more than twice.
    `antialias=True` averages over all of them (triangle filter), as Pillow and torchvision do;
    enlarging, both are the same. `area=True` is cv2.INTER_AREA: the mean of the covered pixels.

    `arithmetic`: "uint8" uses weights of 11 bits, as OpenCV and Pillow do with uint8 images.
    "float" converts to float32 first, as MLPerf's inference does; for plain bilinear only.
    `rounding` of float: to the "nearest" integer, or "down", which truncates.
    """

    purpose = "remove"
    height: Length
    width: Length
    antialias: bool = False
    area: bool = False
    arithmetic: Literal["uint8", "float"] = "uint8"
    rounding: Literal["nearest", "down"] = "nearest"

    def conflict(self) -> str | None:
        if self.arithmetic == "float" and (self.antialias or self.area):
            return "arithmetic 'float' is for plain bilinear; leave out antialias and area"
        if self.rounding == "down" and self.arithmetic != "float":
            return "rounding 'down' is for arithmetic 'float'; bytes are rounded to the nearest"
        return _two_filters(self.antialias, self.area)

    def output_size(self, size: Size) -> Size:
        return self.height, self.width

    def fixed_size(self, size: Size | None) -> Size:
        return self.height, self.width

    def move_boxes(self, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
        y, x = self.height / size[0], self.width / size[1]
        # Rounding in float32 may leave a corner 0.00002 outside.
        moved = clip(boxes * np.array([x, y, x, y], np.float32), (self.height, self.width))
        return moved, np.arange(len(boxes))

    def back(self, size: Size) -> Matrix:
        return size[1] / self.width, 0.0, 0.0, 0.0, size[0] / self.height, 0.0


def _two_filters(antialias: bool, area: bool) -> str | None:
    if antialias and area:
        return "antialias and area are two ways to shrink: set one of them to false"
    return None


@dataclass(frozen=True, kw_only=True)
class ShortSide(Op):
    """Resizes, keeping the proportions: the short side becomes `short`, the long at most `long`.

    Rounded as MLPerf's Mask R-CNN does. `antialias` and `area` are those of Resize.
    """

    purpose = "remove"
    short: Length
    long: Length
    antialias: bool = True
    area: bool = False

    def conflict(self) -> str | None:
        return _two_filters(self.antialias, self.area)

    def expand(self, size: Size) -> tuple[Op, ...]:
        height, width = self.resized(size)
        return (Resize(height=height, width=width, antialias=self.antialias, area=self.area),)

    def resized(self, size: Size) -> Size:
        """The size of the result for an image of `size`."""
        height, width = size
        short = self.short
        if max(size) / min(size) * short > self.long:
            short = round(self.long * min(size) / max(size))
        if width < height:
            return max(1, int(short * height / width)), max(1, short)
        return max(1, short), max(1, int(short * width / height))

    def smallest_size(self) -> Size:
        side = min(self.short, self.long)
        return side, side


@dataclass(frozen=True, kw_only=True)
class Crop(Op):
    """Cuts out a rectangle. It must lie inside the image, else the image is rejected, "too small".

    `keep` says which boxes stay: those that overlap the rectangle, or those whose centre is in it.
    They are clipped to it.
    """

    purpose = "remove"
    top: Natural
    left: Natural
    height: Length
    width: Length
    keep: Literal["overlap", "centre"] = "overlap"

    def output_size(self, size: Size) -> Size:
        check_contains(self, size, (self.height, self.width), (self.top, self.left))
        return self.height, self.width

    def fixed_size(self, size: Size | None) -> Size:
        return self.height, self.width

    def move_boxes(self, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
        moved = boxes - np.array([self.left, self.top, self.left, self.top], np.float32)
        if self.keep == "centre":
            keep = centred(moved, (0, 0, self.width, self.height))
            return clip(moved[keep], (self.height, self.width)), keep
        return overlapping(moved, (self.height, self.width))

    def back(self, size: Size) -> Matrix:
        return 1.0, 0.0, float(self.left), 0.0, 1.0, float(self.top)


@dataclass(frozen=True, kw_only=True)
class CenterCrop(Op):
    """Cuts height x width out of the middle. A smaller image is rejected, "too small".

    Where the margin is odd, `rounding` says which side gets the larger half: "nearest" rounds to
    the even number, as torchvision does; "down" gives it to the bottom and right, as MLPerf's
    inference does.
    """

    purpose = "remove"
    height: Length
    width: Length
    rounding: Literal["nearest", "down"] = "nearest"

    def expand(self, size: Size) -> tuple[Op, ...]:
        check_contains(self, size, (self.height, self.width))
        half = round if self.rounding == "nearest" else int
        top, left = half((size[0] - self.height) / 2), half((size[1] - self.width) / 2)
        return (Crop(top=top, left=left, height=self.height, width=self.width),)

    def fixed_size(self, size: Size | None) -> Size:
        return self.height, self.width


@dataclass(frozen=True, kw_only=True)
class Pad(Op):
    """Adds a border: a colour, or pixels of the image.

    reflect: mirrored without the edge pixel; symmetric: mirrored with it; edge: repeats it. In a
    border wider than the image the mirroring goes on, as in np.pad.
    """

    purpose = "neutral"
    top: Natural = 0
    left: Natural = 0
    bottom: Natural = 0
    right: Natural = 0
    fill: Colour = (0, 0, 0)
    mode: Literal["constant", "reflect", "symmetric", "edge"] = "constant"

    def output_size(self, size: Size) -> Size:
        height, width = size
        return self.top + height + self.bottom, self.left + width + self.right

    def smallest_size(self) -> Size:
        return self.output_size((1, 1))

    def move_boxes(self, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
        shift = np.array([self.left, self.top, self.left, self.top], np.float32)
        return boxes + shift, np.arange(len(boxes))

    def back(self, size: Size) -> Matrix:
        return 1.0, 0.0, -float(self.left), 0.0, 1.0, -float(self.top)


@dataclass(frozen=True, kw_only=True)
class PadTo(Op):
    """Pads at the bottom and right up to height x width; a larger image stays as it is."""

    purpose = "neutral"
    height: Length
    width: Length
    fill: Colour = (0, 0, 0)

    def expand(self, size: Size) -> tuple[Op, ...]:
        bottom, right = max(0, self.height - size[0]), max(0, self.width - size[1])
        return (Pad(bottom=bottom, right=right, fill=self.fill),) if bottom or right else ()

    def smallest_size(self) -> Size:
        return self.height, self.width


@dataclass(frozen=True, kw_only=True)
class Flip(Op):
    """Mirrors: "horizontal" swaps left and right, "vertical" top and bottom."""

    purpose = "augment"
    axis: Literal["horizontal", "vertical"] = "horizontal"

    def move_boxes(self, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
        moved = boxes.copy()
        first, length = (0, size[1]) if self.axis == "horizontal" else (1, size[0])
        moved[:, first] = length - boxes[:, first + 2]
        moved[:, first + 2] = length - boxes[:, first]
        return moved, np.arange(len(boxes))

    def back(self, size: Size) -> Matrix:
        if self.axis == "horizontal":
            return -1.0, 0.0, float(size[1]), 0.0, 1.0, 0.0
        return 1.0, 0.0, 0.0, 0.0, -1.0, float(size[0])


def _can_be_inverted(matrix: Matrix) -> bool:
    a, b, _, d, e, _ = matrix
    return all(map(math.isfinite, matrix)) and abs(a * e - b * d) >= 1e-9


@dataclass(frozen=True, kw_only=True)
class Affine(Op):
    """Maps point (x, y) to (a x + b y + c, d x + e y + f), bilinear. The size stays.

    Pixels from outside the image are `fill`. Boxes become the upright boxes around their mapped
    corners.
    """

    purpose = "augment"
    matrix: Annotated[
        Matrix,
        Bound(
            _can_be_inverted,
            "six finite numbers a to f with a*e - b*d not 0: "
            "a matrix that cannot be inverted maps no image",
        ),
    ]
    fill: Colour = (0, 0, 0)

    def move_boxes(self, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
        return overlapping(around(self.matrix, boxes), size)

    def back(self, size: Size) -> Matrix:
        return inverted(self.matrix)


def affine_matrix(
    size: Size, *, angle: float, shear: float, scale: float, shift: tuple[float, float]
) -> Matrix:
    """The matrix that shears in x, rotates and scales about the centre of `size`, then shifts.

    Args:
        angle: radians, clockwise as seen.
        shear: radians.
        shift: (x, y) in pixels.
    """
    cos, sin, tan = math.cos(angle) * scale, math.sin(angle) * scale, math.tan(shear)
    a, b, d, e = cos, -cos * tan - sin, sin, -sin * tan + cos
    x, y = size[1] / 2, size[0] / 2
    return a, b, x + shift[0] - a * x - b * y, d, e, y + shift[1] - d * x - e * y
