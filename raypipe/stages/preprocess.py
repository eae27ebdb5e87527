"""The preprocess stage: one shard of work rows in, one block of pixels out, row for row."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from raypipe.data.reader import Reader, Reading
from raypipe.data.tables import BLOCK, image_column, lists, unlist
from raypipe.images import backend as backend_module
from raypipe.images.header import Reject
from raypipe.images.recipe import Plan, left_of
from raypipe.stages.actor import Memory, Tracks, give_back_freed_memory, new_bytes
from raypipe.stages.planning import (
    Planned,
    Planner,
    Preprocessing,
    bytes_of,
    in_chunks,
    plan_rows,
)
from raypipe.stages.stage import Done

LARGE = 16_000_000
"""Images with more pixels have freed memory given back to the kernel after each step. What decoding
took is of no use for a float copy of another size; both would exceed `--actor-memory`."""


def preprocess_shard(
    shard: pa.Table,
    settings: Preprocessing,
    *,
    reader: Reader,
    killers: Mapping[int, Reject] = MappingProxyType({}),
    mark: Callable[[int], None] = lambda row: None,
    memory: Callable[[int], np.ndarray] = new_bytes,
) -> tuple[pa.Table, int]:
    """Read, decode and transform the images of `shard` (schema WORK).

    Args:
        reader: gives each row's encoded bytes, in order.
        killers: rows not to touch, because they ended the process before; each with its reject.
        mark: called with a row's number before the row is touched.
        memory: allocates bytes (uint8, one dimension) for the pixels of all rows.

    Returns:
        A table of schema BLOCK with the same rows in the same order, and the number of encoded
        bytes read. A row that cannot be processed has no pixels, and a reason. The pixels of all
        rows are one buffer; rows of one size can be viewed as one NHWC array (`pixels`).
    """
    boxes, labels = unlist(shard.column("boxes")), unlist(shard.column("labels"))
    planner = Planner(shard, settings, boxes, labels)
    planned = plan_rows(reader.read(shard), planner, killers=killers, mark=mark)
    fixed = settings.done_here.fixed_size
    if fixed is not None:
        planned = in_chunks(planned)
        size = shard.num_rows * fixed[0] * fixed[1] * 3
    else:
        # All rows are read first: one buffer needs the sum of the sizes, which the headers give.
        planned = iter(known := list(planned))
        size = sum(bytes_of(item.plan) for item in known if isinstance(item, Planned))
    results = _Results(settings, memory(size), rows=shard.num_rows)
    bytes_in = 0
    for row, item in enumerate(planned):
        if isinstance(item, Planned):
            bytes_in += len(item.data)
            mark(row)
            results.add(item)
        else:
            results.reject(item.reason, item.detail)
    return results.block(shard, boxes, labels), bytes_in


@dataclass(frozen=True, slots=True)
class _Row:
    """What became of a row. `plan`: None if it was rejected; then there is a `reason`."""

    plan: Plan | None = None
    reason: str | None = None
    detail: str | None = None
    orientation: int | None = None
    boxes_from: str | None = None


class _Results:
    """The rows of a shard as they are done, and the block that they become.

    Args:
        pixels: the buffer for the pixels of all rows.
        rows: their number.
    """

    def __init__(self, settings: Preprocessing, pixels: np.ndarray, *, rows: int) -> None:
        self._settings, self._recipe = settings, settings.done_here
        self._backend = backend_module(settings.backend)
        self._pixels, self._end = pixels, 0
        self._rows: list[_Row] = []
        self._offsets = np.zeros(rows + 1, np.int64)
        self._sizes = np.zeros((rows, 4), np.int32)

    def reject(self, reason: str, detail: str | None) -> None:
        """Add a row without pixels."""
        self._add(_Row(reason=reason, detail=detail))

    def add(self, item: Planned) -> None:
        """Decode and transform the next row's image."""
        try:
            damage = self._execute(item)
        except Reject as reject:
            self.reject(reject.reason, reject.detail)
        except Exception as error:
            # An op may raise anything. Its image is rejected; the others of the shard go on.
            self.reject("failed", f"{type(error).__name__}: {error}")
        else:
            header, (height, width) = item.header, item.plan.size
            self._sizes[len(self._rows)] = header.height, header.width, height, width
            self._end += bytes_of(item.plan)
            self._add(_Row(item.plan, None, damage, header.orientation, item.boxes_from))

    def _add(self, row: _Row) -> None:
        self._rows.append(row)
        self._offsets[len(self._rows)] = self._end

    def _execute(self, item: Planned) -> str | None:
        """Write an image's pixels at the end of the buffer. Returns what is damaged in it."""
        plan, header = item.plan, item.header
        out = self._pixels[self._end : self._end + bytes_of(plan)].reshape(*plan.size, 3)
        image, damage = self._decoded(item, self._recipe.reduce((header.height, header.width)))
        if plan.largest > LARGE:
            give_back_freed_memory()
        self._backend.execute(image, plan.ops, out)
        del image  # before the memory of the next one is taken
        if plan.largest > LARGE:
            give_back_freed_memory()
        return damage

    def _decoded(self, item: Planned, reduce: int) -> tuple[object, str | None]:
        """The image, as the backend has it; and what is damaged in it, if such are kept."""
        decoder = self._settings.decoder
        try:
            return self._backend.decode(item.data, item.header, reduce, decoder=decoder), None
        except Reject as reject:
            if reject.reason != "damaged" or self._settings.damaged != "keep":
                raise
            image = self._backend.decode(
                item.data, item.header, reduce, decoder=decoder, strict=False
            )
            return image, reject.detail or None

    def block(
        self, shard: pa.Table, boxes: Sequence[np.ndarray], labels: Sequence[np.ndarray]
    ) -> pa.Table:
        """The table (schema BLOCK) of all rows, which were those of `shard`."""
        rows, sizes = self._rows, self._sizes
        null = np.array([row.plan is None for row in rows], dtype=bool)
        same = ("epoch", "shard", "image_id", "name", "uri", "offset", "length")
        columns = {name: shard.column(name) for name in same}
        columns |= {
            "source_height": pa.array(sizes[:, 0], mask=null),
            "source_width": pa.array(sizes[:, 1], mask=null),
            "height": pa.array(sizes[:, 2], mask=null),
            "width": pa.array(sizes[:, 3], mask=null),
            "image": _binary(self._pixels[: self._end], self._offsets, null),
            "reason": pa.array([row.reason for row in rows], pa.string()),
            "detail": pa.array([row.detail for row in rows], pa.string()),
            "orientation": pa.array([row.orientation for row in rows], pa.int8()),
            "boxes_from": pa.array([row.boxes_from for row in rows], pa.string()),
        }
        return pa.table(
            columns | _annotations(shard, [row.plan for row in rows], boxes, labels), schema=BLOCK
        )


