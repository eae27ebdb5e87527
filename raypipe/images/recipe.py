"""What is done to an image, as data: operations, recipes made of them, and plans made from recipes.

A recipe is a list of ops. For one image it becomes a `Plan`: a list of *plain* ops with every number in it. Random ops are drawn
there (`sample`), from (seed, epoch, image id) and nothing else; so it does not matter which worker does an image, on which
backend, or how often. Backends know plain ops only, and whoever reads a plan sees all that happens to the image.

Conventions, everywhere: a size is (height, width). Boxes are float32 of shape (n, 4), x1 y1 x2 y2, in pixels of the image as it
is at that point, edges not pixel centres: (0, 0, width, height) is the whole image. Colours are RGB, 0..255.

Every op says what it is for (`purpose`): "emphasise" what matters to the model, "remove" what does not, "augment" the data set,
or "neutral".

Own ops: write a frozen dataclass with a `purpose`, and register what differs from the defaults:

    @dataclass(frozen=True, kw_only=True)
    class Invert:
        purpose: ClassVar[str] = "augment"

    @opencv.apply.register
    def _(op: Invert, image, out=None):
        return 255 - image

`output_size`, `move_boxes` and `back` are registered likewise if the op changes geometry; a random op registers `sample` and sets
`random: ClassVar[bool] = True`. In JSON its name is "package.module:Invert".
"""

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from raypipe.errors import UsageError, foreign, shown
from raypipe.images.decode import MAX_PIXELS, Reject
from raypipe.images.frames import sound
from raypipe.images.own import imported

Size = tuple[int, int]
Colour = tuple[int, int, int]
Range = tuple[float, float]
Matrix = tuple[float, float, float, float, float, float]

UNMOVED: Matrix = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

NO_BOXES = np.zeros((0, 4), np.float32)
PURPOSES = ("emphasise", "remove", "augment", "neutral")

# ---------------------------------------------------------------------------------------------------------------- plain ops


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Stretches to height x width, bilinear.

    `antialias=False` is cv2.INTER_LINEAR: it skips source pixels when it shrinks more than twice. `antialias=True` averages over
    all of them (triangle filter) as Pillow and torchvision do; enlarging, both are the same. `area=True` is cv2.INTER_AREA: the
    mean of what a new pixel covers.

    `arithmetic`: "uint8" weighs with 11 bits, as OpenCV and Pillow do with images of bytes; "float" makes them float32 first, as
    MLPerf's inference does, for plain bilinear. `rounding`, of float: to the "nearest" byte, or "down", which cuts off.
    """

    purpose: ClassVar[str] = "remove"
    height: int
    width: int
    antialias: bool = False
    area: bool = False
    arithmetic: Literal["uint8", "float"] = "uint8"
    rounding: Literal["nearest", "down"] = "nearest"

    def __post_init__(self) -> None:
        _at_least(self, 1, "height", "width")
        _one_filter(self)
        if self.arithmetic == "float" and (self.antialias or self.area):
            raise UsageError(
                "arithmetic 'float' is for plain bilinear; leave out antialias and area"
            )
        if self.rounding == "down" and self.arithmetic != "float":
            raise UsageError(
                "rounding 'down' is for arithmetic 'float'; bytes are rounded to the nearest"
            )


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Cuts out a rectangle, which must lie inside the image (else the image is rejected, "too small").

    Of the boxes, `keep` says which stay: those that overlap it, or those with their centre in it. They are clipped to it.
    """

    purpose: ClassVar[str] = "remove"
    top: int
    left: int
    height: int
    width: int
    keep: Literal["overlap", "centre"] = "overlap"

    def __post_init__(self) -> None:
        _at_least(self, 0, "top", "left")
        _at_least(self, 1, "height", "width")


@dataclass(frozen=True, kw_only=True)
class Flip:
    """Mirrors: "horizontal" swaps left and right, "vertical" top and bottom."""

    purpose: ClassVar[str] = "augment"
    axis: Literal["horizontal", "vertical"] = "horizontal"


@dataclass(frozen=True, kw_only=True)
class Pad:
    """Adds a border: a colour, or the image itself (reflect: without the edge pixel; symmetric: with it; edge: its repetition).

    A border that is wider than the image goes on back and forth, as np.pad.
    """

    purpose: ClassVar[str] = "neutral"
    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0
    fill: Colour = (0, 0, 0)
    mode: Literal["constant", "reflect", "symmetric", "edge"] = "constant"

    def __post_init__(self) -> None:
        _at_least(self, 0, "top", "left", "bottom", "right")
        _colour(self)


@dataclass(frozen=True, kw_only=True)
class Affine:
    """Maps point (x, y) to (a x + b y + c, d x + e y + f), bilinear; outside the image is `fill`. The size stays.

    Boxes become the upright boxes around their mapped corners.
    """

    purpose: ClassVar[str] = "augment"
    matrix: Matrix
    fill: Colour = (0, 0, 0)

    def __post_init__(self) -> None:
        a, b, _, d, e, _ = self.matrix
        if not all(map(math.isfinite, self.matrix)) or abs(a * e - b * d) < 1e-9:
            raise UsageError(
                f"matrix {self.matrix} cannot be inverted, so it maps no image; a*e - b*d must not be 0"
            )
        _colour(self)


@dataclass(frozen=True, kw_only=True)
class Brightness:
    """Multiplies by `factor`: 0 black, 1 unchanged."""

    purpose: ClassVar[str] = "augment"
    factor: float

    def __post_init__(self) -> None:
        _at_least(self, 0, "factor")


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Moves away from the image's mean grey by `factor`: 0 all grey, 1 unchanged."""

    purpose: ClassVar[str] = "emphasise"
    factor: float

    def __post_init__(self) -> None:
        _at_least(self, 0, "factor")


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """Moves each pixel away from its own grey by `factor`: 0 greyscale, 1 unchanged."""

    purpose: ClassVar[str] = "augment"
    factor: float

    def __post_init__(self) -> None:
        _at_least(self, 0, "factor")


@dataclass(frozen=True, kw_only=True)
class Hue:
    """Turns the hue by `shift` of the circle, -0.5..0.5."""

    purpose: ClassVar[str] = "augment"
    shift: float

    def __post_init__(self) -> None:
        _within(self, -0.5, 0.5, "shift")


@dataclass(frozen=True, kw_only=True)
class Permute:
    """Reorders the channels: the new ones are the old ones at these positions. (2, 1, 0) swaps red and blue."""

    purpose: ClassVar[str] = "augment"
    order: tuple[int, int, int]

    def __post_init__(self) -> None:
        if sorted(self.order) != [0, 1, 2]:
            raise UsageError(f"order {self.order} is not an order of the channels 0, 1 and 2")


@dataclass(frozen=True, kw_only=True)
class Greyscale:
    """Luma in all three channels."""

    purpose: ClassVar[str] = "emphasise"


