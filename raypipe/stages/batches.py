"""From blocks of pixels to batches on a device, and to what a model finds in them: what training, judging and predicting share."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from raypipe import UsageError
from raypipe.data.location import StoreError
from raypipe.data.work import images_of, unlist
from raypipe.images import torchvision as on_torch
from raypipe.images.header import UNREAD
from raypipe.images.recipe import Finish, Recipe, left_of
from raypipe.models.detection import Classes
from raypipe.models.evaluate import Found, Truth


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One image of a block: pixels (height, width, 3) uint8, a view; None with a reason if it was rejected.

    `dropped`: its boxes that could not be used (journal.Dropped, as a dict); `boxes_from`: the frame they were drawn in.
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
    damaged: bool = False  # delivered all the same (--damaged keep)


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
            labels=labels[at]
            if len(boxes[at])
            else labels[at][:0],  # of the whole image: nothing that a detector learns
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
    """Raise StoreError where a row without pixels is none that was rejected, but one that no store gave."""
    if reject["reason"] == UNREAD:
        raise StoreError(
            f"{reject['uri']} could not be read ({reject['detail']}), and without it a row would be missed"
        )


def batches(blocks: Iterable[pa.Table], size: int) -> Iterator[Batch]:
    """Batches of `size` good rows, in the order of `blocks`; none spans two epochs, so the last of each may be smaller.

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
                        f"a row of epoch {row.epoch} came after one of epoch {rows[0].epoch}; blocks must come in order"
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A batch on the device: images float (3, height, width) each, targets as the model wants them. Ready after the event."""

    batch: Batch
    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    ready: torch.cuda.Event | None = None


class Placer:
    """Brings batches to a device, finished. On CUDA: from pinned memory, on a stream of its own.

    Args:
        left: a recipe whose ops the preprocess actors left to the device (`Preprocessing.decode_only`): done here, drawn from `seed` as they
            would have. None: blocks are as the recipe makes them.
    """

    def __init__(
        self,
        device: torch.device,
        finish: Finish,
        classes: Classes,
        *,
        left: Recipe | None = None,
        seed: int = 0,
    ):
        self._device = device
        # The models want channels first and float32; autocast makes bf16 of it where that is wanted.
        self._finish = replace(finish, layout="chw", dtype="float32")
        self._classes = classes
        self._left, self._seed = left, seed
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Placed:
        if self._stream is None:
            images, targets = self._made(batch)
            return Placed(batch=batch, images=images, targets=targets)
        with torch.cuda.stream(self._stream):
            images, targets = self._made(batch)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return Placed(batch=batch, images=images, targets=targets, ready=ready)

    def take(self, placed: Placed) -> None:
        """Make the current stream wait for the batch, and keep its memory until that stream is done with it."""
        if placed.ready is None:
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(placed.ready)
        for tensor in [
            *placed.images,
            *(tensor for target in placed.targets for tensor in target.values()),
        ]:
            tensor.record_stream(stream)

    def _made(self, batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        rows = batch.good
        if not rows:
            return [], []
        if self._left is None:
            sizes = {row.pixels.shape for row in rows if row.pixels is not None}
            pixels = [row.pixels for row in rows if row.pixels is not None]
            images = (
                self._sent(pixels)
                if len(sizes) == 1
                else [self._sent([image])[0] for image in pixels]
            )
        else:
            rows, images = self._executed(rows, self._left)
        return self._finished(images), self._targets(rows)

    def _executed(self, rows: list[Row], recipe: Recipe) -> tuple[list[Row], Tensor | list[Tensor]]:
        """The rows with the boxes that the recipe leaves them, and their images after its ops: those that have the same size and the same
        ops go through them together."""
        planned, pixels, alike = [], list[np.ndarray](), dict[Any, list[int]]()
        for at, row in enumerate(rows):
            assert row.pixels is not None
            size = row.pixels.shape[:2]
            plan = recipe.plan(
                seed=self._seed, epoch=row.epoch, image_id=row.image_id, size=size, boxes=row.boxes
            )
            labels, crowds = (
                left_of(values, plan.keep, boxes=len(row.boxes))
                for values in (row.labels, row.crowds)
            )
            pixels.append(row.pixels)
            planned.append(replace(row, boxes=plan.boxes, labels=labels, crowds=crowds))
            alike.setdefault((size, plan.ops), []).append(at)
        images: dict[int, Tensor] = {}
        for (_, ops), members in alike.items():
            together = self._sent([pixels[at] for at in members]).permute(0, 3, 1, 2)
            for op in ops:
                together = on_torch.apply(op, together)
            images |= dict(zip(members, together.permute(0, 2, 3, 1), strict=True))
        in_order = [images[at] for at in range(len(rows))]
        return planned, torch.stack(in_order) if len(
            {image.shape for image in in_order}
        ) == 1 else in_order

    def _finished(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        if isinstance(images, Tensor):
            return list(on_torch.finish(images, self._finish))
        if self._finish.pad_multiple is None:  # the model pads
            return [on_torch.finish(image[None], self._finish)[0] for image in images]
        padded = on_torch.finish(images, self._finish)
        return [
            image[:, : of.shape[0], : of.shape[1]] for image, of in zip(padded, images, strict=True)
        ]

    def _sent(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """uint8 (n, height, width, 3) on the device, from images of one size."""
        together = torch.empty(
            (len(pixels), *pixels[0].shape), dtype=torch.uint8, pin_memory=self._stream is not None
        )
        np.stack(pixels, out=together.numpy())
        return together.to(self._device, non_blocking=True)

    def _targets(self, rows: list[Row]) -> list[dict[str, Tensor]]:
        targets = []
        for row in rows:
            boxes, labels = trainable(row)
            classes = self._classes.of(labels)
            targets.append(
                {
                    "boxes": torch.from_numpy(np.ascontiguousarray(boxes, np.float32)).to(
                        self._device, non_blocking=True
                    ),
                    "labels": torch.from_numpy(classes).to(self._device, non_blocking=True),
                }
            )
        return targets


def trainable(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) and labels (n,) to learn from: no crowds, and none that the recipe left without an area."""
    if len(row.labels) != len(row.boxes):
        raise UsageError(
            f"image {row.image_id} has {len(row.boxes)} boxes, but {len(row.labels)} labels, so it is unknown what is in them. Give a label for "
            f"each box, or leave the image out."
        )
    kept = (row.boxes[:, 2] > row.boxes[:, 0]) & (row.boxes[:, 3] > row.boxes[:, 1])
    if len(row.crowds):
        kept &= ~row.crowds
    return row.boxes[kept], row.labels[kept]


