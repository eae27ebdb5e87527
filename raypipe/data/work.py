"""The table of work: one row an image, one run of rows a shard, all epochs in one table.

A run's table is stored beside its results. Rows keep their shard for ever, so the name of a part file, which is a function
of its shard, never changes; rows found later get new shards. What is still to do is the table less the journal.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data.names import unique_names
from raypipe.data.tables import SOURCE

WORK = pa.schema([pa.field("epoch", pa.int32()), pa.field("shard", pa.int64()), *SOURCE])

DROPPED = pa.list_(
    pa.struct(
        [
            pa.field("box", pa.list_(pa.float32(), 4)),
            pa.field("annotation_id", pa.int64()),  # null: it has none
            pa.field("reason", pa.string()),
        ]
    )
)
"""Boxes of an image that cannot be used, as the source has them, and why."""

BLOCK = pa.schema(
    [
        pa.field("epoch", pa.int32()),
        pa.field("shard", pa.int64()),
        pa.field("image_id", pa.string()),
        pa.field("name", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("source_height", pa.int32()),  # of the image as it is shown, before the recipe
        pa.field("source_width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field(
            "image", pa.large_binary()
        ),  # HWC RGB uint8; null: rejected. Large: 16 photos of 50 MP pass 2 GiB
        pa.field("reason", pa.string()),  # null: fine
        pa.field(
            "detail", pa.string()
        ),  # of the reason; without one, what is damaged in an image that was kept
        *(SOURCE.field(name) for name in ("boxes", "labels", "crowds", "annotation_ids")),
        pa.field(
            "orientation", pa.int8()
        ),  # the EXIF number that made the picture upright; null: rejected
        pa.field(
            "boxes_from", pa.string()
        ),  # the frame that boxes were in (raypipe.images.frames); null: not known
        pa.field("boxes_dropped", DROPPED),
    ]
)
"""What a preprocess actor makes of a shard: the same rows in the same order, with pixels or with a reason. Where the bytes are (uri, offset,
length) and the source's size stay with them, for who wants to look at the original again."""

SHARD_BYTES = 64 * 2**20
"""Output of one shard. A Ray Data task costs about 7 ms, on a machine where a 300x300 image costs 2.3: 64 MiB (248 of them) take 4% less
CPU in all than 32 MiB (median of interleaved runs), and the next doubling would only delay the first output and fill the object store."""

MIN_SHARD_ROWS, MAX_SHARD_ROWS = 16, 256
"""Below 16 rows even the costliest recipes feel the task; above 256 small images wait too long for their shard."""

SHARDS_AT_LEAST = 16
"""A small input is still cut into this many shards, so that several actors have something to do and progress shows."""

MIN_SMALL_ROWS = 8

TAPERED, TAPER = 8, 4
"""The last 1/8 of the rows are cut into shards of 1/4 the size: at the end of the input actors wait for the slowest of them, on average half a
shard each (4% of a run over 20 shards by 2 actors), and a task more costs 7 ms."""