@dataclass(frozen=True, kw_only=True)
class Gamma:
    """255 * gain * (value / 255) ** gamma: below 1 lightens shadows, above 1 darkens them."""

    purpose: ClassVar[str] = "emphasise"
    gamma: float
    gain: float = 1.0

    def __post_init__(self) -> None:
        _at_least(self, 0, "gamma", "gain")


@dataclass(frozen=True, kw_only=True)
class Equalize:
    """Flattens the histogram of each channel, as Pillow does."""

    purpose: ClassVar[str] = "emphasise"


@dataclass(frozen=True, kw_only=True)
class AutoContrast:
    """Stretches each channel to 0..255."""

    purpose: ClassVar[str] = "emphasise"


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """Moves away from a slightly blurred image by `factor`: 0 that image, 1 unchanged, 2 sharper. The outermost pixels stay."""

    purpose: ClassVar[str] = "emphasise"
    factor: float

    def __post_init__(self) -> None:
        _at_least(self, 0, "factor")


@dataclass(frozen=True, kw_only=True)
class CLAHE:
    """Contrast-limited adaptive histogram equalisation of the lightness (Lab), in tiles x tiles regions. OpenCV only."""

    purpose: ClassVar[str] = "emphasise"
    clip_limit: float = 2.0
    tiles: int = 8

    def __post_init__(self) -> None:
        _at_least(self, 0, "clip_limit")
        _at_least(self, 1, "tiles")


@dataclass(frozen=True, kw_only=True)
class GaussianBlur:
    """`kernel` x `kernel` Gaussian; borders are reflected."""

    purpose: ClassVar[str] = "remove"
    kernel: int
    sigma: float

    def __post_init__(self) -> None:
        _odd(self)
        if not 0 < self.sigma < math.inf:
            raise UsageError(f"sigma must be above 0, not {self.sigma}")


@dataclass(frozen=True, kw_only=True)
class Median:
    """Median of kernel x kernel pixels: removes salt-and-pepper noise, keeps edges. OpenCV only."""

    purpose: ClassVar[str] = "remove"
    kernel: int = 3

    def __post_init__(self) -> None:
        _odd(self)


@dataclass(frozen=True, kw_only=True)
class Bilateral:
    """Averages near pixels of a similar colour: smooths areas, keeps edges. OpenCV only."""

    purpose: ClassVar[str] = "remove"
    diameter: int = 5
    sigma_colour: float = 50.0
    sigma_space: float = 50.0

    def __post_init__(self) -> None:
        _at_least(self, 1, "diameter")
        _at_least(self, 0, "sigma_colour", "sigma_space")


@dataclass(frozen=True, kw_only=True)
class NonLocalMeans:
    """Averages similar patches: the strongest of these denoisers, and slow (hundreds of ms an image). OpenCV only."""

    purpose: ClassVar[str] = "remove"
    strength: float = 3.0
    colour_strength: float = 3.0
    patch: int = 7
    search: int = 21

    def __post_init__(self) -> None:
        _at_least(self, 0, "strength", "colour_strength")
        _at_least(self, 1, "patch", "search")


@dataclass(frozen=True, kw_only=True)
class AddNoise:
    """Adds Gaussian noise of `sigma` counts, drawn from `seed`: the same noise on either backend."""

    purpose: ClassVar[str] = "augment"
    sigma: float
    seed: int

    def __post_init__(self) -> None:
        _at_least(self, 0, "sigma", "seed")


@dataclass(frozen=True, kw_only=True)
class Erase:
    """Fills a rectangle inside the image with a colour. Boxes stay."""

    purpose: ClassVar[str] = "augment"
    top: int
    left: int
    height: int
    width: int
    fill: Colour = (0, 0, 0)

    def __post_init__(self) -> None:
        _at_least(self, 0, "top", "left", "height", "width")
        _colour(self)


@dataclass(frozen=True, kw_only=True)
class SanitizeBoxes:
    """Drops boxes whose width or height is below `min_size` pixels. Pixels stay as they are."""

    purpose: ClassVar[str] = "remove"
    pixels: ClassVar[bool] = False
    min_size: float = 1.0

    def __post_init__(self) -> None:
        _at_least(self, 0, "min_size")


# ------------------------------------------------------------------- ops that depend on the image's size; drawn without chance


@dataclass(frozen=True, kw_only=True)
class ShortSide:
    """Resizes, keeping the proportions: the short side becomes `short`, unless the long one would exceed `long`.

    Rounded as MLPerf's Mask R-CNN does. `antialias`, `area`: as Resize has them.
    """

    purpose: ClassVar[str] = "remove"
    short: int
    long: int
    antialias: bool = True
    area: bool = False

    def __post_init__(self) -> None:
        _at_least(self, 1, "short", "long")
        _one_filter(self)


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """Cuts height x width out of the middle. A smaller image is rejected, "too small".

    Where what is left over is odd, the larger half of it is by `rounding` on either side ("nearest": to the even number, as
    torchvision), or at the bottom and right ("down", as MLPerf's inference).
    """

    purpose: ClassVar[str] = "remove"
    height: int
    width: int
    rounding: Literal["nearest", "down"] = "nearest"

    def __post_init__(self) -> None:
        _at_least(self, 1, "height", "width")


@dataclass(frozen=True, kw_only=True)
class PadTo:
    """Pads at the bottom and right up to height x width; a larger image stays as it is."""

    purpose: ClassVar[str] = "neutral"
    height: int
    width: int
    fill: Colour = (0, 0, 0)

    def __post_init__(self) -> None:
        _at_least(self, 1, "height", "width")
        _colour(self)


# --------------------------------------------------------------------------------------------------------------- random ops


@dataclass(frozen=True, kw_only=True)
class HorizontalFlip:
    """Mirrors left and right with probability `p`."""

    purpose: ClassVar[str] = "augment"
    random: ClassVar[bool] = True
    p: float = 0.5

    def __post_init__(self) -> None:
        _within(self, 0, 1, "p")


@dataclass(frozen=True, kw_only=True)
class VerticalFlip:
    """Mirrors top and bottom with probability `p`."""

    purpose: ClassVar[str] = "augment"
    random: ClassVar[bool] = True
    p: float = 0.5

    def __post_init__(self) -> None:
        _within(self, 0, 1, "p")


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Changes brightness, contrast, saturation (factors from [1-x, 1+x]) and hue (shift from [-x, x]), in random order."""

    purpose: ClassVar[str] = "augment"
    random: ClassVar[bool] = True
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        _at_least(self, 0, "brightness", "contrast", "saturation")
        _within(self, 0, 0.5, "hue")


@dataclass(frozen=True, kw_only=True)
class PhotometricDistort:
    """The SSD paper's colour changes: each with probability `p`; contrast before or after the others; channels permuted."""

    purpose: ClassVar[str] = "augment"
    random: ClassVar[bool] = True
    brightness: Range = (0.875, 1.125)
    contrast: Range = (0.5, 1.5)
    saturation: Range = (0.5, 1.5)
    hue: Range = (-0.05, 0.05)
    p: float = 0.5

    def __post_init__(self) -> None:
        _ranges(self, "brightness", "contrast", "saturation", low=0)
        _ranges(self, "hue", low=-0.5)
        _within(self, 0, 1, "p")


