"""Rows of blocks of pixels, and batches of them. No torch."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe.data.stores import StoreError
from raypipe.data.tables import images_of, unlist
from raypipe.errors import UsageError
from raypipe.images.header import UNREAD


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One image of a block.

    Attributes:
        pixels: (height, width, 3) uint8, a view; None if it was rejected.
        labels: of the boxes, (n,).
        whole: labels of the whole image, (k,): it has no boxes then.
        dropped: boxes that could not be used (journal.Dropped, as a dict).
        boxes_from: the frame that its boxes were drawn in.
        damaged: delivered although it is damaged (--damaged keep).
    """

    epoch: int
    image_id: str
    pixels: np.ndarray | None
    boxes: np.ndarray
    labels: np.ndarray
    crowds: np.ndarray
    reject: dict[str, str] | None
    dropped: list[dict[str, Any]] = field(default_factory=list)
    boxes_from: str | None = None
    damaged: bool = False
    whole: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows of one epoch, in order: `good` ones have pixels."""

    epoch: int
    rows: list[Row]

    @property
    def good(self) -> list[Row]:
        return [row for row in self.rows if row.pixels is not None]


def rows_of(block: pa.Table) -> Iterator[Row]:
    """The rows of a block (schema BLOCK), their pixels as views of it."""
    boxes, labels, crowds = (unlist(block.column(name)) for name in ("boxes", "labels", "crowds"))
    names = ("epoch", "image_id", "uri", "reason", "detail", "boxes_dropped", "boxes_from")
    for at, (row, image) in enumerate(
        zip(block.select(names).to_pylist(), images_of(block), strict=True)
    ):
        yield Row(
            epoch=row["epoch"],
            image_id=row["image_id"],
            pixels=image,
            boxes=boxes[at],
            # Labels without boxes are of the whole image: a detector learns nothing from them.
            labels=labels[at] if len(boxes[at]) else labels[at][:0],
            whole=labels[at][:0] if len(boxes[at]) else labels[at],
            crowds=crowds[at],
            reject=None
            if image is not None
            else {name: row[name] or "" for name in ("image_id", "uri", "reason", "detail")},
            dropped=[
                {"image_id": row["image_id"], "uri": row["uri"], **box}
                for box in row["boxes_dropped"] or ()
            ],
            boxes_from=row["boxes_from"],
            damaged=image is not None and row["detail"] is not None,
        )


def check_read(reject: Mapping[str, str]) -> None:
    """Raise StoreError if a row has no pixels because its store did not answer."""
    if reject["reason"] == UNREAD:
        raise StoreError(
            f"{reject['uri']} could not be read ({reject['detail']}), and without it a row would "
            "be missed"
        )


def batches(blocks: Iterable[pa.Table], size: int) -> Iterator[Batch]:
    """Batches of `size` good rows, in the order of `blocks`.

    None spans two epochs, so the last batch of an epoch may be smaller.

    Raises:
        ValueError: an epoch comes after a later one.
        StoreError: a row could not be read. Learning goes on from the last checkpoint when it can.
    """
    rows: list[Row] = []
    good = 0
    for block in blocks:
        for row in rows_of(block):
            if row.reject is not None:
                check_read(row.reject)
            if rows and row.epoch != rows[0].epoch:
                if row.epoch < rows[0].epoch:
                    raise ValueError(
                        f"a row of epoch {row.epoch} came after one of epoch {rows[0].epoch}; "
                        "blocks must come in order"
                    )
                yield Batch(epoch=rows[0].epoch, rows=rows)
                rows, good = [], 0
            rows.append(row)
            good += row.pixels is not None
            if good == size:
                yield Batch(epoch=row.epoch, rows=rows)
                rows, good = [], 0
    if rows:
        yield Batch(epoch=rows[0].epoch, rows=rows)


def trainable(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) and labels (n,) to learn from: none without an area.

    Boxes around crowds are among them unless the recipe drops these (`work.wanted_by`).
    """
    if len(row.labels) != len(row.boxes):
        raise UsageError(
            f"image {row.image_id} has {len(row.boxes)} boxes, but {len(row.labels)} labels, so it "
            "is unknown what is in them. Give a label for each box, or leave the image out."
        )
    kept = (row.boxes[:, 2] > row.boxes[:, 0]) & (row.boxes[:, 3] > row.boxes[:, 1])
    return row.boxes[kept], row.labels[kept]