def shard_rows(*, rows: int, row_bytes: int) -> int:
    """How many of `rows` images, each `row_bytes` of output, make a shard.

    A function of the input and the recipe alone, never of the actors: the same command on another machine gives the same
    part files.
    """
    by_bytes = min(max(SHARD_BYTES // max(row_bytes, 1), MIN_SHARD_ROWS), MAX_SHARD_ROWS)
    by_count = max(-(-rows // SHARDS_AT_LEAST), MIN_SMALL_ROWS)
    return min(by_bytes, by_count)


def wanted_by(source: pa.Table, *, needs_boxes: bool, drops_crowds: bool) -> pa.Table:
    """`source` as a recipe wants it: without boxes around crowds, then without images that have no box."""
    if drops_crowds:
        crowds = unlist(source.column("crowds"))
        for name in ("boxes", "labels", "annotation_ids"):
            kept = [
                v[~c] if len(c) == len(v) else v
                for v, c in zip(unlist(source.column(name)), crowds, strict=True)
            ]
            source = _with(source, name, lists(kept, SOURCE.field(name).type))
        source = _with(
            source, "crowds", lists([c[~c] for c in crowds], SOURCE.field("crowds").type)
        )
    if needs_boxes:
        source = source.filter(pc.greater(pc.list_value_length(source.column("boxes")), 0))
    return source


def _with(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), SOURCE.field(name), column)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What rows take in an actor, bytes, int64 (n,) each; and what a shard may.

    `out`: of the result as it usually is; a shard is large enough when it has `target` of these.
    `held`: of each until its shard is done, at most. `peak`: while one is worked on. A shard takes
    the sum of what it holds and the largest peak, and that is at most `memory`.
    """

    out: np.ndarray
    held: np.ndarray
    peak: np.ndarray
    memory: int
    target: int | None

    def taken(self, order: np.ndarray) -> "Weights":
        """The same of rows in another order."""
        return replace(self, out=self.out[order], held=self.held[order], peak=self.peak[order])


Weigh = Callable[[pa.Table], Weights]


def make_work(
    source: pa.Table,
    *,
    rows_per_shard: int,
    taper: bool = False,
    weigh: Weigh | None = None,
    epochs: int = 1,
    shuffle_seed: int | None = None,
    first_shard: int = 0,
) -> pa.Table:
    """The table of work for `source` (schema SOURCE), `epochs` times, in shards of at most `rows_per_shard` rows, and of what fits
    into memory where `weigh` says what rows take.

    A shard never spans two epochs. With `taper` the last ones are smaller, so that actors finish together. With `shuffle_seed`, each epoch has a permutation of its own, a function of the seed and
    the epoch. Shard numbers go on from `first_shard`.
    """
    parts = []
    all_weights = weights = None if weigh is None else weigh(source)
    for epoch in range(epochs):
        rows = source
        if shuffle_seed is not None:
            order = np.random.default_rng([shuffle_seed, epoch]).permutation(source.num_rows)
            rows = source.take(pa.array(order))
            weights = None if all_weights is None else all_weights.taken(order)
        shard = first_shard + _cut(rows.num_rows, rows_per_shard, taper=taper, weights=weights)
        first_shard = int(shard.max(initial=first_shard - 1)) + 1
        columns = {
            "epoch": pa.array(np.full(rows.num_rows, epoch, np.int32)),
            "shard": pa.array(shard),
        }
        parts.append(
            pa.table({**columns, **{name: rows.column(name) for name in SOURCE.names}}, schema=WORK)
        )
    return pa.concat_tables(parts) if parts else WORK.empty_table()


def _cut(
    rows: int, rows_per_shard: int, *, taper: bool, weights: Weights | None = None
) -> np.ndarray:
    """The shard, from 0 on, of each of `rows` rows, int64."""
    small = max(rows_per_shard // TAPER, min(MIN_SMALL_ROWS, rows_per_shard))
    if weights is not None:
        tail = rows - rows // TAPERED if taper else rows
        return _cut_by_weight(weights, [rows_per_shard] * tail + [small] * (rows - tail))
    large = -(-(rows - rows // TAPERED) // rows_per_shard) if taper else rows
    at = np.arange(rows, dtype=np.int64)
    return np.where(
        at < large * rows_per_shard,
        at // rows_per_shard,
        large + (at - large * rows_per_shard) // small,
    )


def _cut_by_weight(weights: Weights, most_rows: list[int]) -> np.ndarray:
    """The shard of each row; `most_rows`: how many a shard with that row may have."""
    shards_: list[int] = []
    shard = count = out = held = peak = 0
    rows = zip(
        weights.out.tolist(), weights.held.tolist(), weights.peak.tolist(), most_rows, strict=True
    )
    for its_out, its_held, its_peak, most in rows:
        full = count >= most or (weights.target is not None and out + its_out > weights.target)
        if count and (full or held + its_held + max(peak, its_peak) > weights.memory):
            shard, count, out, held, peak = shard + 1, 0, 0, 0, 0
        count, out, held, peak = count + 1, out + its_out, held + its_held, max(peak, its_peak)
        shards_.append(shard)
    return np.array(shards_, np.int64)


_NUMBERED = re.compile(r"(.*)#\d+", re.DOTALL)


def named_as_before(source: pa.Table, work: pa.Table) -> pa.Table:
    """`source` with the image ids that `work` has for the same bytes, where ids are the source's numbering of a name that occurs several times:
    that changes when others of this name are added before them. Ids that an image brings along stay as they are.
    """
    if not any(
        pc.any(pc.match_substring_regex(table.column("image_id"), r"#\d+$")).as_py()
        for table in (source, work)
    ):
        return source
    columns = ("image_id", "uri", "offset")
    listed, before = (
        list(zip(*(table.column(name).to_pylist() for name in columns), strict=True))
        for table in (source, work)
    )
    ids = {image_id for image_id, _, _ in (*listed, *before)}
    repeated = {
        match[1] for image_id in ids if (match := _NUMBERED.fullmatch(image_id)) and match[1] in ids
    }
    if not repeated:
        return source

    def name_of(image_id: str) -> str:
        match = _NUMBERED.fullmatch(image_id)
        return match[1] if match and match[1] in repeated else image_id

    places: dict[tuple[str, str, int], list[str]] = {}
    for image_id, uri, offset in before:
        places.setdefault((name_of(image_id), uri, offset), []).append(image_id)
    taken, named = {image_id for image_id, _, _ in before}, []
    numbers: Counter[str] = Counter()  # of each name, those that are known to be taken
    for image_id, uri, offset in listed:
        name = name_of(image_id)
        known = places.get((name, uri, offset))
        if known:
            named.append(known.pop(0))  # the same image may be there twice
            continue
        unique = image_id
        while name in repeated and unique in taken:
            numbers[name] += 1
            unique = f"{name}#{numbers[name] + 1}"
        taken.add(unique)
        named.append(unique)
    return _with(source, "image_id", pa.array(named, pa.string()))


def renewed(work: pa.Table, source: pa.Table, done: Set[int]) -> pa.Table:
    """`work` without the rows that are neither in a shard of `done` nor among `source`; those that are still to do are as `source` has them now,
    but for their shard and their name.

    A shard that was done without a row would count as done: should the row come back, it gets a shard of its own.
    """
    at = pc.index_in(
        work.column("image_id"), value_set=source.column("image_id").combine_chunks()
    ).to_numpy()
    finished = in_shards(work, done).to_numpy(zero_copy_only=False)
    rows = np.where(finished, np.arange(work.num_rows), work.num_rows + at)[
        finished | ~np.isnan(at)
    ].astype(np.int64)
    both = pa.concat_tables([work.select(SOURCE.names), source.select(SOURCE.names)]).take(
        pa.array(rows)
    )
    kept = work.filter(pa.array(finished | ~np.isnan(at)))
    for name in ("uri", "offset", "length", "boxes", "labels", "crowds", "annotation_ids", "frame"):
        kept = kept.set_column(kept.column_names.index(name), WORK.field(name), both.column(name))
    return kept


def requeued(
    work: pa.Table,
    waiting: Mapping[int, Set[str]],
    *,
    rows_per_shard: int,
    taper: bool = False,
    weigh: Weigh | None = None,
) -> pa.Table:
    """`work` with the rows in `waiting` (image ids, by shard) in new shards at its end; they keep their names."""
    if not waiting:
        return work
    keys = zip(work.column("shard").to_pylist(), work.column("image_id").to_pylist(), strict=True)
    again = np.array([image_id in waiting.get(shard, ()) for shard, image_id in keys], bool)
    rows = work.filter(pa.array(again))
    first = int(work.column("shard").to_numpy().max()) + 1
    weights = None if weigh is None else weigh(rows)
    numbers = pa.array(first + _cut(rows.num_rows, rows_per_shard, taper=taper, weights=weights))
    rows = rows.set_column(rows.column_names.index("shard"), WORK.field("shard"), numbers)
    return pa.concat_tables([work.filter(pa.array(~again)), rows])


def extend(
    work: pa.Table,
    source: pa.Table,
    *,
    rows_per_shard: int,
    taper: bool = False,
    weigh: Weigh | None = None,
) -> pa.Table:
    """`work` with those rows of `source` added, in new shards, whose image id it does not have yet."""
    known = set(work.column("image_id").to_pylist())
    new = np.array(
        [image_id not in known for image_id in source.column("image_id").to_pylist()], dtype=bool
    )
    fresh = source.filter(pa.array(new))
    # Names that are on disk stay; what clashes with one of them gets another.
    names = unique_names(fresh.column("name").to_pylist(), taken=work.column("name").to_pylist())
    fresh = _with(fresh, "name", pa.array(names, pa.string()))
    first = (work.column("shard").to_numpy().max() + 1) if work.num_rows else 0
    added = make_work(
        fresh, rows_per_shard=rows_per_shard, taper=taper, weigh=weigh, first_shard=int(first)
    )
    return pa.concat_tables([work, added])


def in_shards(work: pa.Table, numbers: Set[int]) -> pa.Array:
    """Of each row of `work`, whether its shard is among `numbers`."""
    return pa.array(
        np.isin(work.column("shard").to_numpy(), np.fromiter(numbers, np.int64, len(numbers)))
    )


def remaining(work: pa.Table, done: Set[int]) -> pa.Table:
    """The rows of `work` whose shard is not among `done`."""
    return work.filter(pc.invert(in_shards(work, done))) if done else work


def untouched(work: pa.Table, *, epoch: int, image_ids: pa.Array) -> pa.Table:
    """The rows of `work` from `epoch` on, less those of `epoch` itself that are among `image_ids`; shards keep their numbers."""
    epochs = work.column("epoch")
    fresh = pc.invert(pc.is_in(work.column("image_id"), value_set=image_ids))
    return work.filter(pc.or_(pc.greater(epochs, epoch), pc.and_(pc.equal(epochs, epoch), fresh)))


def shards(work: pa.Table) -> Iterator[pa.Table]:
    """`work` cut at its shard boundaries, in order. Rows of a shard are adjacent."""
    if not work.num_rows:
        return
    work = work.combine_chunks()
    numbers = work.column("shard").to_numpy()
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 1))
    for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
        yield work.slice(start, stop - start)


def image_column(block: pa.Table) -> pa.LargeBinaryArray:
    """The pixels of a block (schema BLOCK) as one array."""
    chunks = block.column("image")
    return (
        chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()
    )  # which copies even a single chunk


def images_of(block: pa.Table) -> list[np.ndarray | None]:
    """The image of each row of a block (schema BLOCK), HWC RGB uint8, a view of the block's memory; None: rejected."""
    column = image_column(block)
    _, offsets, values = column.buffers()
    if values is None:  # none has pixels
        return [None] * len(column)
    flat = np.frombuffer(values, np.uint8)
    ends = np.frombuffer(offsets, np.int64)[
        column.offset : column.offset + len(column) + 1
    ].tolist()
    shapes = zip(
        block.column("height").to_pylist(),
        block.column("width").to_pylist(),
        column.is_valid().to_pylist(),
        strict=True,
    )
    rows = zip(ends[:-1], ends[1:], shapes, strict=True)
    return [
        flat[start:end].reshape(height, width, 3) if good else None
        for start, end, (height, width, good) in rows
    ]


def lists(values: Iterable[np.ndarray], type_: pa.ListType) -> pa.Array:
    """One list a row of `values` ((n,) or (n, 4) arrays) as an Arrow array of `type_`, without a Python object per element."""
    arrays = list(values)
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    element = type_.value_type
    flat: pa.Array
    if pa.types.is_fixed_size_list(element):
        boxes = [np.asarray(a, np.float32).reshape(-1) for a in arrays]
        numbers = np.concatenate(boxes) if boxes else np.empty(0, np.float32)
        flat = pa.FixedSizeListArray.from_arrays(
            pa.array(numbers, element.value_type), element.list_size
        )
    else:
        flat = pa.array(np.concatenate(arrays) if arrays else np.empty(0), element)
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=type_)


def unlist(column: pa.ChunkedArray | pa.Array) -> list[np.ndarray]:
    """The inverse of `lists`: an array a row, (n,) or (n, 4). A null is an empty one."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    element = array.type.value_type
    flat = array.flatten()
    if not len(
        flat
    ):  # np.split costs 16 us a row, 1% of a small image, and most sources have no boxes
        of_one = element.value_type if pa.types.is_fixed_size_list(element) else element
        shape = (0, element.list_size) if pa.types.is_fixed_size_list(element) else (0,)
        return [np.empty(shape, of_one.to_pandas_dtype())] * len(array)
    if pa.types.is_fixed_size_list(element):
        values = flat.flatten().to_numpy(zero_copy_only=False).reshape(-1, element.list_size)
    else:
        values = flat.to_numpy(zero_copy_only=False)
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
