"""Random flips, colours, noise and erasing, and the plain ops that only they become."""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from raypipe.images.ops.colour import Brightness, Contrast, Hue, Permute, Saturation
from raypipe.images.ops.geometry import Flip
from raypipe.images.ops.op import (
    Colour,
    Natural,
    NonNegative,
    NonNegativeRange,
    Op,
    PositiveRange,
    Probability,
    RandomOp,
    Range,
    Size,
    check_contains,
    rising,
    within,
)


@dataclass(frozen=True, kw_only=True)
class HorizontalFlip(RandomOp):
    """Mirrors left and right with probability `p`."""

    purpose = "augment"
    keeps_size = True
    p: Probability = 0.5

    def sample(self, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Op, ...]:
        return (Flip(axis="horizontal"),) if rng.random() < self.p else ()


@dataclass(frozen=True, kw_only=True)
class VerticalFlip(RandomOp):
    """Mirrors top and bottom with probability `p`."""

    purpose = "augment"
    keeps_size = True
    p: Probability = 0.5

    def sample(self, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Op, ...]:
        return (Flip(axis="vertical"),) if rng.random() < self.p else ()


# ------------------------------------------------------------------------------------------ colour


@dataclass(frozen=True, kw_only=True)
class ColorJitter(RandomOp):
    """Changes brightness, contrast, saturation and hue, in random order.

    Factors are drawn from [1-x, 1+x], the shift of the hue from [-x, x].
    """

    purpose = "augment"
    keeps_size = True
    brightness: NonNegative = 0.0
    contrast: NonNegative = 0.0
    saturation: NonNegative = 0.0
    hue: Annotated[float, within(0, 0.5)] = 0.0

    def sample(self, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Op, ...]:
        def factor(spread: float) -> float:
            return rng.uniform(max(0.0, 1 - spread), 1 + spread)

        changes: list[Op] = []
        if self.brightness:
            changes.append(Brightness(factor=factor(self.brightness)))
        if self.contrast:
            changes.append(Contrast(factor=factor(self.contrast)))
        if self.saturation:
            changes.append(Saturation(factor=factor(self.saturation)))
        if self.hue:
            changes.append(Hue(shift=rng.uniform(-self.hue, self.hue)))
        return tuple(changes[i] for i in rng.permutation(len(changes)))


@dataclass(frozen=True, kw_only=True)
class PhotometricDistort(RandomOp):
    """The SSD paper's colour changes, each with probability `p`.

    Contrast comes before or after the others; last, the channels are permuted.
    """

    purpose = "augment"
    keeps_size = True
    brightness: NonNegativeRange = (0.875, 1.125)
    contrast: NonNegativeRange = (0.5, 1.5)
    saturation: NonNegativeRange = (0.5, 1.5)
    hue: Annotated[Range, rising(-0.5)] = (-0.05, 0.05)
    p: Probability = 0.5

    def sample(self, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Op, ...]:
        contrast_first = rng.random() < 0.5
        does_brightness, does_contrast, does_saturation, does_hue, does_permute = (
            rng.random(5) < self.p
        )
        contrast = [Contrast(factor=rng.uniform(*self.contrast))] if does_contrast else []
        changes: list[Op] = []
        if does_brightness:
            changes.append(Brightness(factor=rng.uniform(*self.brightness)))
        if contrast_first:
            changes += contrast
        if does_saturation:
            changes.append(Saturation(factor=rng.uniform(*self.saturation)))
        if does_hue:
            changes.append(Hue(shift=rng.uniform(*self.hue)))
        if not contrast_first:
            changes += contrast
        if does_permute:
            first, second, third = (int(channel) for channel in rng.permutation(3))
            changes.append(Permute(order=(first, second, third)))
        return tuple(changes)


@dataclass(frozen=True, kw_only=True)
class AddNoise(Op):
    """Adds Gaussian noise of `sigma` counts, drawn from `seed`: the same noise on each backend."""

    purpose = "augment"
    sigma: NonNegative
    seed: Natural

    def noise(self, size: Size) -> np.ndarray:
        """What the backends add, float32 (height, width, 3)."""
        rng = np.random.Generator(np.random.Philox(key=self.seed))
        return rng.standard_normal((*size, 3), np.float32) * np.float32(self.sigma)


@dataclass(frozen=True, kw_only=True)
class Noise(RandomOp):
    """Adds Gaussian noise, with a `sigma` in counts drawn from a range."""

    purpose = "augment"
    keeps_size = True
    sigma: NonNegativeRange = (0.0, 10.0)

    def sample(self, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Op, ...]:
        return (AddNoise(sigma=rng.uniform(*self.sigma), seed=int(rng.integers(2**63))),)


@dataclass(frozen=True, kw_only=True)
class Erase(Op):
    """Fills a rectangle inside the image with a colour. Boxes stay."""

    purpose = "augment"
    top: Natural
    left: Natural
    height: Natural
    width: Natural
    fill: Colour = (0, 0, 0)

    def output_size(self, size: Size) -> Size:
        check_contains(self, size, (self.height, self.width), (self.top, self.left))
        return size


@dataclass(frozen=True, kw_only=True)
class Erasing(RandomOp):
    """With probability `p` fills a random rectangle.

    `area`: as a share of the image's area. `ratio`: height / width.
    """

    purpose = "augment"
    keeps_size = True
    p: Probability = 0.5
    area: NonNegativeRange = (0.02, 0.33)
    ratio: PositiveRange = (0.3, 3.3)
    fill: Colour = (0, 0, 0)

    def sample(self, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Op, ...]:
        if rng.random() >= self.p:
            return ()
        for _ in range(10):
            area = size[0] * size[1] * rng.uniform(*self.area)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < height < size[0] and 0 < width < size[1]:
                top = int(rng.integers(size[0] - height + 1))
                left = int(rng.integers(size[1] - width + 1))
                return (Erase(top=top, left=left, height=height, width=width, fill=self.fill),)
        return ()
