"""A labelled set for detection, made of cut-outs that are pasted on photos.

A cut-out is an image with a transparent background. Its class is its folder; its box is where it is
not transparent. A picture is a function of (files, seed, index).
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from raypipe import UsageError
from raypipe.data.demo import overlap
from raypipe.data.location import Location
from raypipe.data.names import SUFFIXES
from raypipe.errors import logger

log = logger(__name__)

SIZE = (480, 640)
"""Height and width of a picture."""

MOST, SMALLEST, LARGEST = 4, 0.2, 0.55
"""Cut-outs a picture, at most; and their longer side, as a share of the picture's height."""

OVERLAP = 0.2
"""At most this share of the smaller of two boxes is hidden."""

_QUALITY = 92


@dataclass(frozen=True, kw_only=True)
class Cutout:
    """One thing to paste.

    pixels: (height, width, 4) RGBA uint8, cropped to the visible part. label: its class, from 1.
    """

    pixels: np.ndarray
    label: int


@dataclass(frozen=True, kw_only=True)
class Material:
    """The parts of pictures.

    photos: (height, width, 3) RGB uint8. classes: `classes[i]` is the name of label i + 1.
    """

    cutouts: Sequence[Cutout]
    photos: Sequence[np.ndarray]
    classes: Sequence[str]


def paste(
    cutouts: str, photos: str, output: str, *, count: int = 600, classes: int = 6, seed: int = 0
) -> Material:
    """Make `count` pictures: `output`/images/*.jpg and `output`/annotations.json, a COCO JSON.

    Args:
        cutouts: a local folder with folders of cut-outs.
        photos: a local folder with photos to paste on.
        classes: use this many folders, those with the most cut-outs.

    Raises:
        UsageError: there are no cut-outs, no photos, or results already.
    """
    for name, number in (("count", count), ("classes", classes)):
        if number < 1:
            raise UsageError(f"--{name} is {number}; it must be at least 1.")
    if os.path.exists(os.path.join(output, "annotations.json")):
        raise UsageError(
            f"{output}/annotations.json exists: pictures would be mixed with earlier ones. Give an "
            "--output without it."
        )
    place = Location.of(output)
    if there := (place / "images").names():
        raise UsageError(
            f"{output}/images has files already, such as {there[0]!r}, which might be overwritten. "
            "Give an --output without it."
        )
    material = load(cutouts, photos, classes=classes)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        picture, boxes, labels = render(material, seed, index)
        name = f"{index:06d}.jpg"
        _, data = cv2.imencode(
            ".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
        )
        place.write(f"images/{name}", data.tobytes(), tmp="")
        images.append(
            {
                "id": index + 1,
                "file_name": name,
                "height": picture.shape[0],
                "width": picture.shape[1],
            }
        )
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            box = {
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "category_id": label,
                "iscrowd": 0,
            }
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **box})
    categories = [{"id": label, "name": name} for label, name in enumerate(material.classes, 1)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    place.write(
        "annotations.json", json.dumps(coco).encode(), tmp=""
    )  # last: with it the set is whole
    return material


def load(cutouts: str, photos: str, *, classes: int) -> Material:
    """Read the parts of pictures. Images that cannot be used are skipped; a warning counts them.

    Raises:
        UsageError: too few folders have cut-outs, or there is no photo.
    """
    there = _files(cutouts)
    found = [(path, pixels) for path in there if (pixels := _cut(path)) is not None]
    _warn(cutouts, len(there) - len(found), "cannot be decoded, or are not partly transparent")
    count = Counter(_class(path, cutouts) for path, _ in found)
    if len(count) < classes:
        raise UsageError(
            f"--classes is {classes}, but {len(count)} folders below {cutouts!r} have images with "
            f"a transparent background ({', '.join(sorted(count)) or 'none'}), and a folder is "
            "a class. Ask for fewer, or give another --cutouts."
        )
    chosen = sorted(
        name for name, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))[:classes]
    )
    there = _files(photos)
    grounds = [photo for path in there if (photo := _photo(path)) is not None]
    _warn(photos, len(there) - len(grounds), "cannot be decoded")
    if not grounds:
        raise UsageError(
            f"There is no photo below {photos!r} (with a name that ends in "
            f"{' '.join(SUFFIXES)}), so nothing to paste on."
        )
    things = [(_class(path, cutouts), pixels) for path, pixels in found]
    return Material(
        cutouts=[
            Cutout(pixels=pixels, label=chosen.index(name) + 1)
            for name, pixels in things
            if name in chosen
        ],
        photos=grounds,
        classes=chosen,
    )


def _warn(folder: str, count: int, why: str) -> None:
    if count:
        log.warning("%s: %d images are left out: they %s", folder, count, why)


