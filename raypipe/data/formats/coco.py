"""COCO JSONs: their images and annotations, and the JSON of the images that were written."""

import json
import math
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe.data.location import Location
from raypipe.data.names import suffix_of
from raypipe.data.shapes import Placement, moved_keypoints, moved_segmentation
from raypipe.data.stores import ERRORS, one_line
from raypipe.data.tables import Listed, box_lists, flag, frame, lists_of, real, rows, whole
from raypipe.errors import UsageError, foreign, logger, printable, shown, words

log = logger(__name__)

# --- listing -----------------------------------------------------------------------------------


def list_coco(
    folder: Location, annotations: Location, limit: int | None, *, there: Iterable[str] = ()
) -> Listed:
    """The images of a COCO JSON in its order, even if their files do not exist below `folder`.

    Args:
        there: paths of files below `folder`. Files that the JSON does not name count as skipped.

    Raises:
        UsageError: `folder` is no folder, or the JSON is not COCO.
    """
    if not folder.is_remote and not os.path.isdir(folder.path):
        raise UsageError(
            f"{str(folder)!r} is no directory; with annotations the input is the directory "
            "that the JSON's file names are in"
        )
    coco = read_coco(annotations)
    images = coco["images"]
    index_of = _index(annotations, images)
    boxes, labels, crowds, ids, owners = _annotations(
        annotations, coco.get("annotations") or [], index_of
    )

    count = len(images) if limit is None else min(limit, len(images))
    order = np.argsort(owners, kind="stable")
    order = order[: np.searchsorted(owners[order], count)]
    counts = np.bincount(owners[order], minlength=count)[:count]
    names = [image["file_name"] for image in images[:count]]
    return Listed(
        rows(
            list(index_of)[:count],
            names,
            folder.uris(names),
            boxes=box_lists(counts, boxes[order]),
            labels=lists_of(counts, labels[order]),
            crowds=lists_of(counts, crowds[order]),
            annotation_ids=lists_of(counts, ids[order]),
            frames=[frame(image) for image in images[:count]],
        ),
        _not_named(images, there),
    )


def _not_named(images: list[Any], there: Iterable[str]) -> Counter[str]:
    """Count the files of `there` that no image names, by suffix."""
    named = {posixpath.normpath(image["file_name"]) for image in images}
    return Counter(suffix_of(path) for path in there if path not in named)


def _index(location: Location, images: list[Any]) -> dict[str, int]:
    """The position of each image by its key, in order."""
    index_of: dict[str, int] = {}
    with foreign(
        f"the annotations {str(location)!r}", remedy="An image needs an id and a file_name."
    ) as place:
        for position, image in enumerate(images):
            place.at = ("image number", position, image)
            try:
                key = image_key(image["id"])
                image["file_name"].encode()
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise UsageError(
                    f"{str(location)!r}: image number {position} has no id or no file_name "
                    f"that can be used ({words(error)}): {shown(image)}"
                ) from error
            if key in index_of:
                raise UsageError(
                    f"{str(location)!r}: the image id {image['id']!r} occurs twice, so it is not "
                    "clear which image its annotations belong to; make the ids unique"
                )
            index_of[key] = position
    return index_of