def uses_bf16(amp: str, device: torch.device) -> bool:
    """Whether the model computes in bfloat16 on `device`, by a training's setting: on, off, or auto, where a GPU has it."""
    return amp == "on" or (
        amp == "auto"
        and device.type == "cuda"
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )


# Not inference_mode: anchors that a model keeps between calls would then be tensors that training must not touch.
@torch.no_grad()
def found_in(
    model: nn.Module,
    blocks: Iterable[pa.Table],
    *,
    placer: Placer,
    classes: Classes,
    batch_size: int,
    amp: bool,
) -> Iterator[tuple[Row, Found]]:
    """The good images of `blocks` in order, each with what the model finds there, by the data set's category ids. Leaves it in eval mode."""
    model.eval()
    for batch in batches(blocks, batch_size):
        placed = placer(batch)
        placer.take(placed)
        if not placed.images:
            continue
        with torch.autocast(placed.images[0].device.type, torch.bfloat16, enabled=amp):
            results = model(placed.images)
        for row, result in zip(batch.good, results, strict=True):
            yield (
                row,
                Found(
                    boxes=result["boxes"].float().cpu().numpy(),
                    labels=classes.ids_of(result["labels"].cpu().numpy()),
                    scores=result["scores"].float().cpu().numpy(),
                ),
            )


def evaluate(
    model: nn.Module,
    blocks: Iterable[pa.Table],
    *,
    placer: Placer,
    classes: Classes,
    batch_size: int,
    amp: bool,
) -> list[tuple[Truth, Found]]:
    """What is in the good images of `blocks`, and what the model finds there, by the data set's category ids. Leaves it in eval mode."""
    found = found_in(model, blocks, placer=placer, classes=classes, batch_size=batch_size, amp=amp)
    return [
        (Truth(boxes=row.boxes, labels=row.labels, crowds=row.crowds), seen) for row, seen in found
    ]