def _files(folder: str) -> list[Path]:
    return sorted(
        path
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )


def _class(path: Path, root: str) -> str:
    return path.parent.relative_to(root).as_posix()


def _opened(path: Path, mode: str) -> np.ndarray | None:
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode))
    except Exception:  # decoders of foreign bytes raise anything
        return None


def _cut(path: Path) -> np.ndarray | None:
    pixels = _opened(path, "RGBA")
    if pixels is None or (pixels[..., 3] >= 128).all() or not _is_there(pixels):
        return None
    left, top, right, bottom = _around(pixels)
    return pixels[top:bottom, left:right]


def _is_there(pixels: np.ndarray) -> bool:
    return bool((pixels[..., 3] >= 128).any())


def _around(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """The box (xyxy) of the visible part; there must be one."""
    rows, columns = (np.flatnonzero((pixels[..., 3] >= 128).any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _photo(path: Path) -> np.ndarray | None:
    """The photo at up to twice a picture's size: a larger one would only cost memory."""
    pixels = _opened(path, "RGB")
    if pixels is None:
        return None
    scale = max(SIZE[0] / pixels.shape[0], SIZE[1] / pixels.shape[1])
    if scale >= 0.5:
        return pixels
    return cv2.resize(pixels, None, fx=2 * scale, fy=2 * scale, interpolation=cv2.INTER_AREA)


def render(material: Material, seed: int, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture `index` of the set `seed`.

    Returns:
        Pixels, (height, width, 3) RGB uint8 of SIZE; boxes, (n, 4) int64, xyxy; labels, (n,) int64.
    """
    rng = np.random.default_rng((seed, index))
    picture = _ground(rng, material.photos[int(rng.integers(len(material.photos)))])
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    wanted = int(rng.integers(1, MOST + 1))
    for _ in range(4 * wanted):
        if len(boxes) == wanted:
            break
        # Draw the class first, so that a class with many cut-outs does not dominate.
        label = int(rng.integers(1, len(material.classes) + 1))
        of_class = [cutout for cutout in material.cutouts if cutout.label == label]
        thing = _varied(rng, of_class[int(rng.integers(len(of_class)))].pixels)
        if not _is_there(thing):  # thin things may vanish when they shrink
            continue
        top, left = (
            int(rng.integers(picture.shape[side] - thing.shape[side] + 1)) for side in (0, 1)
        )
        x1, y1, x2, y2 = _around(thing)
        box = (left + x1, top + y1, left + x2, top + y2)
        if all(overlap(box, other) <= OVERLAP for other in boxes):
            alpha = thing[..., 3:].astype(np.float32) / 255
            part = picture[top : top + thing.shape[0], left : left + thing.shape[1]]
            part[:] = np.round(alpha * thing[..., :3] + (1 - alpha) * part).astype(np.uint8)
            boxes.append(box)
            labels.append(label)
    return picture, np.array(boxes, np.int64).reshape(-1, 4), np.array(labels, np.int64)


def _ground(rng: np.random.Generator, photo: np.ndarray) -> np.ndarray:
    """A picture's background: a part of the photo, at least half as high and wide as possible."""
    scale = min(photo.shape[0] / SIZE[0], photo.shape[1] / SIZE[1]) * rng.uniform(0.5, 1.0)
    height, width = max(1, int(SIZE[0] * scale)), max(1, int(SIZE[1] * scale))
    top, left = (
        int(rng.integers(photo.shape[0] - height + 1)),
        int(rng.integers(photo.shape[1] - width + 1)),
    )
    part = cv2.resize(
        photo[top : top + height, left : left + width],
        (SIZE[1], SIZE[0]),
        interpolation=cv2.INTER_AREA,
    )
    return cv2.flip(part, 1) if rng.random() < 0.5 else part


def _varied(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """The cut-out at a random size, mirrored or not."""
    scale = SIZE[0] * rng.uniform(SMALLEST, LARGEST) / max(pixels.shape[:2])
    height, width = max(2, round(pixels.shape[0] * scale)), max(2, round(pixels.shape[1] * scale))
    # Transparent pixels have a colour too. Weighting by alpha keeps it out of resized edges.
    weighted = pixels.astype(np.float32)
    weighted[..., :3] *= weighted[..., 3:] / 255
    sized = cv2.resize(
        weighted, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    )
    sized[..., :3] /= np.maximum(sized[..., 3:] / 255, 1e-3)
    thing = np.round(np.clip(sized, 0, 255)).astype(np.uint8)
    return np.ascontiguousarray(thing[:, ::-1]) if rng.random() < 0.5 else thing