def _annotations(
    location: Location, annotations: list[Any], index_of: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (n, 4), xyxy; and labels, crowds, ids and positions of images, (n,) each."""
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[int] = []
    crowds: list[bool] = []
    ids: list[int] = []
    owners: list[int] = []
    left_out: Counter[str] = Counter()
    remedy = "It needs image_id, category_id and a bbox of four numbers."
    with foreign(f"the annotations {str(location)!r}", remedy=remedy) as place:
        for position, annotation in enumerate(annotations):
            place.at = ("annotation number", position, annotation)
            owner = index_of.get(image_key(annotation["image_id"]))
            if owner is None:
                left_out["belong to images that are not listed in it"] += 1
                continue
            box = annotation.get("bbox")
            if not box:  # captions and panoptic JSONs have none
                left_out["have no bbox"] += 1
                continue
            if not isinstance(box, list):
                raise TypeError(f"its bbox is {box!r}")
            x, y, width, height = map(real, box)
            labels.append(whole(annotation["category_id"]))
            crowds.append(flag(annotation.get("iscrowd")))
            boxes.append((x, y, x + width, y + height))
            ids.append(annotation_id(annotation, position))
            owners.append(owner)
    for why, count in left_out.items():
        log.warning("%s: %d annotations %s; they are ignored", location, count, why)
    with np.errstate(over="ignore"):  # what exceeds float32 becomes infinite: a bad box
        xyxy = np.asarray(boxes, np.float64).reshape(-1, 4).astype(np.float32)
    return (
        xyxy,
        np.asarray(labels, np.int64),
        np.asarray(crowds, bool),
        np.asarray(ids, np.int64),
        np.asarray(owners, np.int64),
    )


# --- reading -----------------------------------------------------------------------------------


def read_coco(location: Location) -> dict[str, Any]:
    """A COCO JSON: an object with a non-empty list `images`.

    Raises:
        UsageError: it cannot be read, or is not that.
    """
    try:
        data = location.read()
    except ERRORS as error:
        raise UsageError(
            f"cannot read the annotations {str(location)!r}: {one_line(error)}"
        ) from error
    with foreign(f"the annotations {str(location)!r}", remedy="Write them again."):
        try:
            coco = json.loads(data)
        except ValueError as error:
            raise UsageError(
                f"the annotations {str(location)!r} are not JSON: {printable(one_line(error))}"
            ) from error
    if not isinstance(coco, dict) or not isinstance(coco.get("images"), list):
        raise UsageError(
            f'the annotations {str(location)!r} are JSON, but not COCO: there is no list "images" '
            "in them"
        )
    if not coco["images"]:
        raise UsageError(f'the annotations {str(location)!r} list no image: "images" is empty')
    if not isinstance(coco.get("annotations"), list | None):
        raise UsageError(
            f'the annotations {str(location)!r} are not COCO: "annotations" is no list'
        )
    return coco


def image_key(image_id: Any) -> str:
    """An image's id as text, the same for 1, 1.0 and "1".

    Raises:
        TypeError, ValueError: it is neither text nor a whole number.
    """
    if isinstance(image_id, str):
        image_id.encode()  # raises for lone surrogates, which JSON can spell
        return image_id
    return str(image_id) if type(image_id) is int else str(whole(image_id, below=1 << 1024))


def annotation_id(annotation: dict[str, Any], position: int) -> int:
    """The annotation's id; if it is missing or no 64-bit integer, a number made of its position.

    That number is negative if the JSON has an id that does not fit.
    """
    try:
        return whole(annotation["id"])
    except KeyError:
        return position
    except (TypeError, ValueError, OverflowError):
        return -1 - position


def check_annotation_ids(source: pa.Table, annotations: str) -> None:
    """Check that no image of `source` (schema SOURCE) has an annotation id twice.

    Raises:
        UsageError: one has, so its boxes cannot be told apart.
    """
    for image_id, ids in zip(
        source["image_id"].to_pylist(), source["annotation_ids"].to_pylist(), strict=True
    ):
        if len(set(ids)) < len(ids):
            again = next(one for one in ids if ids.count(one) > 1)
            raise UsageError(
                f"{annotations!r}: the annotation id {again} occurs twice for the image "
                f"{image_id!r}, so it is not clear which of its boxes is which, and the JSON of "
                "what is written would be wrong; make the ids unique"
            )


# --- writing -----------------------------------------------------------------------------------


def annotations_of(source: Location) -> str:
    """Where `write_annotations` puts the JSON made from `source`, relative to the output."""
    return "annotations/" + source.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotations:
    """The JSON that was written.

    Attributes:
        file: relative to the root.
        shapes_dropped: annotations whose segmentation or keypoints were left out.
    """

    file: str
    shapes_dropped: int


def write_annotations(
    source: Location,
    root: Location,
    rows: Iterable[tuple[str, str, int, int, Any, Any]],
    *,
    folder: str = "",
    placed: Mapping[str, Placement] = MappingProxyType({}),
) -> Annotations:
    """Write the COCO JSON of the written images, made from `source`, as `root/annotations/NAME`.

    This is the layout of MLPerf's upscale_coco. Height, width, file_name and bbox become those of
    the written image, and area is scaled with the box. Segmentation and keypoints move with the
    image. They are left out if they make no sense, or if it is unknown where the image went.
    Everything else stays, except:

    - images without a row, and their annotations;
    - annotations whose id no row has: the recipe dropped their box.

    Args:
        rows: of each written image its id, file, height, width, boxes and annotation ids. The file
            is relative to `root`; boxes are (m, 4) xyxy in pixels of the written image.
        folder: files are below it; file_name does not contain it.
        placed: where each image went, as far as known, by its id.

    Raises:
        UsageError: `source` is no COCO JSON.
    """
    coco = read_coco(source)
    written = {image_id: rest for image_id, *rest in rows}
    images = []
    boxes: dict[tuple[str, int], list[float]] = {}  # ids need only be unique within an image
    for image in coco["images"]:
        image_id = image_key(image["id"])
        if (row := written.get(image_id)) is None:
            continue
        file, height, width, moved, ids = row
        name = file.removeprefix(folder.strip("/") + "/") if folder else file
        images.append({**image, "file_name": name, "height": height, "width": width})
        keys = [(image_id, identity) for identity in ids]
        boxes.update(zip(keys, np.asarray(moved, np.float64).reshape(-1, 4).tolist(), strict=True))
    sizes = {image_key(image["id"]): _frame(image) for image in coco["images"]}
    categories = coco.get("categories")
    known = (
        [one for one in categories if isinstance(one, dict)] if isinstance(categories, list) else []
    )
    names = {
        one["id"]: _names(one) for one in known if isinstance(one.get("id"), int | float | str)
    }
    annotations, dropped = [], 0
    for position, annotation in enumerate(coco.get("annotations") or []):
        image_id = image_key(annotation["image_id"])
        if image_id in written and annotation.get("bbox"):  # listing ignored the others
            box = boxes.get((image_id, annotation_id(annotation, position)))
            if box is not None:
                place = placed.get(image_id)
                moved_, lost = _moved(
                    annotation, box, place and place.of_frame(sizes[image_id]), names
                )
                annotations.append(moved_)
                dropped += lost
    result = {**coco, "images": images}
    if "annotations" in coco:
        result["annotations"] = annotations
    file = annotations_of(source)
    root.write(file, json.dumps(result).encode())
    return Annotations(file=file, shapes_dropped=dropped)


def _frame(image: dict[str, Any]) -> tuple[int, int] | None:
    """The height and width of an image by the JSON; None if it does not say."""
    try:
        height, width = (int(real(image.get(name))) for name in ("height", "width"))
    except (TypeError, ValueError, OverflowError):
        return None
    return (height, width) if height >= 1 and width >= 1 else None


def _names(category: dict[str, Any]) -> list[str]:
    names = category.get("keypoints")
    return [str(name) for name in names] if isinstance(names, list) else []


def _shapes(
    annotation: dict[str, Any], place: Placement | None, names: Mapping[Any, list[str]]
) -> tuple[dict[str, Any], bool]:
    """The moved segmentation and keypoints; and whether one of them was left out."""
    moved: dict[str, Any] = {}
    lost = False
    if annotation.get("segmentation"):
        segmentation = place and moved_segmentation(annotation["segmentation"], place)
        moved |= {"segmentation": segmentation} if segmentation else {}
        lost |= not segmentation
    elif "segmentation" in annotation:
        moved["segmentation"] = annotation["segmentation"]
    if annotation.get("keypoints"):
        points = place and moved_keypoints(
            annotation["keypoints"], place, names.get(annotation.get("category_id"), [])
        )
        moved |= (
            {"keypoints": points, "num_keypoints": sum(value > 0 for value in points[2::3])}
            if points
            else {}
        )
        lost |= not points
    return moved, lost


def _moved(
    annotation: dict[str, Any],
    box: list[float],
    place: Placement | None,
    names: Mapping[Any, list[str]],
) -> tuple[dict[str, Any], bool]:
    kept = {
        key: value
        for key, value in annotation.items()
        if key not in ("segmentation", "keypoints", "num_keypoints")
    }
    left, top, right, bottom = box
    # Four decimals: the precision of float32 boxes, and half the file's size.
    kept["bbox"] = [round(value, 4) for value in (left, top, right - left, bottom - top)]
    if isinstance(area := annotation.get("area"), int | float):
        before = real(annotation["bbox"][2]) * real(annotation["bbox"][3])
        after = (right - left) * (bottom - top)
        scaled = (
            real(float(area) if isinstance(area, bool) else area) * after / before
            if before > 0
            else after
        )
        kept["area"] = round(scaled if math.isfinite(scaled) else after, 4)
    shapes, lost = _shapes(annotation, place, names)
    return kept | shapes, lost