@dataclass(frozen=True, kw_only=True)
class ZoomOut:
    """With probability `p` puts the image somewhere on a canvas `scale` times its sides, filled with a colour."""

    purpose: ClassVar[str] = "augment"
    random: ClassVar[bool] = True
    scale: Range = (1.0, 4.0)
    fill: Colour = (123, 117, 104)
    p: float = 0.5

    def __post_init__(self) -> None:
        _ranges(self, "scale", low=1)
        _colour(self)
        _within(self, 0, 1, "p")


@dataclass(frozen=True, kw_only=True)
class IoUCrop:
    """The SSD paper's crop: a random part that overlaps the boxes enough. Boxes with their centre in it stay, clipped.

    One of seven equally likely modes: no crop; a minimal IoU of .1 .3 .5 .7 .9; any crop. Sides are .3 to 1 of the image's.
    Two flavours. "mlperf" (NVIDIA's SSD): ALL boxes must pass the IoU test, the ratio of the two shares is within 1/2..2, one
    try a mode. "torchvision": the best of the boxes that stay must pass, the crop's sides are within 1/2..2, 40 tries a mode.
    After that a new mode is drawn; "no crop" ends it. Coordinates are rounded to pixels before the test.
    """

    purpose: ClassVar[str] = "augment"
    random: ClassVar[bool] = True
    flavour: Literal["mlperf", "torchvision"] = "torchvision"


@dataclass(frozen=True, kw_only=True)
class MultiScale:
    """Resizes, keeping the proportions, to a random one of `sizes` for the short side; the long one stays within `long`."""

    purpose: ClassVar[str] = "augment"
    random: ClassVar[bool] = True
    sizes: tuple[int, ...]
    long: int
    antialias: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 1, "long")
        if not self.sizes or min(self.sizes) < 1:
            raise UsageError(f"sizes {self.sizes} must be one or more lengths of at least 1 pixel")


@dataclass(frozen=True, kw_only=True)
class LargeScaleJitter:
    """Resizes to fit height x width, times a random `scale`; then cuts at a random place, or pads, to exactly that size."""

    purpose: ClassVar[str] = "augment"
    random: ClassVar[bool] = True
    height: int = 1024
    width: int = 1024
    scale: Range = (0.1, 2.0)
    fill: Colour = (123, 117, 104)
    antialias: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 1, "height", "width")
        _ranges(self, "scale", low=0.001)
        _colour(self)


@dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """Cuts out height x width at a random place. A smaller image is rejected, "too small"."""

    purpose: ClassVar[str] = "augment"
    random: ClassVar[bool] = True
    height: int
    width: int

    def __post_init__(self) -> None:
        _at_least(self, 1, "height", "width")


@dataclass(frozen=True, kw_only=True)
class RandomAffine:
    """Turns by up to `degrees`, shifts by up to `translate` of (width, height), scales, and shears by up to `shear` degrees in x.

    About the image's centre. RandomAffine(degrees=10) is a random rotation.
    """

    purpose: ClassVar[str] = "augment"
    random: ClassVar[bool] = True
    degrees: float = 0.0
    translate: Range = (0.0, 0.0)
    scale: Range = (1.0, 1.0)
    shear: float = 0.0
    fill: Colour = (0, 0, 0)

    def __post_init__(self) -> None:
        _within(self, 0, 180, "degrees")
        _within(self, 0, 80, "shear")
        _ranges(self, "scale", low=0.001)
        if not all(0 <= part <= 1 for part in self.translate):
            raise UsageError(
                f"translate {self.translate} must be two parts of the image's width and height, 0 to 1"
            )
        _colour(self)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Adds Gaussian noise, with a `sigma` in counts drawn from a range."""

    purpose: ClassVar[str] = "augment"
    random: ClassVar[bool] = True
    sigma: Range = (0.0, 10.0)

    def __post_init__(self) -> None:
        _ranges(self, "sigma", low=0)


@dataclass(frozen=True, kw_only=True)
class Erasing:
    """With probability `p` fills a random rectangle: `area` of the image's area, `ratio` = height / width."""

    purpose: ClassVar[str] = "augment"
    random: ClassVar[bool] = True
    p: float = 0.5
    area: Range = (0.02, 0.33)
    ratio: Range = (0.3, 3.3)
    fill: Colour = (0, 0, 0)

    def __post_init__(self) -> None:
        _within(self, 0, 1, "p")
        _ranges(self, "area", low=0)
        _ranges(self, "ratio", low=0.001)
        _colour(self)


OPS: dict[str, type] = {
    op.__name__: op
    for op in (
        *(Contrast, Greyscale, Gamma, Equalize, AutoContrast, Sharpness, CLAHE),
        *(
            Resize,
            ShortSide,
            Crop,
            CenterCrop,
            GaussianBlur,
            Median,
            Bilateral,
            NonLocalMeans,
            SanitizeBoxes,
        ),
        *(
            HorizontalFlip,
            VerticalFlip,
            ColorJitter,
            PhotometricDistort,
            ZoomOut,
            IoUCrop,
            RandomCrop,
        ),
        *(MultiScale, LargeScaleJitter, RandomAffine, Noise, Erasing),
        *(Flip, Brightness, Saturation, Hue, Permute, Affine, AddNoise, Erase),
        *(Pad, PadTo),
    )
}
"""The built-in ops by the name they have in JSON."""


# ------------------------------------------------------------------------------------------------- what they do, without pixels


@functools.singledispatch
def sample(
    op: Any, rng: np.random.Generator | None, size: Size, boxes: np.ndarray
) -> tuple[Any, ...]:
    """The plain ops that `op` becomes for one image. `rng` is given to ops with `random = True`. May raise Reject."""
    return (op,)


@functools.singledispatch
def output_size(op: Any, size: Size) -> Size:
    """The size after a plain op on an image of `size`. By default the same. May raise Reject."""
    return size


