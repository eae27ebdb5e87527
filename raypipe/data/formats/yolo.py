"""YOLO's annotations: a text file for each image, and data.yaml with the names of the classes.

    images/train/a.jpg   labels/train/a.txt   "3 0.5 0.5 0.2 0.1": class, centre, width and height

Numbers are shares of the upright image, from 0 to 1. A line with more numbers is a polygon, whose
bounds are the box. An image without a file has no boxes.
"""

import math
from typing import Any

import pyarrow as pa
import yaml

from raypipe.data.formats import beside
from raypipe.data.formats.beside import Boxes
from raypipe.data.location import Location
from raypipe.data.tables import real, whole
from raypipe.errors import UsageError, foreign
from raypipe.images.frames import UNIT

SUFFIXES = (".yaml", ".yml")


def annotate(
    images: pa.Table, paths: list[str], input: Location, annotations: Location
) -> tuple[pa.Table, tuple[str, ...]]:
    """`images` (schema SOURCE) with the boxes of their files, and the names of the classes.

    Args:
        paths: of the images, relative to `input`.
        input: the folder of the images.
        annotations: the folder of the text files, whose paths there are those of the images. Or
            data.yaml: then they are where the last `images` in an image's path is `labels`, or
            beside the images.

    Raises:
        UsageError: there are no such files, or data.yaml makes no sense.
    """
    names: tuple[str, ...] = ()
    folder, files = annotations, beside.files_of(paths, ".txt")
    if not beside.is_folder(annotations):
        names = _names(annotations)
        folder = input
        if any("images" in path.split("/")[:-1] for path in paths):
            files = [_labels(path) for path in files]
        elif "images" in input.path.split("/"):
            head, mark, query = (input.text if input.is_remote else input.path).partition("?")
            folder = Location.of(_labels(head.rstrip("/") + "/")[:-1] + mark + query)
    found = beside.read_beside(folder, files, parse, what="YOLO")
    if names:
        _check_known(found, paths, names, annotations)
    return beside.with_boxes(images, found), names


def _labels(path: str) -> str:
    """The path with `labels` for the last folder `images`."""
    parts = path.split("/")
    folders = parts[:-1]
    if "images" in folders:
        parts[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return "/".join(parts)


def parse(content: bytes) -> Boxes[int]:
    """The boxes of one text file. For nonsense, any exception."""
    boxes: list[list[float]] = []
    labels: list[int] = []
    for line in content.decode().splitlines():
        parts = line.split()
        if not parts:
            continue
        label, numbers = whole(parts[0]), [real(part) for part in parts[1:]]
        if label < 0 or len(numbers) < 4:
            raise ValueError(f"{line[:60]!r} is not a class and four numbers")
        if not all(math.isfinite(number) and -0.01 <= number <= 1.01 for number in numbers):
            raise ValueError(f"{line[:60]!r} has numbers that are no shares, from 0 to 1")
        labels.append(label)
        boxes.append(_box(numbers))
    return Boxes(boxes=boxes, labels=labels, frame=UNIT if boxes else (0, 0))


def _box(numbers: list[float]) -> list[float]:
    if len(numbers) in (4, 5):  # a fifth is a score
        x, y, width, height = numbers[:4]
        return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    if len(numbers) % 2:
        raise ValueError(f"a polygon of {len(numbers)} numbers has a point without a y")
    across, down = numbers[0::2], numbers[1::2]
    return [min(across), min(down), max(across), max(down)]


def _names(place: Location) -> tuple[str, ...]:
    """The names of the classes in data.yaml, by number."""
    what = f"YOLO's {str(place)!r}"
    try:
        data = place.read()
    except FileNotFoundError as error:
        raise UsageError(
            f"{str(place)!r} does not exist. Nothing was started. Give data.yaml, or the folder "
            f"of the text files"
        ) from error
    with foreign(what, remedy="It needs names: a list, or numbers and names.") as at:
        found: Any = yaml.safe_load(data)
        at.at = "names"
        names = found["names"]
        by_number = dict(enumerate(names)) if isinstance(names, list) else names
        numbers = {whole(number): str(name) for number, name in by_number.items()}
        if sorted(numbers) != list(range(len(numbers))):
            raise ValueError(f"they are not numbered from 0 on: {sorted(numbers)[:5]} ...")
        return tuple(numbers[number] for number in sorted(numbers))


def _check_known(
    found: list[Boxes[int]], paths: list[str], names: tuple[str, ...], place: Location
) -> None:
    for one, path in zip(found, paths, strict=True):
        if one.labels and max(one.labels) >= len(names):
            raise UsageError(
                f"{path} has class {max(one.labels)}, but {str(place)!r} names {len(names)}. "
                f"Nothing was started. Name all classes there, or mend the text file"
            )