def _annotations(
    shard: pa.Table,
    plans: Sequence[Plan | None],
    boxes: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
) -> dict[str, pa.Array]:
    """The columns of schema BLOCK that say what is in the images, as their ops leave it.

    Args:
        plans: of the rows; None for a rejected one.
        boxes, labels: of the rows, as the source has them.
    """
    placed = [np.empty((0, 4)) if plan is None else plan.boxes for plan in plans]
    columns = {
        "boxes": lists(placed, BLOCK.field("boxes").type),
        "boxes_dropped": _dropped(shard, plans, boxes),
    }
    keep = [np.empty(0, np.int64) if plan is None else plan.keep for plan in plans]
    for name in ("labels", "crowds", "annotation_ids"):
        values = labels if name == "labels" else unlist(shard.column(name))
        chosen = [left_of(v, k, boxes=len(b)) for v, k, b in zip(values, keep, boxes, strict=True)]
        columns[name] = lists(chosen, BLOCK.field(name).type)
    return columns


def _dropped(
    shard: pa.Table, plans: Sequence[Plan | None], boxes: Sequence[np.ndarray]
) -> pa.Array:
    """The column boxes_dropped (schema BLOCK)."""
    if not any(plan is not None and plan.dropped for plan in plans):
        return pa.array([[]] * len(plans), BLOCK.field("boxes_dropped").type)
    column = []
    for plan, of, ids in zip(plans, boxes, unlist(shard.column("annotation_ids")), strict=True):
        bad = () if plan is None else plan.dropped
        known = len(ids) == len(of)
        column.append(
            [
                {
                    "box": of[at].tolist(),
                    "annotation_id": int(ids[at]) if known else None,
                    "reason": why,
                }
                for at, why in bad
            ]
        )
    return pa.array(column, BLOCK.field("boxes_dropped").type)


