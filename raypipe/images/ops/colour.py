"""Ops that change each pixel's colour by its value, or by the image's histogram."""

from dataclasses import dataclass
from typing import Annotated

from raypipe.images.ops.op import Bound, NonNegative, Op, at_least, within


@dataclass(frozen=True, kw_only=True)
class Brightness(Op):
    """Multiplies by `factor`: 0 black, 1 unchanged."""

    purpose = "augment"
    factor: NonNegative


@dataclass(frozen=True, kw_only=True)
class Contrast(Op):
    """Scales the distance from the image's mean grey by `factor`: 0 all grey, 1 unchanged."""

    purpose = "emphasise"
    factor: NonNegative


@dataclass(frozen=True, kw_only=True)
class Saturation(Op):
    """Scales each pixel's distance from its own grey by `factor`: 0 greyscale, 1 unchanged."""

    purpose = "augment"
    factor: NonNegative


@dataclass(frozen=True, kw_only=True)
class Hue(Op):
    """Turns the hue by `shift` of the circle, -0.5 to 0.5."""

    purpose = "augment"
    shift: Annotated[float, within(-0.5, 0.5)]


@dataclass(frozen=True, kw_only=True)
class Permute(Op):
    """Reorders the channels: channel i becomes the old order[i]. (2, 1, 0) swaps red and blue."""

    purpose = "augment"
    order: Annotated[
        tuple[int, int, int],
        Bound(lambda order: sorted(order) == [0, 1, 2], "the channels 0, 1 and 2, in any order"),
    ]


@dataclass(frozen=True, kw_only=True)
class Greyscale(Op):
    """Luma in all three channels."""

    purpose = "emphasise"


@dataclass(frozen=True, kw_only=True)
class Gamma(Op):
    """255 * gain * (value / 255) ** gamma: below 1 lightens shadows, above 1 darkens them."""

    purpose = "emphasise"
    gamma: NonNegative
    gain: NonNegative = 1.0


@dataclass(frozen=True, kw_only=True)
class Equalize(Op):
    """Flattens the histogram of each channel, as Pillow does."""

    purpose = "emphasise"


@dataclass(frozen=True, kw_only=True)
class AutoContrast(Op):
    """Stretches each channel to 0..255."""

    purpose = "emphasise"


@dataclass(frozen=True, kw_only=True)
class CLAHE(Op):
    """Contrast-limited adaptive histogram equalisation of the lightness (Lab). OpenCV only.

    `tiles`: the image is divided into tiles x tiles regions, each with its own histogram.
    """

    purpose = "emphasise"
    clip_limit: NonNegative = 2.0
    tiles: Annotated[int, at_least(1)] = 8
