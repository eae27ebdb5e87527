"""The preprocess stage: one shard of work rows in, one block of pixels out, row for row."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe.data.reader import CHUNK_BYTES, CHUNK_ROWS, Reader, Reading
from raypipe.data.tables import BLOCK, frames_of, image_column, lists, unlist
from raypipe.images import backend as backend_module
from raypipe.images.decode import MAX_PIXELS, Header, Reject, read_header
from raypipe.images.frames import into_picture
from raypipe.images.memory import MOST, needed
from raypipe.images.recipe import Plan, Recipe, left_of
from raypipe.stages.actor import Memory, Tracks, give_back_freed_memory, new_bytes
from raypipe.stages.stage import Done


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What decides the pixels of a shard: the same settings and the same rows always give the same bytes.

    `memory`: bytes that a shard's images may take in an actor: the results of all of them, and what
    one takes while it is decoded and transformed. An image that does not fit is rejected.
    `image_seconds`: of CPU; an image that takes more ends the process, and is rejected by the next.
    `decoder`: of JPEGs, one of raypipe.images.DECODERS. `damaged`: "reject" what a decoder or a
    checksum says is damaged, or "keep" what can be decoded of it.
    `decode_only`: images stay as they are decoded, and boxes as the source has them, for the recipe's ops are done later, on another device. What
    they would reject is rejected here all the same.
    """

    recipe: Recipe
    backend: str
    seed: int = 0
    max_pixels: int = MAX_PIXELS
    memory: int = 1_750_000_000
    image_seconds: float = 30.0
    decoder: str = "simplejpeg"
    damaged: str = "reject"
    decode_only: bool = False

    @property
    def done_here(self) -> Recipe:
        """The recipe, without ops if these are left to others."""
        return replace(self.recipe, ops=()) if self.decode_only else self.recipe