@functools.singledispatch
def move_boxes(op: Any, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Where the boxes are after a plain op on an image of `size`; and which of them those are, as indices. By default all, unmoved."""
    return boxes, np.arange(len(boxes))


@functools.singledispatch
def back(op: Any, size: Size) -> Matrix:
    """Where the result of a plain op on an image of `size` comes from: (a, b, c, d, e, f) takes a point (x, y) of the result to the point
    (a x + b y + c, d x + e y + f) of that image. By default the same point. Raises UsageError for an op that moves boxes and does not say.
    """
    if move_boxes.dispatch(type(op)) is not move_boxes.dispatch(object):
        raise UsageError(
            f"{op} moves boxes, but not back: what a model finds could not be placed on the original image. Register a function with "
            f"raypipe.images.recipe.back."
        )
    return UNMOVED


@functools.singledispatch
def fixed_size(op: Any, size: Size | None) -> Size | None:
    """The size after any op, plain or not, if it is the same for all images; `size` is that before it, None where it varies."""
    if is_drawn(op):
        return None
    return None if size is None else output_size(op, size)


@output_size.register(Resize)
def _(op: Resize, size: Size) -> Size:
    return op.height, op.width


@move_boxes.register(Resize)
def _(op: Resize, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    y, x = op.height / size[0], op.width / size[1]
    return boxes * np.array([x, y, x, y], np.float32), np.arange(len(boxes))


@back.register(Resize)
def _(op: Resize, size: Size) -> Matrix:
    return size[1] / op.width, 0.0, 0.0, 0.0, size[0] / op.height, 0.0


@output_size.register(Crop)
def _(op: Crop, size: Size) -> Size:
    if op.top + op.height > size[0] or op.left + op.width > size[1]:
        raise Reject("too small", f"{size[0]}x{size[1]} (height x width) does not contain {op}")
    return op.height, op.width


@move_boxes.register(Crop)
def _(op: Crop, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    moved = boxes - np.array([op.left, op.top, op.left, op.top], np.float32)
    if op.keep == "centre":
        keep = _centred(moved, (0, 0, op.width, op.height))
        return clip(moved[keep], (op.height, op.width)), keep
    return _overlapping(moved, (op.height, op.width))


@back.register(Crop)
def _(op: Crop, size: Size) -> Matrix:
    return 1.0, 0.0, float(op.left), 0.0, 1.0, float(op.top)


@move_boxes.register(Flip)
def _(op: Flip, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    moved = boxes.copy()
    first, length = (0, size[1]) if op.axis == "horizontal" else (1, size[0])
    moved[:, first] = length - boxes[:, first + 2]
    moved[:, first + 2] = length - boxes[:, first]
    return moved, np.arange(len(boxes))


@back.register(Flip)
def _(op: Flip, size: Size) -> Matrix:
    return (
        (-1.0, 0.0, float(size[1]), 0.0, 1.0, 0.0)
        if op.axis == "horizontal"
        else (1.0, 0.0, 0.0, 0.0, -1.0, float(size[0]))
    )


@output_size.register(Pad)
def _(op: Pad, size: Size) -> Size:
    height, width = size
    return op.top + height + op.bottom, op.left + width + op.right


@move_boxes.register(Pad)
def _(op: Pad, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    return boxes + np.array([op.left, op.top, op.left, op.top], np.float32), np.arange(len(boxes))


@back.register(Pad)
def _(op: Pad, size: Size) -> Matrix:
    return 1.0, 0.0, -float(op.left), 0.0, 1.0, -float(op.top)


@move_boxes.register(Affine)
def _(op: Affine, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    return _overlapping(_around(op.matrix, boxes), size)


@back.register(Affine)
def _(op: Affine, size: Size) -> Matrix:
    return _inverted(op.matrix)


def _inverted(matrix: Matrix) -> Matrix:
    a, b, c, d, e, f = matrix
    by = a * e - b * d
    return e / by, -b / by, (b * f - c * e) / by, -d / by, a / by, (c * d - a * f) / by


@move_boxes.register(SanitizeBoxes)
def _(op: SanitizeBoxes, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    keep = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= op.min_size).all(axis=1))
    return boxes[keep], keep


@output_size.register(GaussianBlur)
def _(op: GaussianBlur, size: Size) -> Size:
    if op.kernel // 2 >= min(size):
        raise Reject(
            "too small", f"{size[0]}x{size[1]} (height x width) has no reflected border for {op}"
        )
    return size


@sample.register(ShortSide)
def _(op: ShortSide, rng: None, size: Size, boxes: np.ndarray) -> tuple[Any, ...]:
    height, width = short_side(op, size)
    return (Resize(height=height, width=width, antialias=op.antialias, area=op.area),)


def short_side(op: ShortSide, size: Size) -> Size:
    height, width = size
    short = op.short
    if max(size) / min(size) * short > op.long:
        short = round(op.long * min(size) / max(size))
    if width < height:
        return max(1, int(short * height / width)), max(1, short)
    return max(1, short), max(1, int(short * width / height))


@sample.register(CenterCrop)
def _(op: CenterCrop, rng: None, size: Size, boxes: np.ndarray) -> tuple[Any, ...]:
    top, left = _spare(op, size)
    half = round if op.rounding == "nearest" else int
    return (Crop(top=half(top / 2), left=half(left / 2), height=op.height, width=op.width),)


@sample.register(PadTo)
def _(op: PadTo, rng: None, size: Size, boxes: np.ndarray) -> tuple[Any, ...]:
    bottom, right = max(0, op.height - size[0]), max(0, op.width - size[1])
    return (Pad(bottom=bottom, right=right, fill=op.fill),) if bottom or right else ()


@sample.register(HorizontalFlip)
def _(
    op: HorizontalFlip, rng: np.random.Generator, size: Size, boxes: np.ndarray
) -> tuple[Any, ...]:
    return (Flip(axis="horizontal"),) if rng.random() < op.p else ()


@sample.register(VerticalFlip)
def _(op: VerticalFlip, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Any, ...]:
    return (Flip(axis="vertical"),) if rng.random() < op.p else ()


@sample.register(ColorJitter)
def _(op: ColorJitter, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Any, ...]:
    def factor(spread: float) -> float:
        return rng.uniform(max(0.0, 1 - spread), 1 + spread)

    changes: list[Any] = []
    if op.brightness:
        changes.append(Brightness(factor=factor(op.brightness)))
    if op.contrast:
        changes.append(Contrast(factor=factor(op.contrast)))
    if op.saturation:
        changes.append(Saturation(factor=factor(op.saturation)))
    if op.hue:
        changes.append(Hue(shift=rng.uniform(-op.hue, op.hue)))
    return tuple(changes[i] for i in rng.permutation(len(changes)))


@sample.register(PhotometricDistort)
def _(
    op: PhotometricDistort, rng: np.random.Generator, size: Size, boxes: np.ndarray
) -> tuple[Any, ...]:
    contrast_first = rng.random() < 0.5
    does_brightness, does_contrast, does_saturation, does_hue, does_permute = rng.random(5) < op.p
    contrast = [Contrast(factor=rng.uniform(*op.contrast))] if does_contrast else []
    changes: list[Any] = []
    if does_brightness:
        changes.append(Brightness(factor=rng.uniform(*op.brightness)))
    if contrast_first:
        changes += contrast
    if does_saturation:
        changes.append(Saturation(factor=rng.uniform(*op.saturation)))
    if does_hue:
        changes.append(Hue(shift=rng.uniform(*op.hue)))
    if not contrast_first:
        changes += contrast
    if does_permute:
        first, second, third = (int(channel) for channel in rng.permutation(3))
        changes.append(Permute(order=(first, second, third)))
    return tuple(changes)


@sample.register(ZoomOut)
def _(op: ZoomOut, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Any, ...]:
    if rng.random() >= op.p:
        return ()
    scale = rng.uniform(*op.scale)
    extra_y, extra_x = int(size[0] * scale) - size[0], int(size[1] * scale) - size[1]
    top, left = int(extra_y * rng.random()), int(extra_x * rng.random())
    return (Pad(top=top, left=left, bottom=extra_y - top, right=extra_x - left, fill=op.fill),)


# The chance that 1000 draws of a mode never give "no crop" is (6/7)^1000 = 1e-67; the limit is there so that a loop surely ends.
_ROUNDS = 1000
_TRIES = {"mlperf": 1, "torchvision": 40}
_MODES = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)


@sample.register(IoUCrop)
def _(op: IoUCrop, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Any, ...]:
    if not len(boxes):  # no crop can contain a box's centre, so only "no crop" would end the search
        return ()
    for _ in range(_ROUNDS):
        least = _MODES[rng.integers(len(_MODES))]
        if least is None:
            return ()
        for _ in range(_TRIES[op.flavour]):
            crop = _random_part(rng, size, op.flavour)
            if crop is not None and _overlaps_enough(crop, boxes, least, op.flavour):
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
    centred = _centred(boxes, region)
    if not len(centred):
        return False
    if flavour == "torchvision":
        return bool(iou(boxes[centred], region).max() >= least)
    return bool((iou(boxes, region) > least).all()) if least else True


@sample.register(MultiScale)
def _(op: MultiScale, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Any, ...]:
    short = op.sizes[rng.integers(len(op.sizes))]
    scale = min(short / min(size), op.long / max(size))
    height, width = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
    return (Resize(height=height, width=width, antialias=op.antialias),)


@sample.register(LargeScaleJitter)
def _(
    op: LargeScaleJitter, rng: np.random.Generator, size: Size, boxes: np.ndarray
) -> tuple[Any, ...]:
    scale = min(op.height / size[0], op.width / size[1]) * rng.uniform(*op.scale)
    height, width = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
    ops: list[Any] = [Resize(height=height, width=width, antialias=op.antialias)]
    at = rng.random()
    top, left = int(max(0, height - op.height) * at), int(max(0, width - op.width) * at)
    inside = (min(height, op.height), min(width, op.width))
    if inside != (height, width):
        ops.append(Crop(top=top, left=left, height=inside[0], width=inside[1]))
    if inside != (op.height, op.width):
        ops.append(Pad(bottom=op.height - inside[0], right=op.width - inside[1], fill=op.fill))
    return tuple(ops)


@sample.register(RandomCrop)
def _(op: RandomCrop, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Any, ...]:
    spare_y, spare_x = _spare(op, size)
    top, left = int(rng.integers(spare_y + 1)), int(rng.integers(spare_x + 1))
    return (Crop(top=top, left=left, height=op.height, width=op.width),)


@sample.register(RandomAffine)
def _(op: RandomAffine, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Any, ...]:
    angle, shear = (math.radians(rng.uniform(-most, most)) for most in (op.degrees, op.shear))
    shift_x = round(rng.uniform(-1, 1) * op.translate[0] * size[1])
    shift_y = round(rng.uniform(-1, 1) * op.translate[1] * size[0])
    matrix = affine_matrix(
        size, angle=angle, shear=shear, scale=rng.uniform(*op.scale), shift=(shift_x, shift_y)
    )
    return (Affine(matrix=matrix, fill=op.fill),)


def affine_matrix(size: Size, *, angle: float, shear: float, scale: float, shift: Range) -> Matrix:
    """Shears in x, turns (clockwise as seen, radians) and scales about the centre, then shifts by (x, y) pixels."""
    cos, sin, tan = math.cos(angle) * scale, math.sin(angle) * scale, math.tan(shear)
    a, b, d, e = cos, -cos * tan - sin, sin, -sin * tan + cos
    x, y = size[1] / 2, size[0] / 2
    return a, b, x + shift[0] - a * x - b * y, d, e, y + shift[1] - d * x - e * y


@sample.register(Noise)
def _(op: Noise, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Any, ...]:
    return (AddNoise(sigma=rng.uniform(*op.sigma), seed=int(rng.integers(2**63))),)


@sample.register(Erasing)
def _(op: Erasing, rng: np.random.Generator, size: Size, boxes: np.ndarray) -> tuple[Any, ...]:
    if rng.random() >= op.p:
        return ()
    for _ in range(10):
        area = size[0] * size[1] * rng.uniform(*op.area)
        ratio = math.exp(rng.uniform(math.log(op.ratio[0]), math.log(op.ratio[1])))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height < size[0] and 0 < width < size[1]:
            top, left = (
                int(rng.integers(size[0] - height + 1)),
                int(rng.integers(size[1] - width + 1)),
            )
            return (Erase(top=top, left=left, height=height, width=width, fill=op.fill),)
    return ()


@output_size.register(Erase)
def _(op: Erase, size: Size) -> Size:
    if op.top + op.height > size[0] or op.left + op.width > size[1]:
        raise Reject("too small", f"{size[0]}x{size[1]} (height x width) does not contain {op}")
    return size


@fixed_size.register(Resize)
@fixed_size.register(Crop)
@fixed_size.register(CenterCrop)
@fixed_size.register(RandomCrop)
@fixed_size.register(LargeScaleJitter)
def _(op: Any, size: Size | None) -> Size | None:
    return op.height, op.width


@fixed_size.register(HorizontalFlip)
@fixed_size.register(VerticalFlip)
@fixed_size.register(ColorJitter)
@fixed_size.register(PhotometricDistort)
@fixed_size.register(RandomAffine)
@fixed_size.register(Noise)
@fixed_size.register(Erasing)
def _(op: Any, size: Size | None) -> Size | None:
    return size


@fixed_size.register(ShortSide)
def _(op: ShortSide, size: Size | None) -> Size | None:
    return None if size is None else short_side(op, size)


@fixed_size.register(PadTo)
def _(op: PadTo, size: Size | None) -> Size | None:
    return None if size is None else (max(op.height, size[0]), max(op.width, size[1]))


# ------------------------------------------------------------------------------------------------------------------ box geometry


def clip(boxes: np.ndarray, size: Size) -> np.ndarray:
    """The boxes' parts inside an image of `size`, as a new array."""
    limits = np.array([size[1], size[0], size[1], size[0]], np.float32)
    return np.clip(boxes, np.float32(0), limits)


def _around(matrix: Matrix, boxes: np.ndarray) -> np.ndarray:
    """The upright boxes around the mapped corners of `boxes`, float32 (n, 4)."""
    a, b, c, d, e, f = matrix
    x, y = boxes[:, [0, 2, 2, 0]], boxes[:, [1, 1, 3, 3]]
    new_x, new_y = a * x + b * y + c, d * x + e * y + f
    return np.stack([new_x.min(1), new_y.min(1), new_x.max(1), new_y.max(1)], axis=1).astype(
        np.float32
    )


def iou(boxes: np.ndarray, region: tuple[float, float, float, float]) -> np.ndarray:
    """Intersection over union of each box with one region, float32 (n,); 0 where both are empty."""
    x1, y1, x2, y2 = region
    sides = np.minimum(boxes[:, 2:], np.array([x2, y2], np.float32)) - np.maximum(
        boxes[:, :2], np.array([x1, y1], np.float32)
    )
    both = np.maximum(sides, 0).prod(axis=1)
    either = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (x2 - x1) * (y2 - y1) - both
    return both / np.maximum(either, np.float32(1e-12))


def _centred(boxes: np.ndarray, region: tuple[float, float, float, float]) -> np.ndarray:
    x1, y1, x2, y2 = region
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    return np.flatnonzero((x > x1) & (x < x2) & (y > y1) & (y < y2))


def _overlapping(boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    inside = clip(boxes, size)
    keep = np.flatnonzero((inside[:, 2:] > inside[:, :2]).all(axis=1))
    return inside[keep], keep


def _spare(op: Any, size: Size) -> Size:
    if op.height > size[0] or op.width > size[1]:
        raise Reject("too small", f"{size[0]}x{size[1]} (height x width) does not contain {op}")
    return size[0] - op.height, size[1] - op.width


def noise(op: AddNoise, size: Size) -> np.ndarray:
    """The noise of an AddNoise op, HWC float32: both backends add this."""
    rng = np.random.Generator(np.random.Philox(key=op.seed))
    return rng.standard_normal((*size, 3), np.float32) * np.float32(op.sigma)


# ---------------------------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What turns batches of uint8 pixels into what a model wants: (pixel * scale - mean) / std, and its layout.

    Done for a batch at once, on the device that consumes it. `mean` and `std` are in the order of `channels`. `pad_multiple`:
    images of a batch are padded with zeros, at the bottom and right and after normalising, to the largest height and width
    among them, rounded up to this multiple.
    """

    scale: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channels: Literal["rgb", "bgr"] = "rgb"
    layout: Literal["hwc", "chw"] = "chw"
    pad_multiple: int | None = None
    dtype: Literal["float32", "float16", "uint8"] = "float32"

    def __post_init__(self) -> None:
        if self.dtype == "uint8" and (self.scale, self.mean, self.std) != (
            1.0,
            (0.0,) * 3,
            (1.0,) * 3,
        ):
            raise UsageError(
                "dtype 'uint8' holds pixels as they are: leave out scale, mean and std"
            )
        if not all(0 < std < math.inf for std in self.std):
            raise UsageError(
                f"std {self.std} must be three numbers above 0: pixels are divided by them"
            )
        if self.pad_multiple is not None:
            _at_least(self, 1, "pad_multiple")

    def table(self) -> np.ndarray:
        """The result for each channel and pixel value, float32 (3, 256), computed in float64 and rounded once."""
        values = np.arange(256, dtype=np.float64) * self.scale
        mean, std = np.array(self.mean)[:, None], np.array(self.std)[:, None]
        return ((values[None] - mean) / std).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done to one image, with all numbers drawn.

    `size` is that of the result, `largest` the pixels of the largest image on the way; `boxes` are those left, float32 (m, 4),
    in its pixels; `keep` says which of the given boxes they are, int64 (m,). `dropped`: those that could not be used to begin
    with, and why.
    """

    ops: tuple[Any, ...]
    size: Size
    largest: int
    boxes: np.ndarray
    keep: np.ndarray
    dropped: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Ops in order, under a name.

    `reduced_decode`: JPEGs may be decoded at 1/2, 1/4 or 1/8 scale if the first op shrinks them at least as much: much faster for
    large photos, and not the same pixels. `needs_boxes`: images without boxes are left out of the run (not rejected), as MLPerf
    training does. `drops_crowds`: before that, boxes around crowds are taken off.
    """

    name: str
    description: str = ""
    ops: tuple[Any, ...]
    finish: Finish | None = None
    reduced_decode: bool = False
    needs_boxes: bool = False
    drops_crowds: bool = False

    def __post_init__(self) -> None:
        for op in self.ops:
            height, width = _least(op)
            if height * width > MAX_PIXELS:
                raise UsageError(
                    f"{type(op).__name__} makes images of at least {height}x{width}; a result may have {MAX_PIXELS} pixels at most"
                )

    @property
    def random(self) -> bool:
        """Whether images differ from epoch to epoch."""
        return any(getattr(op, "random", False) for op in self.ops)

    @property
    def fixed_size(self) -> Size | None:
        """The size of every result, None if it depends on the image."""
        size: Size | None = None
        for op in self.ops:
            size = fixed_size(op, size)
        return size

    def reduce(self, size: Size) -> int:
        """The largest of 1, 2, 4, 8 by which a JPEG of `size` may be reduced in decoding and still be no smaller than the first resize."""
        if not self.reduced_decode or not self.ops:
            return 1
        first = self.ops[0]
        if isinstance(first, ShortSide):
            height, width = short_side(first, size)
        elif isinstance(first, Resize):
            height, width = first.height, first.width
        else:
            return 1
        for by in (8, 4, 2):
            if -(-size[0] // by) >= height and -(-size[1] // by) >= width:
                return by
        return 1

    def largest(self, size: Size) -> Size:
        """At least the size of what becomes of an image of `size`, whatever is drawn; (0, 0) for one that is rejected."""
        try:
            for op in self.ops:
                size = _largest(op, size)
        except Reject:
            return 0, 0
        return size

    def plan(
        self, *, seed: int, epoch: int, image_id: str, size: Size, boxes: np.ndarray | None = None
    ) -> Plan:
        """The plan for one image; the same for the same arguments, wherever and whenever.

        Boxes that stick out are clipped; those that are not finite, have no area or lie outside are dropped.

        Raises Reject: "bad boxes" where the recipe needs boxes and all given ones are dropped, "too
        small" for an op, or "too many pixels" in a result.
        """
        given = NO_BOXES if boxes is None else boxes
        boxes, keep, dropped = sound(given, size) if len(given) else (NO_BOXES, np.arange(0), ())
        if self.needs_boxes and len(given) and not len(boxes):
            raise Reject(
                "bad boxes",
                f"none of its {len(given)} boxes can be used; the first: {dropped[0][1]}",
            )
        rng = generator(seed, epoch, image_id) if self.random else None
        done = []
        largest = size[0] * size[1]
        for op in self.ops:
            for plain in sample(op, rng, size, boxes):
                if len(boxes):
                    boxes, kept = move_boxes(plain, boxes, size)
                    keep = keep[kept]
                size = output_size(plain, size)
                largest = max(largest, size[0] * size[1])
                if size[0] * size[1] > MAX_PIXELS:
                    raise Reject(
                        "too many pixels",
                        f"{plain} makes {size[0]}x{size[1]}, more than {MAX_PIXELS} pixels",
                    )
                if getattr(plain, "pixels", True):
                    done.append(plain)
        return Plan(tuple(done), size, largest, boxes, keep, dropped)


def _least(op: Any) -> Size:
    """The size that every result of an op has at least, whatever it is made of."""
    match op:
        case Resize() | Crop() | CenterCrop() | PadTo() | RandomCrop() | LargeScaleJitter():
            return op.height, op.width
        case ShortSide():
            return min(op.short, op.long), min(op.short, op.long)
        case MultiScale():
            return min(*op.sizes, op.long), min(*op.sizes, op.long)
        case Pad():
            return op.top + 1 + op.bottom, op.left + 1 + op.right
        case ZoomOut():
            return (int(op.scale[0]), int(op.scale[0])) if op.p == 1 else (1, 1)
    return 1, 1


def _largest(op: Any, size: Size) -> Size:
    fixed = fixed_size(op, None)
    if fixed is not None:
        return fixed
    if isinstance(op, ZoomOut):
        return int(size[0] * op.scale[1]), int(size[1] * op.scale[1])
    if isinstance(op, MultiScale):
        scale = min(max(op.sizes) / min(size), op.long / max(size))
        return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
    if getattr(op, "random", False):
        return size
    for plain in sample(op, None, size, NO_BOXES):
        size = output_size(plain, size)
    return size


def left_of(values: np.ndarray, keep: np.ndarray, *, boxes: int) -> np.ndarray:
    """What belongs to the boxes that a plan kept, (m,), of what belongs to the `boxes` it was given, (n,). A source may know boxes without
    labels or ids: then there is nothing to choose from. Without boxes it belongs to the whole image, and stays."""
    if not boxes:
        return values
    return values[keep] if len(values) > keep.max(initial=-1) else values[:0]


def boxes_back(recipe: Recipe, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Boxes on the result of a recipe without chance as boxes on the image it was made of, which is of `size`.

    Args:
        boxes: float32 (n, 4), x1 y1 x2 y2, in pixels of the result.

    Returns:
        The boxes, float32 (m, 4), in pixels of the image and clipped to it (upright around their corners, where an op turns the image); and
        which of the given ones they are, int64 (m,): a box that is nowhere in the image, such as one in its padding, is left out.

    Raises UsageError for an op that cannot be undone (`back`), and Reject as `Recipe.plan` does.
    """
    matrix, _ = _backward(recipe.plan(seed=0, epoch=0, image_id="", size=size).ops, size)
    return _overlapping(_around(matrix, boxes), size)


def _backward(plain_ops: Sequence[Any], size: Size) -> tuple[Matrix, Size]:
    """What takes a point of the result back to the image of `size`; and the size of the result."""
    matrix, at = UNMOVED, size
    for op in plain_ops:
        matrix, at = after(matrix, back(op, at)), output_size(op, at)
    return matrix, at


def forward(plain_ops: Sequence[Any], size: Size) -> tuple[Matrix, Size]:
    """What takes a point (x, y) of an image of `size` to the result of plain ops; and the size of that.

    Raises UsageError for an op that moves boxes and does not say how (`back`).
    """
    matrix, at = _backward(plain_ops, size)
    return _inverted(matrix), at


def after(outer: Matrix, inner: Matrix) -> Matrix:
    """What takes a point through `inner`, then `outer`."""
    a, b, c, d, e, f = outer
    p, q, r, s, t, u = inner
    return (
        a * p + b * s,
        a * q + b * t,
        a * r + b * u + c,
        d * p + e * s,
        d * q + e * t,
        d * r + e * u + f,
    )


def for_evaluation(recipe: Recipe) -> Recipe:
    """The recipe without chance: what a model trained with it is judged on, and given when it serves.

    Random ops that decide the size become their middle or largest way without chance; the others fall away. Images without boxes stay.
    """
    ops = tuple(
        plain
        for op in recipe.ops
        for plain in (_settled(op) if getattr(op, "random", False) else (op,))
    )
    return dataclasses.replace(
        recipe, name=f"{recipe.name}-evaluation", ops=ops, needs_boxes=False, drops_crowds=False
    )


def _settled(op: Any) -> tuple[Any, ...]:
    if isinstance(op, MultiScale):
        return (ShortSide(short=max(op.sizes), long=op.long, antialias=op.antialias),)
    if isinstance(op, LargeScaleJitter):
        fitted = ShortSide(
            short=min(op.height, op.width), long=max(op.height, op.width), antialias=op.antialias
        )
        return (
            (fitted, PadTo(height=op.height, width=op.width, fill=op.fill))
            if op.height == op.width
            else (_stretched(op),)
        )
    if isinstance(op, RandomCrop):
        return (CenterCrop(height=op.height, width=op.width),)
    return ()


def _stretched(op: LargeScaleJitter) -> Resize:
    return Resize(height=op.height, width=op.width, antialias=op.antialias)


def generator(seed: int, epoch: int, image_id: str) -> np.random.Generator:
    """The random numbers of one image in one epoch. Takes 20 us."""
    key = blake2b(
        f"{seed}/{epoch}/{image_id}".encode("utf-8", "surrogatepass"), digest_size=16
    ).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def is_drawn(op: Any) -> bool:
    """Whether the op becomes other, plain ops for each image (`sample` is registered for it)."""
    return sample.dispatch(type(op)) is not sample.dispatch(object)


def check_ops(recipe: Recipe, apply: Any, backend: str, remedies: dict[type, str]) -> None:
    """Raises UsageError if an op is registered neither with this backend's `apply` nor, to become others, with `sample`."""
    for index, op in enumerate(recipe.ops):
        kind = type(op)
        if (
            not getattr(op, "pixels", True)
            or is_drawn(op)
            or apply.dispatch(kind) is not apply.dispatch(object)
        ):
            continue
        remedy = remedies.get(kind, f"register a function with raypipe.images.{backend}.apply")
        raise UsageError(
            f"recipe {recipe.name!r}, op {index} ({kind.__name__}): the {backend} backend has no such op; {remedy}"
        )


def padded_size(sizes: Sequence[tuple[int, ...]], multiple: int | None) -> tuple[int, int]:
    """The size that all images of a batch get. Raises UsageError if they differ and no padding was asked for."""
    if multiple is None and len(set(sizes)) > 1:
        raise UsageError(
            f"the images of a batch differ in size, {sizes[0]} and others; set the finish's pad_multiple, or resize"
        )
    by = multiple or 1
    height, width = (
        -(-max((size[side] for size in sizes), default=0) // by) * by for side in (0, 1)
    )
    return height, width


# ------------------------------------------------------------------------------------------------------------- to and from JSON


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as what json.dumps takes; `from_json` makes an equal recipe of it."""
    ops = [{"op": _op_name(type(op)), **_fields(op)} for op in recipe.ops]
    finish = None if recipe.finish is None else _fields(recipe.finish)
    return {**_fields(recipe), "ops": ops, "finish": finish}


def from_json(
    source: Mapping[str, Any] | str | Path, *, trusted: Collection[str] | None = None
) -> Recipe:
    """Makes a recipe from a JSON object, or from the path of a file with one.

    Strict: raises UsageError for unknown ops and fields, missing fields, and values of a wrong type or range, saying where it
    is and what would be right.

    Args:
        trusted: own ops, "module:Class", that the recipe may name. None: any, for a recipe that the user wrote or named.
            A recipe out of a checkpoint is somebody else's.
    """
    if isinstance(source, str | Path):
        return _from_file(Path(source))
    return _from_content(source, trusted)


def _from_content(source: Any, trusted: Collection[str] | None) -> Recipe:
    """A recipe from what a JSON holds: a text in there is no name of a file."""
    where = f"recipe {shown(source.get('name', ''))}" if isinstance(source, Mapping) else "recipe"
    with foreign(where, remedy="`raypipe recipes NAME` prints one that is right."):
        return _from_mapping(source, where, trusted)


def _from_mapping(source: Any, where: str, trusted: Collection[str] | None) -> Recipe:
    fields = dict(_object(source, where))
    ops = fields.get("ops", [])
    if not isinstance(ops, list | tuple):
        raise UsageError(
            f'{where}: ops is {shown(ops)}; it must be a list of objects like {{"op": "Greyscale"}}'
        )
    made: dict[str, Any] = (
        {"ops": tuple(_op(op, f"{where}, op {index}", trusted) for index, op in enumerate(ops))}
        if "ops" in fields
        else {}
    )
    if fields.get("finish") is not None:
        made["finish"] = _build(
            Finish, _object(fields["finish"], f"{where}, finish"), f"{where}, finish"
        )
    return _build(Recipe, {**fields, **made}, where, checked=frozenset(made))


def _from_file(path: Path) -> Recipe:
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise UsageError(
            f"recipe file {path} cannot be read: {getattr(error, 'strerror', error)}"
        ) from error
    with foreign(
        f"the recipe file {path}", remedy="`raypipe recipes NAME` prints one that is right."
    ):
        try:
            content = json.loads(data)
        except ValueError as error:
            raise UsageError(f"recipe file {path} is not JSON: {error}") from error
    try:
        return _from_content(content, None)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _op(source: Any, where: str, trusted: Collection[str] | None) -> Any:
    fields = dict(_object(source, where))
    name = fields.pop("op", None)
    if not isinstance(name, str):
        raise UsageError(
            f'{where}: no "op" with the name of an op in {shown(source)}; known ones are {", ".join(OPS)}'
        )
    return _build(_op_class(name, where, trusted), fields, f"{where} ({name})")


def _op_class(name: str, where: str, trusted: Collection[str] | None) -> type:
    if name in OPS:
        return OPS[name]
    if ":" not in name:
        raise UsageError(
            f"{where}: unknown op {name!r}{did_you_mean(name, OPS)}; own ops are written module:Class"
        )
    found = imported(name, what=f"{where}: own op", trusted=trusted)
    if (
        not dataclasses.is_dataclass(found)
        or not isinstance(found, type)
        or getattr(found, "purpose", None) not in PURPOSES
    ):
        raise UsageError(
            f"{where}: {name!r} is no op: an op is a dataclass with a line `purpose: ClassVar[str] = ...`, one of {', '.join(PURPOSES)}"
        )
    return found


def _op_name(cls: type) -> str:
    return cls.__name__ if OPS.get(cls.__name__) is cls else f"{cls.__module__}:{cls.__qualname__}"


def _fields(item: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(item, field.name)) for field in dataclasses.fields(item)}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _object(source: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(source, Mapping):
        raise UsageError(f"{where}: {shown(source)} must be an object with named fields")
    return source


def _build(
    cls: type, fields: Mapping[str, Any], where: str, checked: frozenset[str] = frozenset()
) -> Any:
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in fields:
        if name not in known:
            raise UsageError(f"{where}: unknown field {name!r}{did_you_mean(name, known)}")
    for name, field in known.items():
        if (
            name not in fields
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise UsageError(f"{where}: field {name!r} is missing")
    kinds = typing.get_type_hints(cls)
    values = {
        name: value
        if name in checked
        else _converted(value, kinds[name], f"{where}: field {name!r}")
        for name, value in fields.items()
    }
    try:
        return cls(**values)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _converted(value: Any, kind: Any, where: str) -> Any:
    """The value if it is of that type (an int for a float, a list for a tuple, are); else raises UsageError."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in parts:
            raise UsageError(f"{where} is {shown(value)}{did_you_mean(value, parts)}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        (kind,) = (part for part in parts if part is not type(None))
        return _converted(value, kind, where)
    if origin is tuple:
        if not isinstance(value, list | tuple) or (
            parts[-1] is not ... and len(value) != len(parts)
        ):
            length = "" if parts[-1] is ... else f"{len(parts)} "
            raise UsageError(
                f"{where} is {shown(value)}; it must be a list of {length}{parts[0].__name__}"
            )
        return tuple(
            _converted(item, parts[0], f"{where}[{index}]") for index, item in enumerate(value)
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and (
        not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
    ):
        raise UsageError(f"{where} is {shown(value)}; it must be of type {kind.__name__}")
    return value


def did_you_mean(given: Any, known: Iterable[Any]) -> str:
    """The end of an error message: what was probably meant, and what there is."""
    names = [str(name) for name in known]
    given = str(given)[:100]  # comparing takes the product of both lengths
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    lowered = [name for name in names if name.lower() == given.lower()]
    meant = f"; did you mean {(lowered or close)[0]!r}?" if lowered or close else ";"
    return (
        f"{meant} Known: {', '.join(names) or 'none'}"
        if close or lowered
        else f"{meant} known: {', '.join(names) or 'none'}"
    )


# -------------------------------------------------------------------------------------------------------- checks of op's values


def _at_least(op: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(op, name)
        if not least <= value < math.inf:
            raise UsageError(f"{name} is {value}; it must be at least {least}")


def _one_filter(op: Any) -> None:
    if op.antialias and op.area:
        raise UsageError("antialias and area are two ways to shrink: set one of them to false")


def _within(op: Any, least: float, most: float, *names: str) -> None:
    for name in names:
        value = getattr(op, name)
        if not least <= value <= most:
            raise UsageError(f"{name} is {value}; it must be within {least} and {most}")


def _ranges(op: Any, *names: str, low: float) -> None:
    for name in names:
        least, most = getattr(op, name)
        if not low <= least <= most < math.inf:
            raise UsageError(
                f"{name} is ({least}, {most}); it must be a range from a smaller to a larger number, from {low} on"
            )


def _colour(op: Any) -> None:
    if not all(0 <= value <= 255 for value in op.fill):
        raise UsageError(f"fill is {op.fill}; it must be red, green and blue, each 0 to 255")


def _odd(op: Any) -> None:
    if op.kernel < 1 or op.kernel % 2 == 0:
        raise UsageError(f"kernel is {op.kernel}; it must be an odd number of pixels")
