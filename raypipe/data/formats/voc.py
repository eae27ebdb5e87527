"""Pascal VOC's annotations: an XML file for each image.

Labels number the names that occur, in alphabetical order from 0 on. `difficult` and `truncated` are
not read. Corners count pixels from 1 and are inclusive: 1 1 10 10 are the first ten pixels.
"""

from xml.etree import ElementTree

import pyarrow as pa

from raypipe.data.formats.beside import Boxes, files_of, read_beside, with_boxes
from raypipe.data.location import Location
from raypipe.data.tables import frame, real


def annotate(
    images: pa.Table, paths: list[str], annotations: Location
) -> tuple[pa.Table, tuple[str, ...]]:
    """`images` (schema SOURCE) with the boxes of their files, and the names of the classes.

    Args:
        paths: of the images, relative to their folder.
        annotations: the folder of the XML files.

    Raises:
        UsageError: there are no such files.
    """
    found = read_beside(annotations, files_of(paths, ".xml"), parse, what="Pascal VOC")
    names = tuple(sorted({name for one in found for name in one.labels}))
    numbers = {name: number for number, name in enumerate(names)}
    numbered = [
        Boxes(boxes=one.boxes, labels=[numbers[name] for name in one.labels], frame=one.frame)
        for one in found
    ]
    return with_boxes(images, numbered), names


def parse(content: bytes) -> Boxes[str]:
    """The boxes of one XML file. For nonsense, any exception."""
    root = ElementTree.fromstring(content)
    if root.tag != "annotation":
        raise ValueError(f"its root is {root.tag!r}, not 'annotation'")
    boxes: list[list[float]] = []
    names: list[str] = []
    for thing in root.iter("object"):
        name = (thing.findtext("name") or "").strip()
        if not name:
            raise ValueError("an object has no name")
        x1, y1, x2, y2 = (
            real((thing.findtext(f"bndbox/{side}") or "").strip())
            for side in ("xmin", "ymin", "xmax", "ymax")
        )
        boxes.append([x1 - 1, y1 - 1, x2, y2])
        names.append(name)
    size = {side: (root.findtext(f"size/{side}") or "").strip() for side in ("height", "width")}
    return Boxes(boxes=boxes, labels=names, frame=frame(size))
