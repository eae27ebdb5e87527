"""Batches on a device, and what a model finds in them: for training, evaluation and prediction."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from raypipe.data.batches import Batch, Row, batches, trainable
from raypipe.images import torchvision as on_torch
from raypipe.images.ops.op import Op, Size
from raypipe.images.recipe import Finish, Recipe, left_of
from raypipe.models.detection import Classes
from raypipe.models.evaluate import Found, Truth


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A batch on the device. It may be used after the event `ready`.

    images: float (3, height, width) each.
    targets: as the model takes them.
    """

    batch: Batch
    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    ready: torch.cuda.Event | None = None


class Placer:
    """Brings batches to a device, finished. On CUDA: from pinned memory, on a stream of its own.

    Args:
        left: a recipe whose ops the preprocess actors left to this device
            (`Preprocessing.decode_only`). They are done here, with the same random parameters from
            `seed`. None: blocks are as the recipe makes them.
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
        # Models take channels first and float32; autocast converts to bfloat16 if asked for.
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
        """Make the current stream wait for the batch, and keep its memory until it is done."""
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
            pixels = [row.pixels for row in rows if row.pixels is not None]
            same = len({image.shape for image in pixels}) == 1
            images = self._sent(pixels) if same else [self._sent([image])[0] for image in pixels]
        else:
            rows, images = self._executed(rows, self._left)
        return self._finished(images), self._targets(rows)

    def _executed(self, rows: list[Row], recipe: Recipe) -> tuple[list[Row], Tensor | list[Tensor]]:
        """Do the recipe's ops on the device, together for images with the same size and ops.

        Returns:
            The rows with the boxes that the recipe leaves them, and their images.
        """
        planned, pixels = [], list[np.ndarray]()
        alike: dict[tuple[Size, tuple[Op, ...]], list[int]] = {}
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
        same = len({image.shape for image in in_order}) == 1
        return planned, torch.stack(in_order) if same else in_order

    def _finished(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        ready = finished(images, self._finish)
        if isinstance(images, Tensor) or self._finish.pad_multiple is None:
            return list(ready)
        return [
            image[:, : of.shape[0], : of.shape[1]] for image, of in zip(ready, images, strict=True)
        ]

    def _sent(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """uint8 (n, height, width, 3) on the device, from images of one size."""
        together = gathered(pixels, pinned=self._stream is not None)
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


def gathered(pixels: Sequence[np.ndarray], *, pinned: bool) -> Tensor:
    """Copy images of one size together: uint8 (n, height, width, 3). The only copy of a batch."""
    together = torch.empty((len(pixels), *pixels[0].shape), dtype=torch.uint8, pin_memory=pinned)
    np.stack(pixels, out=together.numpy())
    return together


def finished(images: Tensor | list[Tensor], finish: Finish) -> Tensor | list[Tensor]:
    """Finish uint8 images where they are.

    Returns:
        One tensor if they have one size or the finish pads them to one, else a tensor each.
    """
    if isinstance(images, Tensor) or finish.pad_multiple is not None:
        return on_torch.finish(images, finish)
    return [on_torch.finish(image[None], finish)[0] for image in images]


def uses_bf16(amp: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16 on `device`. `amp`: on, off, or auto (where a GPU has it)."""
    return amp == "on" or (
        amp == "auto"
        and device.type == "cuda"
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )


# Not inference_mode: a model may keep anchors between calls, and training could not use those.
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
    """Predict on the good images of `blocks`. Leaves the model in eval mode.

    Yields:
        Each row, in order, with what the model finds there, by the data set's category ids.
    """
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
    """Predict on the good images of `blocks`. Leaves the model in eval mode.

    Returns:
        For each image what is in it and what the model finds, by the data set's category ids.
    """
    found = found_in(model, blocks, placer=placer, classes=classes, batch_size=batch_size, amp=amp)
    return [
        (Truth(boxes=row.boxes, labels=row.labels, crowds=row.crowds), seen) for row, seen in found
    ]