def _binary(pixels: np.ndarray, offsets: np.ndarray, null: np.ndarray) -> pa.Array:
    """View `pixels` as an Arrow binary array, without a copy."""
    validity = pa.py_buffer(np.packbits(~null, bitorder="little")) if null.any() else None
    return pa.Array.from_buffers(
        pa.large_binary(),
        len(null),
        [validity, pa.py_buffer(offsets), pa.py_buffer(pixels)],
        null_count=int(null.sum()),
    )


def pixels(block: pa.Table) -> np.ndarray:
    """View the images of a block as one uint8 array (n, height, width, 3), without rejected rows.

    Raises:
        ValueError: the images differ in size.
    """
    good = (
        block.filter(pa.compute.is_valid(block.column("image")))
        if block.column("image").null_count
        else block
    )
    sizes = set(
        zip(good.column("height").to_pylist(), good.column("width").to_pylist(), strict=True)
    )
    if len(sizes) > 1:
        raise ValueError(
            f"the images of this block have {len(sizes)} sizes, such as {sorted(sizes)[:2]}; "
            f"they are no one array"
        )
    if not sizes:
        return np.empty((0, 0, 0, 3), np.uint8)
    column = image_column(good)
    first = np.frombuffer(column.buffers()[1], np.int64)[column.offset]
    height, width = sizes.pop()
    flat = np.frombuffer(column.buffers()[2], np.uint8, len(column) * height * width * 3, first)
    return flat.reshape(len(column), height, width, 3)


# --- the step --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The step: a shard of work rows (schema WORK) becomes a block of pixels (schema BLOCK).

    tracks: local folder, of one run.
    wait_ms: milliseconds to add to each image.
    bytes_out: of the pixels of a shard, as far as known.
    """

    pixels: Preprocessing
    tracks: str
    reading: Reading = field(default_factory=Reading)
    wait_ms: float = 0.0
    bytes_out: int = 0

    name = "preprocess"

    @property
    def libraries(self) -> str:
        return self.pixels.backend

    @property
    def memory(self) -> int:
        return self.pixels.memory

    def begin(self, *, threads: int, gpu: bool = False) -> "Preprocessor":
        return Preprocessor(self, threads)


class Preprocessor:
    """`Preprocess`, begun: call it with one shard at a time."""

    gpu = None

    def __init__(self, step: Preprocess, threads: int):
        backend_module(step.pixels.backend).setup(threads)
        self._pixels = step.pixels
        self._wait_s = step.wait_ms / 1000
        self._reader = step.reading.reader()
        self._tracks = Tracks(step.tracks, image_seconds=step.pixels.image_seconds)
        self._memory = Memory(step.bytes_out)

    def __call__(self, block: pa.Table) -> Done:
        number = block.column("shard")[0].as_py()
        made, bytes_in = preprocess_shard(
            block,
            self._pixels,
            reader=self._reader,
            killers=self._tracks.killers(number),
            mark=lambda row: self._tracks.mark(number, row),
            memory=self._memory,
        )
        self._tracks.mark(-1, -1)
        time.sleep(self._wait_s * block.num_rows)
        return Done(block=made, images=made.num_rows, bytes_in=bytes_in, bytes_out=made.nbytes)
