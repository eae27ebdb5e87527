"""What becomes of stored predictions: COCO's results format, and their precision by known boxes."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data import journal
from raypipe.data.formats.parquet import read_table
from raypipe.data.journal import Dropped
from raypipe.data.location import Location
from raypipe.data.tables import PREDICTIONS, frames_of, unlist
from raypipe.images.frames import into_picture, sound
from raypipe.images.header import Reject
from raypipe.models.evaluate import Found, Precision, Truth, mean_average_precision


def stored(output: Location, written: Sequence[journal.Written]) -> Iterator[pa.Table]:
    """Read the predictions for the images in `written`, a table (schema PREDICTIONS) per shard."""
    wanted = pa.array([row.image_id for row in written], pa.string())
    for part in dict.fromkeys(row.file for row in written):
        place = output / part
        remedy = "--no-resume predicts again."
        table = read_table(place.read(), PREDICTIONS, f"the predictions {place}", remedy=remedy)
        yield table.filter(pc.is_in(table.column("image_id"), wanted))


def coco_results(tables: Sequence[pa.Table], ids: Mapping[str, object]) -> bytes:
    """Convert predictions (schema PREDICTIONS) to COCO's results format.

    That is a JSON list of image_id, category_id, bbox (x y width height) and score.

    Args:
        ids: the annotations' own ids of images. Ids that are not in it stay text.
    """
    lines = []
    for table in tables:
        found = (unlist(table.column(name)) for name in ("boxes", "labels", "scores"))
        for image_id, boxes, labels, scores in zip(
            table.column("image_id").to_pylist(), *found, strict=True
        ):
            for (x1, y1, x2, y2), label, score in zip(
                boxes.astype(float).tolist(), labels.tolist(), scores.tolist(), strict=True
            ):
                # float32 holds four decimals of a pixel, and eight of a share.
                box = [round(value, 4) for value in (x1, y1, x2 - x1, y2 - y1)]
                one = {
                    "image_id": ids.get(image_id, image_id),
                    "category_id": label,
                    "bbox": box,
                    "score": round(score, 8),
                }
                lines.append(json.dumps(one))
    return ("[" + ",\n".join(lines) + "]\n").encode()


@dataclass(frozen=True, kw_only=True)
class Truths:
    """The known boxes of the images that were predicted on, in pixels of the upright images.

    by_image: None if numbers of boxes and labels differ.
    dropped: boxes that cannot be used.
    boxes_from: number of images by the frame in which their boxes were drawn.
    strangers: images whose frame is not recognised; they do not count.
    """

    by_image: dict[str, Truth] | None
    dropped: list[Dropped]
    boxes_from: Counter[str]
    strangers: int


def truths_of(source: pa.Table, tables: Sequence[pa.Table]) -> Truths:
    """Find what `source` (schema SOURCE) knows of the images of `tables` (schema PREDICTIONS)."""
    known = [
        unlist(source.column(name)) for name in ("boxes", "labels", "crowds", "annotation_ids")
    ]
    found = Truths(by_image={}, dropped=[], boxes_from=Counter(), strangers=0)
    if any(len(boxes) != len(labels) for boxes, labels in zip(*known[:2], strict=True)):
        return replace(found, by_image=None)
    rows = dict(
        zip(
            source.column("image_id").to_pylist(),
            zip(frames_of(source).tolist(), *known, strict=True),
            strict=True,
        )
    )
    names = ("image_id", "uri", "height", "width", "orientation")
    for row in (row for table in tables for row in table.select(names).to_pylist()):
        frame, boxes, labels, crowds, ids = rows[row["image_id"]]
        size = row["height"], row["width"]
        try:
            placed, boxes_from = into_picture(boxes, tuple(frame), size, row["orientation"] or 1)
        except Reject:
            found = replace(found, strangers=found.strangers + 1)
            continue
        found.boxes_from.update([boxes_from] if boxes_from else [])
        good, keep, bad = sound(placed, size)
        for at, why in bad:
            identity = int(ids[at]) if len(ids) == len(boxes) else None
            box = boxes[at].tolist()
            found.dropped.append(
                Dropped(
                    image_id=row["image_id"],
                    uri=row["uri"],
                    box=box,
                    annotation_id=identity,
                    reason=why,
                )
            )
        assert found.by_image is not None
        found.by_image[row["image_id"]] = Truth(
            boxes=good, labels=labels[keep], crowds=crowds[keep] if len(crowds) else crowds
        )
    return found


def precision_of(truths: Truths, tables: Sequence[pa.Table]) -> Precision | None:
    """The precision of predictions (schema PREDICTIONS). Rejected images do not count.

    None if no image has a labelled box.
    """
    if truths.by_image is None:
        return None
    of, found = [], []
    for table in tables:
        columns = (unlist(table.column(name)) for name in ("boxes", "labels", "scores"))
        for image_id, boxes, labels, scores in zip(
            table.column("image_id").to_pylist(), *columns, strict=True
        ):
            if image_id in truths.by_image:
                of.append(truths.by_image[image_id])
                found.append(Found(boxes=np.asarray(boxes), labels=labels, scores=scores))
    return mean_average_precision(of, found)
