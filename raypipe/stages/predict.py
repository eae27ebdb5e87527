"""The predict stage: one block of pixels in; what a model finds there and a journal entry out.

Boxes are in pixels of the original images.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import nn

from raypipe.data.journal import Entry, Written
from raypipe.data.location import Location
from raypipe.data.reader import Reader, Reading
from raypipe.data.sinks import Sink
from raypipe.data.tables import PREDICTIONS, lists, unlist, whole
from raypipe.errors import UsageError, foreign, shown, words
from raypipe.images import opencv
from raypipe.images.decode import read_header
from raypipe.images.drawing import draw_boxes
from raypipe.images.header import UNREAD, Header, Reject
from raypipe.images.memory import needed
from raypipe.images.recipe import Recipe, boxes_back
from raypipe.models import checkpoint as checkpoints
from raypipe.models import detection
from raypipe.models.detection import Classes
from raypipe.models.evaluate import Found
from raypipe.models.placer import Placer, found_in, uses_bf16
from raypipe.stages.gpu import GpuMeter
from raypipe.stages.preprocess import Preprocessing
from raypipe.stages.stage import Done
from raypipe.stages.write import put_done, rejected_of, unread_of


@dataclass(frozen=True, kw_only=True)
class Predicting:
    """What decides the predictions, beside the pixels.

    checkpoint: its folder.
    recipe: the one that made the pixels, without randomness.
    min_score: boxes with a lower score are left out.
    draw_score: boxes with at least this score are drawn; None: none are.
    names: of category ids, for drawing.
    trusted: the user's own code that the checkpoint may name.
    memory: bytes that an original may take while it is drawn on. A JPEG that needs more is drawn on
        at a reduced scale.
    """

    checkpoint: str
    recipe: Recipe
    batch_size: int
    min_score: float = 0.0
    draw_score: float | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    trusted: tuple[str, ...] = ()
    memory: int = Preprocessing.memory


def load(
    folder: str, device: torch.device, *, trusted: Collection[str] = ()
) -> tuple[nn.Module, Classes, str]:
    """Load the model of a checkpoint.

    Args:
        trusted: the user's own functions and classes that it may name, as "module:name".

    Returns:
        The model on `device`, its classes, and its use of bfloat16 in training (on, off or auto).

    Raises:
        UsageError: it is no checkpoint, it names code that is not trusted, or its weights do not
            fit the model that it names.
    """
    kept = checkpoints.load(folder, trusted=trusted)
    with foreign(
        f"the checkpoint {folder}",
        remedy="Use the code it was trained with, another checkpoint, or train again.",
    ) as place:
        place.at = "settings"
        classes = Classes(tuple(map(whole, kept.settings["classes"])))
        named, amp = kept.settings["model"], kept.settings["amp"]
        place.at = ("the model", named["name"])
        model = detection.build(
            named["name"],
            num_classes=len(classes) + 1,
            arguments=named["arguments"],
            trusted=trusted,
        )
        try:
            model.load_state_dict(kept.state["model"])
        except RuntimeError as error:
            raise UsageError(
                f"The weights in {folder} do not fit the model {shown(named['name'])} "
                f"({words(error)}). Use the code it was trained with, or train again."
            ) from error
    model = model.to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    return model, classes, amp


class Predictor:
    """A trained model, loaded once. Called with a block, it returns what is in the images."""

    def __init__(self, predicting: Predicting, device: torch.device):
        self.predicting = predicting
        model, classes, amp = load(predicting.checkpoint, device, trusted=predicting.trusted)
        self._found_in = partial(
            found_in,
            model,
            placer=Placer(device, detection.finish_of(predicting.recipe), classes),
            classes=classes,
            batch_size=predicting.batch_size,
            amp=uses_bf16(amp, device),
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        """Predict on the good rows of `block` (schema BLOCK, without boxes).

        Returns:
            Those rows in order, with what the model finds there (schema PREDICTIONS).
        """
        rows = [row for row in block.select(_OF_THE_SOURCE).to_pylist() if row["reason"] is None]
        found = [
            self._placed(row, one)
            for row, (_, one) in zip(rows, self._found_in([block]), strict=True)
        ]
        columns = {
            **{name: [row[name] for row in rows] for name in ("image_id", "uri")},
            "height": [row["source_height"] for row in rows],
            "width": [row["source_width"] for row in rows],
            "orientation": [row["orientation"] for row in rows],
        }
        for name in ("boxes", "labels", "scores"):
            columns[name] = lists(
                [getattr(one, name) for one in found], PREDICTIONS.field(name).type
            )
        return pa.table(columns, schema=PREDICTIONS)

    def _placed(self, row: dict[str, Any], found: Found) -> Found:
        """What was found with a sufficient score, its boxes in pixels of the original image."""
        boxes, kept = boxes_back(
            self.predicting.recipe, found.boxes, (row["source_height"], row["source_width"])
        )
        sure = found.scores[kept] >= self.predicting.min_score
        return Found(
            boxes=boxes[sure], labels=found.labels[kept][sure], scores=found.scores[kept][sure]
        )


_OF_THE_SOURCE = [
    "epoch",
    "shard",
    "image_id",
    "name",
    "uri",
    "offset",
    "length",
    "source_height",
    "source_width",
    "orientation",
    "reason",
    "detail",
]


PART, DRAWN = "predictions/part-{shard}.parquet", "drawn/{name}.jpg"
"""Names of the results, relative to the output (`raypipe.data.outputs.Made`)."""


def part_of(shard: int) -> str:
    """The file of a shard's predictions."""
    return PART.replace("{shard}", f"{shard:06d}")