@dataclass(frozen=True, slots=True)
class _Planned:
    data: bytes
    header: Header
    plan: Plan
    boxes_from: str | None = None


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
        killers: rows not to touch, because they have ended the process before, and why they are rejected.
        mark: called with a row's number before it is touched.
        memory: gives an array of so many bytes (uint8, one dimension) for the pixels of all rows.

    Returns:
        A table of schema BLOCK with the same rows in the same order, and the number of encoded bytes read. A row that cannot be
        processed has no pixels, and a reason. The pixels of all rows are one buffer; rows of one size can be viewed as one NHWC
        array (`pixels`).
    """
    backend = backend_module(settings.backend)
    boxes = unlist(shard.column("boxes"))
    labels = unlist(shard.column("labels"))
    planned: Iterator[_Planned | Reject] = _plan(
        shard, settings, boxes, labels, reader=reader, killers=killers, mark=mark
    )
    recipe = settings.done_here
    fixed = recipe.fixed_size
    if fixed is not None:
        planned = _together(planned)
        pixels = memory(shard.num_rows * fixed[0] * fixed[1] * 3)
    else:
        # Sizes are known before decoding, from the headers: one buffer all the same, for the price of reading all rows first.
        planned = iter(known := list(planned))
        pixels = memory(
            sum(p.plan.size[0] * p.plan.size[1] * 3 for p in known if isinstance(p, _Planned))
        )

    end = 0
    bytes_in = 0
    offsets = np.zeros(shard.num_rows + 1, np.int64)
    sizes = np.zeros((shard.num_rows, 4), np.int32)
    rejects: dict[int, Reject] = {}
    details: dict[int, str] = {}
    plans: list[Plan | None] = []
    origins: list[tuple[int | None, str | None]] = []  # orientation, boxes_from
    for row, item in enumerate(planned):
        plan = None
        origin: tuple[int | None, str | None] = (None, None)
        if isinstance(item, Reject):
            rejects[row] = item
        else:
            bytes_in += len(item.data)
            mark(row)
            height, width = item.plan.size
            start, end_if_fine = end, end + height * width * 3
            out = pixels[start:end_if_fine].reshape(height, width, 3)
            try:
                reduce = recipe.reduce((item.header.height, item.header.width))
                image, damage = _decoded(backend, item, reduce, settings)
                if damage:
                    details[row] = damage
                large = item.plan.largest > LARGE
                if large:
                    give_back_freed_memory()
                backend.execute(image, item.plan.ops, out)
                image = None  # not beside the next one
                if large:
                    give_back_freed_memory()
                plan, end = item.plan, end_if_fine
                origin = item.header.orientation, item.boxes_from
                sizes[row] = item.header.height, item.header.width, height, width
            except Reject as reject:
                # Not itself: its traceback has this frame, and with it all pixels until Python looks for cycles.
                rejects[row] = Reject(reject.reason, reject.detail)
            except Exception as error:
                # Whatever an op raises, its own image pays for it, not the other hundred of the shard.
                rejects[row] = Reject("failed", f"{type(error).__name__}: {error}")
        offsets[row + 1] = end
        plans.append(plan)
        origins.append(origin)

    null = np.array([plan is None for plan in plans], dtype=bool)
    keep = [np.empty(0, np.int64) if plan is None else plan.keep for plan in plans]
    columns = {
        name: shard.column(name)
        for name in ("epoch", "shard", "image_id", "name", "uri", "offset", "length")
    }
    columns |= {
        "source_height": pa.array(sizes[:, 0], mask=null),
        "source_width": pa.array(sizes[:, 1], mask=null),
        "height": pa.array(sizes[:, 2], mask=null),
        "width": pa.array(sizes[:, 3], mask=null),
        "image": _binary(pixels[:end], offsets, null),
        "reason": pa.array(
            [rejects[row].reason if row in rejects else None for row in range(len(plans))],
            pa.string(),
        ),
        "detail": pa.array(
            [
                rejects[row].detail if row in rejects else details.get(row)
                for row in range(len(plans))
            ],
            pa.string(),
        ),
        "boxes": lists(
            [np.empty((0, 4)) if p is None else p.boxes for p in plans], BLOCK.field("boxes").type
        ),
        "orientation": pa.array([orientation for orientation, _ in origins], pa.int8()),
        "boxes_from": pa.array([boxes_from for _, boxes_from in origins], pa.string()),
        "boxes_dropped": _dropped(shard, plans, boxes),
    }
    for name, values in (("labels", labels), ("crowds", None), ("annotation_ids", None)):
        values = unlist(shard.column(name)) if values is None else values
        chosen = [left_of(v, k, boxes=len(b)) for v, k, b in zip(values, keep, boxes, strict=True)]
        columns[name] = lists(chosen, BLOCK.field(name).type)
    return pa.table(columns, schema=BLOCK), bytes_in


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


def _decoded(
    backend: ModuleType, item: _Planned, reduce: int, settings: Preprocessing
) -> tuple[Any, str | None]:
    """The image, as the backend has it; and what is damaged in it, where it is delivered all the same."""
    try:
        return backend.decode(item.data, item.header, reduce, decoder=settings.decoder), None
    except Reject as reject:
        if reject.reason != "damaged" or settings.damaged != "keep":
            raise
        return backend.decode(
            item.data, item.header, reduce, decoder=settings.decoder, strict=False
        ), reject.detail


class _Room:
    """The memory of a shard: `held` are bytes that its results take from the start."""

    def __init__(self, settings: Preprocessing, held: int) -> None:
        self._settings = settings
        self._scratch = backend_module(settings.backend).SCRATCH
        self._held = held

    def take(self, data: bytes, header: Header, plan: Plan, *, keep: bool) -> None:
        """Room for an image, while it is worked on; with `keep` also for its bytes and its result until the shard is done.

        Raises:
            Reject: there is not enough.
        """
        kept = len(data) + plan.size[0] * plan.size[1] * 3 if keep else 0
        if self._held + kept + len(data) + MOST * plan.largest > self._settings.memory:
            decoded = (
                header if self._settings.decoder == "simplejpeg" else replace(header, native=False)
            )
            reduce = self._settings.done_here.reduce((header.height, header.width))
            most = needed(decoded, plan.ops, self._scratch, reduce=reduce) + len(data) * (not keep)
            if self._held + kept + most > self._settings.memory:
                others = (
                    f", and others of its shard {self._held / 1e9:.2f} GB"
                    if self._held > 5_000_000
                    else ""
                )
                raise Reject(
                    "too large for --actor-memory",
                    f"{header.width}x{header.height} pixels ({header.format}) take {(kept + most) / 1e9:.2f} GB to decode and "
                    f"transform{others}; there are {self._settings.memory / 1e9:.2f} GB",
                )
        self._held += kept


def _plan(shard, settings, boxes, labels, *, reader, killers, mark) -> Iterator[_Planned | Reject]:
    """Each row's bytes, header and sampled ops; or why there are none."""
    epochs = shard.column("epoch").to_pylist()
    image_ids = shard.column("image_id").to_pylist()
    recipe, here = settings.recipe, settings.done_here
    fixed = here.fixed_size
    room = _Room(settings, 0 if fixed is None else shard.num_rows * fixed[0] * fixed[1] * 3)
    random, boxed = recipe.random, any(len(of) for of in boxes)
    frames = frames_of(shard).tolist() if boxed else []
    plans: dict[
        tuple[int, int], Plan
    ] = {}  # of sizes seen, where nothing else decides: a plan takes 20 us, 1% of a small image
    for row, data in enumerate(reader.read(shard)):
        if row in killers:
            yield killers[row]
            continue
        if isinstance(data, Reject):
            yield data
            continue
        mark(row)
        try:
            header = read_header(data, max_pixels=settings.max_pixels)
            if len(labels[row]) and len(labels[row]) != len(boxes[row]) and len(boxes[row]):
                raise Reject("bad boxes", f"{len(boxes[row])} boxes, but {len(labels[row])} labels")
            size = header.height, header.width
            of_row, boxes_from = boxes[row], None
            if len(of_row):
                of_row, boxes_from = into_picture(
                    of_row, tuple(frames[row]), size, header.orientation
                )
            plan = plans.get(size)
            if plan is None:
                of_image = {
                    "seed": settings.seed,
                    "epoch": epochs[row],
                    "image_id": image_ids[row],
                    "size": size,
                    "boxes": of_row,
                }
                plan = recipe.plan(**of_image)
                if here is not recipe:
                    plan = here.plan(**of_image)
                if not random and not boxed:
                    plans[size] = plan
            room.take(data, header, plan, keep=fixed is None)
        except Reject as reject:
            yield reject
        except Exception as error:
            yield Reject("failed", f"{type(error).__name__}: {error}")
        else:
            yield _Planned(data, header, plan, boxes_from)


