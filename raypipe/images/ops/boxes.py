"""Where points and boxes go, and the op that drops boxes."""

from dataclasses import dataclass

import numpy as np

from raypipe.images.ops.op import Matrix, NonNegative, Op, Size

NO_BOXES = np.zeros((0, 4), np.float32)

Region = tuple[float, float, float, float]
"""x1, y1, x2, y2, as a box."""


@dataclass(frozen=True, kw_only=True)
class SanitizeBoxes(Op):
    """Drops boxes whose width or height is below `min_size` pixels. Pixels stay as they are."""

    purpose = "remove"
    pixels = False
    min_size: NonNegative = 1.0

    def move_boxes(self, boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
        keep = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= self.min_size).all(axis=1))
        return boxes[keep], keep


def clip(boxes: np.ndarray, size: Size) -> np.ndarray:
    """The boxes' parts inside an image of `size`, as a new array."""
    limits = np.array([size[1], size[0], size[1], size[0]], np.float32)
    return np.clip(boxes, np.float32(0), limits)


def overlapping(boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """The boxes that overlap an image of `size`, clipped to it, and their indices."""
    inside = clip(boxes, size)
    keep = np.flatnonzero((inside[:, 2:] > inside[:, :2]).all(axis=1))
    return inside[keep], keep


def centred(boxes: np.ndarray, region: Region) -> np.ndarray:
    """The indices of the boxes whose centre lies inside the region."""
    x1, y1, x2, y2 = region
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    return np.flatnonzero((x > x1) & (x < x2) & (y > y1) & (y < y2))


def iou(boxes: np.ndarray, region: Region) -> np.ndarray:
    """Intersection over union of each box with one region, float32 (n,); 0 where both are empty."""
    x1, y1, x2, y2 = region
    sides = np.minimum(boxes[:, 2:], np.array([x2, y2], np.float32)) - np.maximum(
        boxes[:, :2], np.array([x1, y1], np.float32)
    )
    both = np.maximum(sides, 0).prod(axis=1)
    either = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (x2 - x1) * (y2 - y1) - both
    return both / np.maximum(either, np.float32(1e-12))


def around(matrix: Matrix, boxes: np.ndarray) -> np.ndarray:
    """The upright boxes around the mapped corners of `boxes`, float32 (n, 4)."""
    a, b, c, d, e, f = matrix
    x, y = boxes[:, [0, 2, 2, 0]], boxes[:, [1, 1, 3, 3]]
    new_x, new_y = a * x + b * y + c, d * x + e * y + f
    return np.stack([new_x.min(1), new_y.min(1), new_x.max(1), new_y.max(1)], axis=1).astype(
        np.float32
    )


def after(outer: Matrix, inner: Matrix) -> Matrix:
    """The matrix that maps a point by `inner`, then by `outer`."""
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


def inverted(matrix: Matrix) -> Matrix:
    a, b, c, d, e, f = matrix
    by = a * e - b * d
    return e / by, -b / by, (b * f - c * e) / by, -d / by, a / by, (c * d - a * f) / by
