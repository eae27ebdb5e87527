"""COCO JSONs: which images one lists, with their boxes, and which numbers stand in it."""

import json
import logging
import os
import posixpath
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe.data.location import ERRORS, absolute, is_remote, join, local_uri, one_line, read
from raypipe.data.names import suffix_of
from raypipe.data.tables import Listed, box_lists, flag, frame, lists_of, real, rows, whole
from raypipe.errors import UsageError, foreign, printable, shown, words

log = logging.getLogger(__name__)


def list_coco(
    input: str, annotations: str, limit: int | None, *, there: Iterable[str] = ()
) -> Listed:
    """List the images of a COCO JSON in its order, whether the file exists below the folder `input` or not.

    Args:
        there: the files below `input`, by their paths in it. Those that the JSON does not name are counted as skipped.

    Raises UsageError if `input` is no folder, or the JSON is none of COCO's.
    """
    root = absolute(input)
    if not is_remote(root) and not os.path.isdir(root):
        raise UsageError(
            f"{input!r} is no directory; with annotations the input is the directory that the JSON's file names are in"
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
            [
                join(root, name) if is_remote(root) else local_uri(os.path.join(root, name))
                for name in names
            ],
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


def read_coco(location: str) -> dict[str, Any]:
    """A COCO JSON: an object with a non-empty list `images`. Raises UsageError if it is not that."""
    try:
        data = read(location)
    except ERRORS as error:
        raise UsageError(f"cannot read the annotations {location!r}: {one_line(error)}") from error
    with foreign(f"the annotations {location!r}", remedy="Write them again."):
        try:
            coco = json.loads(data)
        except ValueError as error:
            raise UsageError(
                f"the annotations {location!r} are not JSON: {printable(one_line(error))}"
            ) from error
    if not isinstance(coco, dict) or not isinstance(coco.get("images"), list):
        raise UsageError(
            f'the annotations {location!r} are JSON, but not COCO: there is no list "images" in them'
        )
    if not coco["images"]:
        raise UsageError(f'the annotations {location!r} list no image: "images" is empty')
    if not isinstance(coco.get("annotations"), list | None):
        raise UsageError(f'the annotations {location!r} are not COCO: "annotations" is no list')
    return coco


def image_key(image_id: Any) -> str:
    """An image's id as text, the same for 1, 1.0 and "1". Raises TypeError or ValueError if it is no text or whole number."""
    if isinstance(image_id, str):
        image_id.encode()  # JSON can spell what is no Unicode
        return image_id
    return str(image_id) if type(image_id) is int else str(whole(image_id, below=1 << 1024))


def annotation_id(annotation: dict[str, Any], position: int) -> int:
    """The annotation's id, or what stands for it in tables of raypipe, where it is missing or no 64-bit integer.

    That is a function of its position in the JSON's list, and negative where the JSON has another id for it.
    """
    try:
        return whole(annotation["id"])
    except KeyError:
        return position
    except (TypeError, ValueError, OverflowError):
        return -1 - position


def _index(location: str, images: list[Any]) -> dict[str, int]:
    """The position of each image by its key, in order."""
    index_of: dict[str, int] = {}
    with foreign(
        f"the annotations {location!r}", remedy="An image needs an id and a file_name."
    ) as place:
        for position, image in enumerate(images):
            place.at = ("image number", position, image)
            try:
                key = image_key(image["id"])
                image["file_name"].encode()
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise UsageError(
                    f"{location!r}: image number {position} has no id or no file_name that can be used "
                    f"({words(error)}): {shown(image)}"
                ) from error
            if key in index_of:
                raise UsageError(
                    f"{location!r}: the image id {image['id']!r} occurs twice, so it is not clear which image its annotations "
                    "belong to; make the ids unique"
                )
            index_of[key] = position
    return index_of


def _annotations(
    location: str, annotations: list[Any], index_of: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of all annotations with a box: boxes (n, 4) xyxy, labels, crowds, ids, and the positions of their images, each (n,)."""
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[int] = []
    crowds: list[bool] = []
    ids: list[int] = []
    owners: list[int] = []
    left_out: Counter[str] = Counter()
    remedy = "It needs image_id, category_id and a bbox of four numbers."
    with foreign(f"the annotations {location!r}", remedy=remedy) as place:
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
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which is a bad box and no more
        xyxy = np.asarray(boxes, np.float64).reshape(-1, 4).astype(np.float32)
    return (
        xyxy,
        np.asarray(labels, np.int64),
        np.asarray(crowds, bool),
        np.asarray(ids, np.int64),
        np.asarray(owners, np.int64),
    )


def check_annotation_ids(source: pa.Table, annotations: str) -> None:
    """Raises UsageError where an image of `source` (schema SOURCE) has an annotation id twice: which box is which is then unclear."""
    for image_id, ids in zip(
        source["image_id"].to_pylist(), source["annotation_ids"].to_pylist(), strict=True
    ):
        if len(set(ids)) < len(ids):
            again = next(one for one in ids if ids.count(one) > 1)
            raise UsageError(
                f"{annotations!r}: the annotation id {again} occurs twice for the image {image_id!r}, so it is not clear which "
                "of its boxes is which, and the JSON of what is written would be wrong; make the ids unique"
            )
