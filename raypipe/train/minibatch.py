"""What a loader gives to the loop: images and what is in them, as tensors."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raypipe.data.batches import Row, trainable
from raypipe.images.recipe import Finish
from raypipe.models.placer import finished, gathered


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """One batch of an epoch.

    Attributes:
        images: uint8 (n, height, width, 3), RGB; a list of (height, width, 3) where sizes differ.
            With `finish="device"`: normalised float32 (n, 3, height, width) on the device, or a
            list of (3, height, width).
        labels: int64 (n,) where each image of the input has one label, of the whole image. Else a
            list of int64 (k,): of the boxes, or of an image without boxes.
        boxes: a list of float32 (k, 4), x1 y1 x2 y2 in pixels of `images`. Boxes that the recipe
            leaves without an area are not among them, and neither are their labels.
        image_ids: of the images.
        rejects: image_id, uri, reason and detail of the rows that became no image.
    """

    epoch: int
    images: Tensor | list[Tensor]
    labels: Tensor | list[Tensor]
    boxes: list[Tensor]
    image_ids: list[str]
    rejects: list[dict[str, str]]

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: Any, non_blocking: bool = False) -> "Minibatch":
        """The batch with its tensors on a device."""

        def moved(of: Any) -> Any:
            if isinstance(of, list):
                return [moved(one) for one in of]
            return of.to(device, non_blocking=non_blocking)

        tensors = {name: moved(getattr(self, name)) for name in ("images", "labels", "boxes")}
        return replace(self, **tensors)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A batch that may be given out after the event `ready`."""

    batch: Minibatch
    ready: torch.cuda.Event | None = None


class Collate:
    """Makes tensors of rows. On a CUDA device: from pinned memory, on a stream of its own.

    Args:
        one_label: whether each image of the input has one label and no boxes.
        finish: what makes float batches on `device`; None: they stay uint8, on the CPU.
    """

    def __init__(self, *, one_label: bool, finish: Finish | None, device: torch.device):
        self._one_label, self._device = one_label, device
        # What torch models take, whatever MLPerf's own runtimes want.
        self._finish = finish and replace(finish, layout="chw", dtype="float32")
        on_cuda = finish is not None and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_cuda else None

    def __call__(self, epoch: int, rows: Iterable[Row]) -> Prepared:
        if self._stream is None:
            return Prepared(batch=self._made(epoch, list(rows)))
        with torch.cuda.stream(self._stream):
            batch = self._made(epoch, list(rows))
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return Prepared(batch=batch, ready=ready)

    def take(self, prepared: Prepared) -> Minibatch:
        """Make the current stream wait for the batch, and keep its memory until it is done."""
        batch = prepared.batch
        if prepared.ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(prepared.ready)
            for of in (batch.images, batch.labels, batch.boxes):
                for tensor in of if isinstance(of, list) else [of]:
                    tensor.record_stream(stream)
        return batch

    def _made(self, epoch: int, rows: list[Row]) -> Minibatch:
        good = [row for row in rows if row.pixels is not None]
        known = [trainable(row) for row in good]
        boxes = [self._sent(boxes, np.float32) for boxes, _ in known]
        labels: Tensor | list[Tensor]
        if self._one_label:
            labels = self._sent(np.array([row.whole[0] for row in good]), np.int64)
        else:
            labels = [
                self._sent(row.whole if len(row.whole) else of, np.int64)
                for row, (_, of) in zip(good, known, strict=True)
            ]
        return Minibatch(
            epoch=epoch,
            images=self._images([row.pixels for row in good if row.pixels is not None]),
            labels=labels,
            boxes=boxes,
            image_ids=[row.image_id for row in good],
            rejects=[row.reject for row in rows if row.reject is not None],
        )

    def _images(self, pixels: list[np.ndarray]) -> Tensor | list[Tensor]:
        pinned = self._stream is not None
        together: Tensor | list[Tensor]
        if len({image.shape for image in pixels}) == 1:
            together = gathered(pixels, pinned=pinned)
        else:
            together = [gathered([image], pinned=pinned)[0] for image in pixels]
        if self._finish is None:
            return together
        if isinstance(together, list):
            return finished([self._moved(image) for image in together], self._finish)
        return finished(self._moved(together), self._finish)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _sent(self, values: np.ndarray, dtype: Any) -> Tensor:
        """A copy: the rows are views of memory that Ray frees."""
        tensor = torch.from_numpy(np.array(values, dtype))
        return tensor if self._finish is None else self._moved(tensor)
