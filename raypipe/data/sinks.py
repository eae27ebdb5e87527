"""Where results go: one shard of finished rows becomes files, each of which appears whole or not at all.

| format | files under the root | holds |
|---|---|---|
| jpeg, png | `[epoch-NNN/][folder/]name.jpg`, `.png` | the image |
| npy | `[epoch-NNN/][folder/]name.npy` | HWC uint8, or what `finish` makes of it; `name.jpg.npy` in MLPerf's cache |
| webdataset | `[epoch-NNN/]shard-NNNNNN.tar` | per image `key.jpg`, `key.json` and, if it has one label and no box, `key.cls` |
| parquet | `[epoch-NNN/]part-NNNNNN.parquet` | a row an image: raw HWC uint8 pixels with height, width, id, name, boxes, ... |

A file's name and bytes depend only on its rows, so a shard that is written twice is the same as one written once. Rejected
rows write nothing, and a shard of only rejected rows no file. What was written is an input again (`raypipe.data.listing`).
"""

import io
import json
import math
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import UsageError
from raypipe.data.formats.coco import annotation_id, image_key, read_coco
from raypipe.data.formats.files import npy
from raypipe.data.formats.parquet import RAW
from raypipe.data.location import path_of, suffix, write
from raypipe.data.shapes import Placement, moved_keypoints, moved_segmentation
from raypipe.data.tables import real
from raypipe.data.work import images_of

FORMATS = ("jpeg", "png", "npy", "webdataset", "parquet")

Encode = Callable[[np.ndarray, str, int], bytes]
Finish = Callable[[np.ndarray], np.ndarray]