def drawing_of(name: str) -> str:
    """The file of an image with its boxes drawn; `name` is the row's."""
    return DRAWN.replace("{name}", name)


def predict_block(block: pa.Table, predictor: Predictor, sink: Sink, *, reader: Reader) -> Entry:
    """Store what is found in the good rows of `block` (schema BLOCK, without boxes).

    A row whose original cannot be read again, to be drawn on, is unread.

    Args:
        reader: of the originals, if boxes are drawn on them.
    """
    predictions = predictor(block)
    source = block.select(_OF_THE_SOURCE)
    rows = source.to_pylist()
    shard = rows[0]["shard"]
    sizes: dict[str, int] = {}
    if predictor.predicting.draw_score is not None:
        good = [row for row in rows if row["reason"] is None]
        drawn = _drawn(source, predictions, predictor.predicting, sink, reader)
        for row, made in zip(good, drawn, strict=True):
            if isinstance(made, Reject):
                row |= {
                    "reason": UNREAD,
                    "detail": f"not readable again, to be drawn on: {made.detail or made.reason}",
                }
            else:
                sink.root.write(drawing_of(row["name"]), made)
                sizes[drawing_of(row["name"])] = len(made)
        predictions = predictions.filter(
            pa.array([row["reason"] is None for row in good], pa.bool_())
        )
    if predictions.num_rows:
        out = pa.BufferOutputStream()
        pq.write_table(predictions, out, compression="zstd")
        part = memoryview(out.getvalue())
        sink.root.write(part_of(shard), part)
        sizes = {part_of(shard): len(part), **sizes}
    return Entry(
        epoch=rows[0]["epoch"],
        shard=shard,
        written=[
            Written(
                image_id=row["image_id"],
                file=part_of(shard),
                height=row["source_height"],
                width=row["source_width"],
                damaged=row["detail"] is not None,
            )
            for row in rows
            if row["reason"] is None
        ],
        rejected=rejected_of(rows),
        unread=unread_of(rows),
        files=list(sizes),
        bytes=sum(sizes.values()),
    )


