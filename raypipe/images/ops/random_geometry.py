"""Random ops that choose which part of an image is seen, how large, and where."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from raypipe.images.header import MAX_PIXELS
from raypipe.images.ops.boxes import centred, iou
from raypipe.images.ops.geometry import (
    Affine,
    CenterCrop,
    Crop,
    Pad,
    PadTo,
    Resize,
    ShortSide,
    affine_matrix,
)
from raypipe.images.ops.op import (
    Bound,
    Colour,
    Length,
    Op,
    PositiveRange,
    Probability,
    RandomOp,
    Range,
    Size,
    check_contains,
    each,
    rising,
    within,
)

_MEAN_COLOUR = (123, 117, 104)  # ImageNet's


@dataclass(frozen=True, kw_only=True)
class RandomCrop(RandomOp):
    """Cuts out height x width at a random place. A smaller image is rejected, "too small"."""

    purpose = "augment"
    height: Length
    width: Length

    def sample(self, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Op, ...]:
        check_contains(self, size, (self.height, self.width))
        top = int(rng.integers(size[0] - self.height + 1))
        left = int(rng.integers(size[1] - self.width + 1))
        return (Crop(top=top, left=left, height=self.height, width=self.width),)

    def fixed_size(self, size: Size | None) -> Size:
        return self.height, self.width

    def without_chance(self) -> tuple[Op, ...]:
        return (CenterCrop(height=self.height, width=self.width),)


@dataclass(frozen=True, kw_only=True)
class ZoomOut(RandomOp):
    """With probability `p` places the image at random on a larger canvas, filled with a colour.

    `scale`: the canvas' sides, in sides of the image.
    """

    purpose = "augment"
    scale: Annotated[Range, rising(1)] = (1.0, 4.0)
    fill: Colour = _MEAN_COLOUR
    p: Probability = 0.5

    def sample(self, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Op, ...]:
        if rng.random() >= self.p:
            return ()
        scale = rng.uniform(*self.scale)
        extra_y, extra_x = int(size[0] * scale) - size[0], int(size[1] * scale) - size[1]
        top, left = int(extra_y * rng.random()), int(extra_x * rng.random())
        return (
            Pad(top=top, left=left, bottom=extra_y - top, right=extra_x - left, fill=self.fill),
        )

    def smallest_size(self) -> Size:
        return (int(self.scale[0]), int(self.scale[0])) if self.p == 1 else (1, 1)

    def largest_size(self, size: Size) -> Size:
        return int(size[0] * self.scale[1]), int(size[1] * self.scale[1])


# "No crop" ends the search. 1000 draws without it have a chance of (6/7)^1000 = 1e-67.
_ROUNDS = 1000
_TRIES = {"mlperf": 1, "torchvision": 40}
_MODES = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)


@dataclass(frozen=True, kw_only=True)
class IoUCrop(RandomOp):
    """The SSD paper's crop: a random part that overlaps the boxes enough.

    Boxes with their centre in it stay, clipped. One of seven modes is drawn, all equally likely: no
    crop; a minimal IoU of .1, .3, .5, .7 or .9; any crop. Sides are .3 to 1 of the image's.

    There are two flavours:

    - "mlperf" (NVIDIA's SSD): ALL boxes must pass the IoU test. The ratio of the two shares is
      within 1/2..2. One try a mode.
    - "torchvision": the best of the boxes that stay must pass. The ratio of the crop's sides is
      within 1/2..2. 40 tries a mode.

    After that a new mode is drawn. Coordinates are rounded to pixels before the test.
    """

    purpose = "augment"
    flavour: Literal["mlperf", "torchvision"] = "torchvision"

    def sample(self, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Op, ...]:
        if not len(boxes):  # no crop contains a box's centre: only "no crop" would end the search
            return ()
        for _ in range(_ROUNDS):
            least = _MODES[rng.integers(len(_MODES))]
            if least is None:
                return ()
            for _ in range(_TRIES[self.flavour]):
                crop = _random_part(rng, size, self.flavour)
                if crop is not None and _overlaps_enough(crop, boxes, least, self.flavour):
                    return (crop,)
        return ()


def _random_part(rng: np.random.Generator, size: Size, flavour: str) -> Crop | None:
    part_y, part_x, at_y, at_x = rng.random(4).tolist()
    part_y, part_x = 0.3 + 0.7 * part_y, 0.3 + 0.7 * part_x
    height, width = int(size[0] * part_y), int(size[1] * part_x)
    if not height or not width:
        return None
    if not 0.5 <= (part_x / part_y if flavour == "mlperf" else width / height) <= 2:
        return None
    top, left = int((size[0] - height) * at_y), int((size[1] - width) * at_x)
    return Crop(top=top, left=left, height=height, width=width, keep="centre")


def _overlaps_enough(crop: Crop, boxes: np.ndarray, least: float, flavour: str) -> bool:
    region = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    inside = centred(boxes, region)
    if not len(inside):
        return False
    if flavour == "torchvision":
        return bool(iou(boxes[inside], region).max() >= least)
    return bool((iou(boxes, region) > least).all()) if least else True


@dataclass(frozen=True, kw_only=True)
class MultiScale(RandomOp):
    """Resizes, keeping the proportions: the short side becomes a random one of `sizes`.

    The long side stays within `long`.
    """

    purpose = "augment"
    sizes: Annotated[
        tuple[int, ...],
        Bound(
            lambda sizes: bool(sizes) and min(sizes) >= 1, "one or more lengths of at least 1 pixel"
        ),
    ]
    long: Length
    antialias: bool = True

    def sample(self, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Op, ...]:
        height, width = self._resized(size, self.sizes[rng.integers(len(self.sizes))])
        return (Resize(height=height, width=width, antialias=self.antialias),)

    def _resized(self, size: Size, short: int) -> Size:
        scale = min(short / min(size), self.long / max(size))
        return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))

    def smallest_size(self) -> Size:
        side = min(*self.sizes, self.long)
        return side, side

    def largest_size(self, size: Size) -> Size:
        return self._resized(size, max(self.sizes))

    def without_chance(self) -> tuple[Op, ...]:
        return (ShortSide(short=max(self.sizes), long=self.long, antialias=self.antialias),)


@dataclass(frozen=True, kw_only=True)
class LargeScaleJitter(RandomOp):
    """Resizes to fit height x width, times a random `scale`; then cuts or pads to that size.

    The cut is at a random place, the padding at the bottom and right.
    """

    purpose = "augment"
    height: Length = 1024
    width: Length = 1024
    scale: PositiveRange = (0.1, 2.0)
    fill: Colour = _MEAN_COLOUR
    antialias: bool = True

    def sample(self, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Op, ...]:
        scale = min(self.height / size[0], self.width / size[1]) * rng.uniform(*self.scale)
        height, width = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
        ops: list[Op] = [Resize(height=height, width=width, antialias=self.antialias)]
        at = rng.random()
        top, left = int(max(0, height - self.height) * at), int(max(0, width - self.width) * at)
        inside = (min(height, self.height), min(width, self.width))
        if inside != (height, width):
            ops.append(Crop(top=top, left=left, height=inside[0], width=inside[1]))
        if inside != (self.height, self.width):
            bottom, right = self.height - inside[0], self.width - inside[1]
            ops.append(Pad(bottom=bottom, right=right, fill=self.fill))
        return tuple(ops)

    def fixed_size(self, size: Size | None) -> Size:
        return self.height, self.width

    def without_chance(self) -> tuple[Op, ...]:
        if self.height != self.width:
            return (Resize(height=self.height, width=self.width, antialias=self.antialias),)
        return (
            ShortSide(short=self.height, long=self.height, antialias=self.antialias),
            PadTo(height=self.height, width=self.width, fill=self.fill),
        )


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop(RandomOp):
    """Cuts out a random part and stretches it to height x width, as torchvision's does.

    `scale`: the part's share of the image's area. `ratio`: its width over its height, drawn evenly
    in the logarithm. After ten parts that do not fit, it is the middle, with the ratio nearest to
    the image's own.
    """

    purpose = "augment"
    height: Length = 224
    width: Length = 224
    scale: Annotated[Range, rising(1e-6)] = (0.08, 1.0)
    ratio: PositiveRange = (3 / 4, 4 / 3)
    antialias: bool = True

    def sample(self, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Op, ...]:
        part = self._part(rng, size)
        return part, Resize(height=self.height, width=self.width, antialias=self.antialias)

    def _part(self, rng: np.random.Generator, size: Size) -> Crop:
        for _ in range(10):
            area = size[0] * size[1] * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= size[1] and 0 < height <= size[0]:
                top = int(rng.integers(size[0] - height + 1))
                left = int(rng.integers(size[1] - width + 1))
                return Crop(top=top, left=left, height=height, width=width)
        return _middle(size, self.ratio)

    def fixed_size(self, size: Size | None) -> Size:
        return self.height, self.width

    def without_chance(self) -> tuple[Op, ...]:
        """Seven eighths of the middle, as ImageNet is judged."""
        short = math.ceil(max(self.height, self.width) * 8 / 7)
        return (
            ShortSide(short=short, long=MAX_PIXELS, antialias=self.antialias),
            CenterCrop(height=self.height, width=self.width),
        )


def _middle(size: Size, ratio: Range) -> Crop:
    """The largest middle part whose width over its height is within `ratio`."""
    (height, width), own = size, size[1] / size[0]
    if own < ratio[0]:
        height = max(1, round(width / ratio[0]))
    elif own > ratio[1]:
        width = max(1, round(height * ratio[1]))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return Crop(top=top, left=left, height=height, width=width)


@dataclass(frozen=True, kw_only=True)
class RandomAffine(RandomOp):
    """Rotates, shifts, scales and shears about the image's centre.

    Shifts and angles are drawn up to these limits, in either direction. `translate`: shares of
    (width, height). `shear`: in x, in degrees. RandomAffine(degrees=10) is a random rotation.
    """

    purpose = "augment"
    keeps_size = True
    degrees: Annotated[float, within(0, 180)] = 0.0
    translate: Annotated[
        Range, each(within(0, 1), "two shares of the image's width and height, 0 to 1")
    ] = (0.0, 0.0)
    scale: PositiveRange = (1.0, 1.0)
    shear: Annotated[float, within(0, 80)] = 0.0
    fill: Colour = (0, 0, 0)

    def sample(self, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Op, ...]:
        angle, shear = (
            math.radians(rng.uniform(-most, most)) for most in (self.degrees, self.shear)
        )
        shift_x = round(rng.uniform(-1, 1) * self.translate[0] * size[1])
        shift_y = round(rng.uniform(-1, 1) * self.translate[1] * size[0])
        scale = rng.uniform(*self.scale)
        matrix = affine_matrix(
            size, angle=angle, shear=shear, scale=scale, shift=(shift_x, shift_y)
        )
        return (Affine(matrix=matrix, fill=self.fill),)