def _together(items: Iterator[_Planned | Reject]) -> Iterator[_Planned | Reject]:
    """`items`, as many of them made before the first is given as the reader reads together: what of Python and of this file that takes has left the processor's caches whenever
    another image was decoded (1% of a small image)."""
    some: list[_Planned | Reject] = []
    size = 0
    for item in items:
        some.append(item)
        size += len(item.data) if isinstance(item, _Planned) else 0
        if len(some) == CHUNK_ROWS or size > CHUNK_BYTES:
            yield from some
            some, size = [], 0
    yield from some


def _binary(pixels: np.ndarray, offsets: np.ndarray, null: np.ndarray) -> pa.Array:
    """`pixels` as an Arrow binary array, without a copy."""
    validity = pa.py_buffer(np.packbits(~null, bitorder="little")) if null.any() else None
    return pa.Array.from_buffers(
        pa.large_binary(),
        len(null),
        [validity, pa.py_buffer(offsets), pa.py_buffer(pixels)],
        null_count=int(null.sum()),
    )


def pixels(block: pa.Table) -> np.ndarray:
    """The images of a block, rejected rows left out, as one uint8 array (n, height, width, 3), a view of the block.

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
            f"the images of this block have {len(sizes)} sizes, such as {sorted(sizes)[:2]}; they are no one array"
        )
    if not sizes:
        return np.empty((0, 0, 0, 3), np.uint8)
    column = image_column(good)
    first = np.frombuffer(column.buffers()[1], np.int64)[column.offset]
    height, width = sizes.pop()
    flat = np.frombuffer(column.buffers()[2], np.uint8, len(column) * height * width * 3, first)
    return flat.reshape(len(column), height, width, 3)


LARGE = 16_000_000
"""Pixels of an image from which on freed memory is given back after each step: what decoding took is of no use for a float
copy of another size, and both together would be more than `--actor-memory`."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The step: a shard of work rows (schema WORK) becomes a block of pixels (schema BLOCK).

    `tracks`: local folder, of one run. `wait_ms`: more than it takes, an image. `bytes_out`: of the
    pixels of a shard, as far as known.
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