def _drawn(
    rows: pa.Table,
    predictions: pa.Table,
    predicting: Predicting,
    sink: Sink,
    reader: Reader,
) -> Iterator[bytes | Reject]:
    """The good rows' originals with their boxes, as JPEGs; or why one cannot be read again."""
    if not predictions.num_rows:
        return
    assert predicting.draw_score is not None
    good = rows.filter(pc.is_null(rows.column("reason")))
    found = (unlist(predictions.column(name)) for name in ("boxes", "labels", "scores"))
    for row, data, boxes, labels, scores in zip(
        good.to_pylist(), reader.read(good), *found, strict=True
    ):
        # Ascending, so that the highest score is drawn on top.
        sure = np.flatnonzero(scores >= predicting.draw_score)[::-1]
        texts = [
            f"{predicting.names.get(label, label)} {score:.2f}"
            for label, score in zip(labels[sure], scores[sure], strict=True)
        ]
        try:
            image = _original(row, data, predicting.memory)
        except Reject as reject:
            yield Reject(reject.reason, reject.detail)  # not its traceback, which has the bytes
            continue
        scale = image.shape[1] / row["source_width"], image.shape[0] / row["source_height"]
        drawn = draw_boxes(
            image, boxes[sure] * np.asarray(scale * 2, np.float32), labels[sure], texts
        )
        yield opencv.encode(drawn, "jpeg", sink.quality)


_DRAWING = 9
"""Bytes a pixel of drawing: the image, the copy with boxes, and that copy in OpenCV's order."""


def _original(row: dict[str, Any], data: bytes | Reject, memory: int) -> np.ndarray:
    """The upright image of `row`, (height, width, 3) RGB uint8.

    A JPEG that would take more than `memory` bytes comes at 1/2, 1/4 or 1/8 of its size.

    Raises:
        Reject: it cannot be read.
    """
    if isinstance(data, Reject):
        raise data
    header = read_header(data, max_pixels=row["source_height"] * row["source_width"])
    reduce = 1
    while header.native and reduce < 8 and len(data) + _to_draw(header, reduce) > memory:
        reduce *= 2
    return opencv.decode(data, header, reduce, strict=False)


def _to_draw(header: Header, reduce: int) -> int:
    """Bytes that an image takes to be decoded at 1/`reduce` of its size and drawn on."""
    drawing = _DRAWING * header.height * header.width // reduce**2
    return max(needed(header, (), "opencv", reduce=reduce), drawing)


@dataclass(frozen=True, kw_only=True)
class Predict:
    """The step: a block of pixels (schema BLOCK) becomes predictions and a journal entry.

    What is left of the block is its counts (schema DONE).
    wait_ms: milliseconds to add to each image.
    reading: how the originals are read that are drawn on.
    """

    sink: Sink
    predicting: Predicting
    reading: Reading = field(default_factory=Reading)
    wait_ms: float = 0.0

    name = "predict"
    libraries = "torchvision"

    @property
    def memory(self) -> int:
        return self.predicting.memory if self.predicting.draw_score is not None else 0

    def elsewhere(self, folder: Location) -> Self:
        """The same step, storing into `folder`, without `wait_ms`."""
        return replace(self, sink=replace(self.sink, root=folder), wait_ms=0.0)

    def begin(self, *, threads: int, gpu: bool) -> "Predictions":
        return Predictions(self, threads, torch.device("cuda" if gpu else "cpu"))


class Predictions:
    """`Predict`, begun: call it with one block at a time."""

    def __init__(self, step: Predict, threads: int, device: torch.device):
        opencv.setup(threads)
        torch.set_num_threads(threads)
        self._step = step
        self._predictor = Predictor(step.predicting, device)
        self._reader = step.reading.reader()
        self.gpu = GpuMeter(device)

    def __call__(self, block: pa.Table) -> Done:
        step = self._step
        time.sleep(step.wait_ms / 1000 * block.num_rows)
        entry = predict_block(block, self._predictor, step.sink, reader=self._reader)
        return put_done(step.sink.root, entry, bytes_in=block.nbytes)