_EXTENSION = {"jpeg": ".jpg", "png": ".png", "npy": ".npy"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sink:
    """A format and the place it is written to.

    `root`: a local path or URI. `folder`: a folder under it for image files (jpeg, png, npy). `quality`: of JPEG, 1 to 100.
    `keeps_suffix`: a file is called as its source, with its suffix and then its own (a.jpg.npy).
    `tmp`: the folder under a local root for files that are not finished; leftovers in it belong to killed writers.
    """

    format: str
    root: str
    folder: str = ""
    quality: int = 95
    tmp: str = "_raypipe/tmp"
    keeps_suffix: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(
                f"the format {self.format!r} cannot be written; choose one of {', '.join(FORMATS)}"
            )
        if not 1 <= self.quality <= 100:
            raise UsageError(f"a JPEG quality of {self.quality} does not exist; give 1 to 100")


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """`files`: relative to the root; for jpeg, png and npy one per good row in order, else one, or none. `bytes`: of all."""

    files: list[str]
    bytes: int


def write_shard(
    sink: Sink, block: pa.Table, *, encode: Encode, finish: Finish | None = None
) -> Written:
    """Writes the good rows of a block (the schema of raypipe.data.work.BLOCK; all of one epoch and shard).

    `encode(image, "jpeg" or "png", quality)` gives the bytes of a HWC RGB uint8 image. `finish(image)` gives the array to store
    for one HWC uint8 image; only npy uses it. Raises OSError or a pyarrow error if the place cannot be written to; what was
    written by then stays and will be overwritten by the next try.
    """
    if block["image"].null_count == block.num_rows:
        return Written(files=[], bytes=0)
    epoch, shard = block["epoch"][0].as_py(), block["shard"][0].as_py()
    prefix = f"epoch-{epoch:03d}/" if epoch else ""
    if sink.format == "webdataset":
        return _write_one(sink, f"{prefix}shard-{shard:06d}.tar", _tar(block, encode, sink.quality))
    if sink.format == "parquet":
        return _write_one(sink, f"{prefix}part-{shard:06d}.parquet", _parquet(block))
    folder = prefix + (sink.folder.strip("/") + "/" if sink.folder else "")
    extension = _EXTENSION[sink.format]
    files, size = [], 0
    for name, uri, image in zip(
        block["name"].to_pylist(), block["uri"].to_pylist(), images_of(block), strict=True
    ):
        if image is None:
            continue
        if sink.format == "npy":
            data = npy(image if finish is None else finish(image))
        else:
            data = encode(image, sink.format, sink.quality)
        file = folder + name + (suffix(uri) if sink.keeps_suffix else "") + extension
        write(sink.root, file, data, tmp=sink.tmp)
        files.append(file)
        size += len(data)
    return Written(files=files, bytes=size)


def _write_one(sink: Sink, file: str, data: bytes | memoryview) -> Written:
    write(sink.root, file, data, tmp=sink.tmp)
    return Written(files=[file], bytes=len(data))


def _tar(block: pa.Table, encode: Encode, quality: int) -> memoryview:
    columns = ("image_id", "name", "height", "width", "boxes", "labels", "crowds", "annotation_ids")
    rows = block.select(columns).to_pylist()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for row, image in zip(rows, images_of(block), strict=True):
            if image is None:
                continue
            folder, _, base = row["name"].rpartition("/")
            # A key ends at its first dot, so dots inside the name are escaped; listing the tar turns them back.
            key = posixpath.join(folder, base.replace("%", "%25").replace(".", "%2E"))
            sidecar = {
                "image_id": row["image_id"],
                "height": row["height"],
                "width": row["width"],
                "boxes": row["boxes"] or [],
                "labels": row["labels"] or [],
                "crowds": row["crowds"] or [],
                "annotation_ids": row["annotation_ids"] or [],
            }
            _add(tar, key + ".jpg", encode(image, "jpeg", quality))
            _add(tar, key + ".json", json.dumps(sidecar).encode())
            if len(sidecar["labels"]) == 1 and not sidecar["boxes"]:
                _add(tar, key + ".cls", str(sidecar["labels"][0]).encode())
    return buffer.getbuffer()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # its defaults: mtime 0, uid 0, gid 0, mode 644
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _parquet(block: pa.Table) -> memoryview:
    columns = [
        "image_id",
        "name",
        "height",
        "width",
        "image",
        "boxes",
        "labels",
        "crowds",
        "annotation_ids",
    ]
    block = (
        block.filter(pc.is_valid(block["image"])) if block["image"].null_count else block
    )  # which would copy all pixels
    sink = pa.BufferOutputStream()
    pq.write_table(
        block.select(columns).replace_schema_metadata(RAW),
        sink,
        row_group_size=max(1, (8 << 20) // max(1, block["image"].nbytes // block.num_rows)),
        compression="none",
        use_dictionary=False,
    )
    return memoryview(sink.getvalue())


# --- COCO annotations of what was written ----------------------------------------------------------------------------------


def annotations_of(source: str) -> str:
    """Where `write_annotations` puts what becomes of the COCO JSON `source`, relative to the output."""
    return "annotations/" + posixpath.basename(path_of(source))


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotations:
    """`file`: relative to the root. `shapes_dropped`: annotations whose segmentation or keypoints were left out."""

    file: str
    shapes_dropped: int


def write_annotations(
    source: str,
    root: str,
    rows: Iterable[tuple[str, str, int, int, Any, Any]],
    *,
    folder: str = "",
    placed: Mapping[str, Placement] = MappingProxyType({}),
    tmp: str = "_raypipe/tmp",
) -> Annotations:
    """The COCO JSON `source` as it is for the written images, in the layout of MLPerf's upscale_coco: `root/annotations/NAME`.

    `rows`: of each written image its id, its file relative to `root` (below `folder`, which is not part of the JSON's
    file_name), height, width, its boxes ((m, 4) xyxy, pixels of the written image) and their m annotation ids. `placed`: where
    each of the images went, as far as known, by id.

    Everything the JSON holds is kept, except: images without a row and their annotations; and annotations whose id no row has
    (the recipe dropped their box). height, width, file_name and bbox are those of the written image; area is scaled as the box
    is; segmentation and keypoints are moved with the image, or left out where it is not known where it went, or makes no
    sense. Raises UsageError if `source` is no COCO JSON.
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
        if image_id in written and annotation.get(
            "bbox"
        ):  # others were not looked at when the JSON was listed
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
    write(root, file, json.dumps(result).encode(), tmp=tmp)
    return Annotations(file=file, shapes_dropped=dropped)


def _frame(image: dict[str, Any]) -> tuple[int, int] | None:
    """The size of the image that a COCO JSON speaks of; None if it does not say."""
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
    """What becomes of the segmentation and the keypoints; and whether one of them was left out."""
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
    # Four decimals: what float32 boxes hold of a pixel, and half the file's size.
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
