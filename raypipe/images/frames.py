"""The frame in which boxes were drawn, found by the image size that the annotations state.

That size is the upright image's, or the stored image's, before its EXIF orientation is applied. Or
it is one of these scaled, because images were resized after they were annotated. Or it is UNIT:
boxes are shares of the upright image, as in YOLO's files.
"""

from collections.abc import Callable

import numpy as np

from raypipe.images.header import Reject
from raypipe.images.ops.op import Matrix, Size

UPRIGHT, STORED, SCALED, STORED_SCALED, UNCLEAR = (
    "upright",
    "stored",
    "scaled",
    "stored, scaled",
    "unclear",
)

UNIT: Size = (1, 1)
"""The frame of boxes from 0 to 1, in shares of the upright image."""


def into_picture(
    boxes: np.ndarray, frame: Size, size: Size, orientation: int
) -> tuple[np.ndarray, str | None]:
    """Map boxes from the frame in which they were drawn to the upright image.

    Args:
        boxes: float32 (n, 4), x1 y1 x2 y2, in pixels of the frame.
        frame: height and width by the annotation; 0, 0 if it does not say.
        size: height and width of the upright image.
        orientation: the EXIF number, 1 to 8, that turns the stored image upright.

    Returns:
        The boxes in pixels of the upright image, float32 (n, 4), and the kind of frame, one of the
        constants above; None without a frame or boxes. UNCLEAR: the sizes cannot tell (EXIF 2 to 4,
        and squares), and the frame is taken as upright.

    Raises:
        Reject: "bad boxes": the frame fits neither the upright nor the stored image.
    """
    if frame == (0, 0) or not len(boxes):
        return boxes, None
    (a, b, c, d, e, f), kind = matrix_of(frame, size, orientation)
    if frame != UNIT and (kind == UPRIGHT or (kind == UNCLEAR and frame == size)):
        return boxes, kind
    x, y = boxes[:, 0::2].astype(np.float64), boxes[:, 1::2].astype(np.float64)
    across, down = np.sort(a * x + b * y + c, axis=1), np.sort(d * x + e * y + f, axis=1)
    swapped = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    moved = np.stack([across[:, 0], down[:, 0], across[:, 1], down[:, 1]], axis=1).astype(
        np.float32
    )
    moved[swapped] = moved[swapped][:, [2, 3, 0, 1]]  # swapped corners stay swapped, so invalid
    return moved, kind


def matrix_of(frame: Size, size: Size, orientation: int) -> tuple[Matrix, str]:
    """The matrix from the frame to the upright image, and the kind of frame.

    Arguments and errors are those of `into_picture`; the frame must be known.
    """
    if frame == size and orientation == 1:  # most images
        return _TURNS[1](size), UPRIGHT
    if frame == UNIT:
        return (size[1], 0, 0, 0, size[0], 0), UPRIGHT
    stored = size if orientation < 5 else (size[1], size[0])
    fits_upright, fits_stored = (_same_shape(frame, of) for of in (size, stored))
    if orientation == 1 or (fits_upright and not fits_stored) or (frame == size != stored):
        fits_stored = False
    elif frame == stored != size:
        fits_upright = False
    if not fits_upright and not fits_stored:
        raise Reject(
            "bad boxes",
            f"the annotations are of an image of {frame[0]}x{frame[1]} (height x width), "
            f"and this one has {size[0]}x{size[1]}"
            + (f", or {stored[0]}x{stored[1]} as it is stored" if stored != size else ""),
        )
    drawn = size if fits_upright else stored
    across, down = drawn[1] / frame[1], drawn[0] / frame[0]
    a, b, c, d, e, f = _TURNS[1 if fits_upright else orientation](drawn)
    matrix = a * across, b * down, c, d * across, e * down, f
    if fits_upright:
        return matrix, UNCLEAR if fits_stored else UPRIGHT if frame == size else SCALED
    return matrix, STORED if frame == stored else STORED_SCALED


# The matrix of each EXIF orientation for an image of a size (`raypipe.images.decode.orient`).
_TURNS: dict[int, Callable[[Size], Matrix]] = {
    1: lambda of: (1, 0, 0, 0, 1, 0),
    2: lambda of: (-1, 0, of[1], 0, 1, 0),
    3: lambda of: (-1, 0, of[1], 0, -1, of[0]),
    4: lambda of: (1, 0, 0, 0, -1, of[0]),
    5: lambda of: (0, 1, 0, 1, 0, 0),
    6: lambda of: (0, -1, of[0], 1, 0, 0),
    7: lambda of: (0, -1, of[0], -1, 0, of[1]),
    8: lambda of: (0, 1, 0, -1, 0, of[1]),
}


def _same_shape(one: Size, other: Size) -> bool:
    """Whether the sizes have the same proportions, up to rounding of sides to whole pixels."""
    small, large = sorted((one, other), key=lambda size: size[0] * size[1])
    least = max((side - 1) / of for side, of in zip(small, large, strict=True))
    most = min((side + 1) / of for side, of in zip(small, large, strict=True))
    return least < most


def sound(
    boxes: np.ndarray, size: Size
) -> tuple[np.ndarray, np.ndarray, tuple[tuple[int, str], ...]]:
    """The boxes that can be used, clipped to the image.

    Args:
        boxes: float32 (n, 4), x1 y1 x2 y2, in pixels of the image.
        size: its height and width.

    Returns:
        The boxes that have an area inside the image, float32 (m, 4), clipped; their indices in
        `boxes`, int64 (m,); and for each other box its index and why it is dropped.
    """
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    limits = np.array([size[1], size[0], size[1], size[0]], np.float32)
    with np.errstate(invalid="ignore"):
        inside = np.clip(boxes, 0, limits)
        good = (inside[:, 2:] > inside[:, :2]).all(axis=1) & np.isfinite(boxes).all(axis=1)
    if good.all():
        return (boxes if np.array_equal(inside, boxes) else inside), np.arange(len(boxes)), ()
    dropped = tuple((int(at), _reason(boxes[at])) for at in np.flatnonzero(~good))
    return inside[good], np.flatnonzero(good), dropped


def _reason(box: np.ndarray) -> str:
    if not np.isfinite(box).all():
        return "not finite"
    if (box[2:] < box[:2]).any():
        return "corners swapped"
    return "no area" if (box[2:] == box[:2]).any() else "outside the image"
