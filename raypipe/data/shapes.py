"""Segmentation and keypoints of COCO annotations, moved with the image as its boxes are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from raypipe.data.tables import real
from raypipe.images.frames import matrix_of
from raypipe.images.header import Reject
from raypipe.images.ops.boxes import after
from raypipe.images.ops.op import Matrix, Size
from raypipe.images.recipe import forward

_DECIMALS = 4  # as the boxes have


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an image went. Sizes are (height, width).

    Attributes:
        source: the size of the upright source image.
        size: the size of the written image.
        matrix: takes a point (x, y) of the upright source image to the written image.
        orientation: the EXIF number of the stored image's turn.
    """

    source: Size
    size: Size
    matrix: Matrix
    orientation: int = 1

    def of_frame(self, frame: Size | None) -> "Placement | None":
        """The placement for shapes that were drawn on an image of size `frame`.

        Without a frame, shapes are in pixels of the upright source. None if the frame does not fit
        the source (raypipe.images.frames).
        """
        if frame is None:
            return self
        try:
            into_source, _ = matrix_of(frame, self.source, self.orientation)
        except Reject:
            return None
        return Placement(source=frame, size=self.size, matrix=after(self.matrix, into_source))


def placement(ops: Sequence[Any], source: Size, orientation: int = 1) -> Placement:
    """Where plain `ops` put an image of size `source`.

    Raises:
        UsageError: an op does not tell.
    """
    matrix, size = forward(ops, source)
    return Placement(source=source, size=size, matrix=matrix, orientation=orientation)


def moved_keypoints(values: Any, place: Placement, names: Sequence[str] = ()) -> list[float] | None:
    """COCO keypoints (x, y, visibility, ...) in the written image; None if they make no sense.

    Points outside the written image become 0, 0, 0. If the image is mirrored, left and right swap
    by their names (left_eye, right_eye).
    """
    try:
        points = np.array([real(value) for value in values], np.float64).reshape(-1, 3)
    except (TypeError, ValueError):
        return None
    if not np.isfinite(points).all():
        return None
    moved = points.copy()
    moved[:, :2] = _points(points[:, :2], place.matrix)
    height, width = place.size
    outside = (moved[:, :2] < 0).any(axis=1) | (moved[:, 0] > width) | (moved[:, 1] > height)
    moved[outside | (points[:, 2] <= 0)] = 0
    if _mirrors(place.matrix):
        moved = moved[_sides_changed(names, len(moved))]
    return [_number(value) for value in moved.reshape(-1)]


def moved_segmentation(value: Any, place: Placement) -> Any:
    """A COCO segmentation in the written image: polygons or a run-length encoding, as before.

    None if nothing of it is left, or it makes no sense.
    """
    try:
        if isinstance(value, Mapping):
            return _moved_runs(value, place)
        polygons = [
            np.array([real(number) for number in polygon], np.float64).reshape(-1, 2)
            for polygon in value
        ]
    except Exception:  # foreign structure, read by a library too
        return None
    if not all(len(polygon) >= 3 and np.isfinite(polygon).all() for polygon in polygons):
        return None
    inside = [_clipped(_points(polygon, place.matrix), place.size) for polygon in polygons]
    left = [
        [_number(value) for value in polygon.reshape(-1)] for polygon in inside if len(polygon) >= 3
    ]
    return left or None


def _number(value: float) -> float:
    rounded = round(float(value), _DECIMALS)
    return int(rounded) if rounded == int(rounded) else rounded


def _points(points: np.ndarray, matrix: Matrix) -> np.ndarray:
    a, b, c, d, e, f = matrix
    x, y = points[:, 0], points[:, 1]
    return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)


def _mirrors(matrix: Matrix) -> bool:
    return matrix[0] * matrix[4] - matrix[1] * matrix[3] < 0


def _sides_changed(names: Sequence[str], count: int) -> list[int]:
    """For each keypoint, the index of the one that replaces it."""
    at = {name: index for index, name in enumerate(names[:count])}
    order = list(range(count))
    for name, index in at.items():
        for left, right in (("left", "right"), ("right", "left")):
            if name.startswith(left):
                order[index] = at.get(right + name[len(left) :], index)
            elif name.endswith(left):
                order[index] = at.get(name[: -len(left)] + right, index)
    return order


def _clipped(polygon: np.ndarray, size: Size) -> np.ndarray:
    """The part of a polygon in the image, (n, 2), by Sutherland and Hodgman: one side at a time."""
    for axis, limit, sign in ((0, 0, 1), (0, size[1], -1), (1, 0, 1), (1, size[0], -1)):
        depth = sign * (polygon[:, axis] - limit)
        if (depth >= 0).all():
            continue
        kept = []
        for index in range(len(polygon)):
            before, here = depth[index - 1], depth[index]
            if (before < 0) != (here < 0):
                share = before / (before - here)
                kept.append(polygon[index - 1] + share * (polygon[index] - polygon[index - 1]))
            if here >= 0:
                kept.append(polygon[index])
        polygon = np.array(kept).reshape(-1, 2)
    return polygon


def _moved_runs(value: Mapping[str, Any], place: Placement) -> dict[str, Any] | None:
    """A run-length encoding, moved by the nearest pixel. It stays text, or a list of lengths."""
    from faster_coco_eval.core import mask  # 0.2 s to load, and few data sets have these

    height, width = (int(side) for side in value["size"])
    if (height, width) != place.source:
        return None
    as_list = isinstance(value["counts"], list)
    encoded = mask.frPyObjects(dict(value), height, width) if as_list else dict(value)
    pixels = np.ascontiguousarray(mask.decode(encoded))
    a, b, c, d, e, f = place.matrix
    # Here whole numbers are the edges of pixels, in OpenCV their centres.
    matrix = np.array([[a, b, c + (a + b) / 2 - 0.5], [d, e, f + (d + e) / 2 - 0.5]])
    moved = cv2.warpAffine(pixels, matrix, (place.size[1], place.size[0]), flags=cv2.INTER_NEAREST)
    if not moved.any():
        return None
    size = list(place.size)
    if as_list:
        return {"size": size, "counts": _lengths(moved)}
    counts = mask.encode(np.asfortranarray(moved))["counts"]
    return {"size": size, "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def _lengths(pixels: np.ndarray) -> list[int]:
    """Lengths of runs, column by column. The first is of zeros."""
    flat = pixels.reshape(-1, order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *changes, len(flat)]).tolist()
    return [0, *lengths] if flat[0] else lengths
