"""The table of work: one row an image, all epochs in one table, cut into shards of adjacent rows.

A run's table is stored beside its results. A row keeps its shard for ever, so the names of part
files never change. Rows that are found later get new shards. The work left to do is the table less
the journal.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data.names import unique_names
from raypipe.data.tables import SOURCE, WORK, lists, unlist

SHARD_BYTES = 64 * 2**20
"""Output of one shard.

A Ray Data task costs about 7 ms, where a 300x300 image costs 2.3 ms. 64 MiB (248 such images) take
4% less CPU than 32 MiB (median of interleaved runs). The next doubling would only delay the first
output and fill the object store.
"""

MIN_SHARD_ROWS, MAX_SHARD_ROWS = 16, 256
"""Below 16 rows, a task's overhead shows even for the costliest recipes.

Above 256, small images wait too long for their shard.
"""

SHARDS_AT_LEAST = 16
"""A small input still has this many shards: several actors have work, and progress shows."""

MIN_SMALL_ROWS = 8

SHORT = 32
"""Ray Data hands out tasks ten times a second, and the fastest recipes take 3 ms an image. So two
shards of fewer rows are too few for an actor: it waits for the next one."""

RAMP, TAPER = 2, 8
"""Bounds of a shard's rows: 1/2 of the rows before it, and 1/8 of the rows from its first on.

A shard has SHORT rows all the same. The first bound makes the first output come soon. The second
keeps the last shards short, as actors wait for the slowest of them at the end. It is guided
self-scheduling (Polychronopoulos and Kuck, 1987), enough for eight actors. Each additional shard
costs 7 ms.
"""


def shard_rows(*, rows: int, row_bytes: int) -> int:
    """How many of `rows` images, each `row_bytes` of output, make a shard.

    The number depends on the input and the recipe alone, never on the actors. So the same command
    makes the same part files on any machine.
    """
    by_bytes = min(max(SHARD_BYTES // max(row_bytes, 1), MIN_SHARD_ROWS), MAX_SHARD_ROWS)
    by_count = max(-(-rows // SHARDS_AT_LEAST), MIN_SMALL_ROWS)
    return min(by_bytes, by_count)


def wanted_by(source: pa.Table, *, needs_boxes: bool, drops_crowds: bool) -> pa.Table:
    """`source` as a recipe wants it: first without boxes around crowds, then without images that
    have no box."""
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
    """The memory that rows need in an actor, and the memory that a shard may need. All in bytes.

    A shard needs the sum of its rows' `held` and the largest `peak`; this is at most `memory`.

    Attributes:
        out: int64 (n,), the usual size of a row's result.
        held: int64 (n,), at most held for a row until its shard is done.
        peak: int64 (n,), at most needed in addition while the row is processed.
        target: a shard with this much `out` is large enough.
    """

    out: np.ndarray
    held: np.ndarray
    peak: np.ndarray
    memory: int
    target: int | None

    def taken(self, order: np.ndarray) -> "Weights":
        """The weights of the rows in another order."""
        return replace(self, out=self.out[order], held=self.held[order], peak=self.peak[order])


Weigh = Callable[[pa.Table], Weights]


def order_of(epoch: int, rows: int, *, seed: int) -> np.ndarray:
    """The order of an epoch's rows: a permutation of their numbers, int64 (rows,)."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def make_work(
    source: pa.Table,
    *,
    rows_per_shard: int,
    taper: bool = False,
    weigh: Weigh | None = None,
    first_shard: int = 0,
    epoch: int = 0,
) -> pa.Table:
    """The table of work for `source` (schema SOURCE), in its order.

    Args:
        rows_per_shard: at most.
        taper: make the first and the last shards smaller (RAMP, TAPER).
        weigh: says what memory rows need, so that each shard fits.
        first_shard: the number of the first shard.
    """
    weights = None if weigh is None else weigh(source)
    shard = first_shard + _cut(source.num_rows, rows_per_shard, taper=taper, weights=weights)
    columns = {
        "epoch": pa.array(np.full(source.num_rows, epoch, np.int32)),
        "shard": pa.array(shard),
    }
    return pa.table(
        {**columns, **{name: source.column(name) for name in SOURCE.names}}, schema=WORK
    )


def _cut(
    rows: int, rows_per_shard: int, *, taper: bool, weights: Weights | None = None
) -> np.ndarray:
    """The shard, from 0 on, of each of `rows` rows, int64."""
    small = min(SHORT, rows_per_shard) if taper else rows_per_shard

    def most(at: int) -> int:
        return min(max(min(at // RAMP, (rows - at) // TAPER), small), rows_per_shard)

    if weights is not None:
        return _cut_by_weight(weights, most)
    edges = [0]
    while edges[-1] < rows:
        edges.append(min(edges[-1] + most(edges[-1]), rows))
    return np.repeat(np.arange(len(edges) - 1, dtype=np.int64), np.diff(edges))


def _cut_by_weight(weights: Weights, most: Callable[[int], int]) -> np.ndarray:
    """The shard of each row. `most`: rows of a shard that begins at a row."""
    shards_: list[int] = []
    shard = count = out = held = peak = 0
    allowed = most(0)
    rows = zip(weights.out.tolist(), weights.held.tolist(), weights.peak.tolist(), strict=True)
    for its_out, its_held, its_peak in rows:
        full = count >= allowed or (weights.target is not None and out + its_out > weights.target)
        if count and (full or held + its_held + max(peak, its_peak) > weights.memory):
            shard, count, out, held, peak = shard + 1, 0, 0, 0, 0
            allowed = most(len(shards_))
        count, out, held, peak = count + 1, out + its_out, held + its_held, max(peak, its_peak)
        shards_.append(shard)
    return np.array(shards_, np.int64)


_NUMBERED = re.compile(r"(.*)#\d+", re.DOTALL)


def named_as_before(source: pa.Table, work: pa.Table) -> pa.Table:
    """`source` with the image ids that `work` has for the same bytes.

    Only numbered ids (`a.jpg#2`) of a name that occurs several times change: their numbers shift
    when another image of this name is added before them. Ids that an image brings along stay.
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
    numbers: Counter[str] = Counter()  # of each name, the numbers known to be taken
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
    """`work` brought up to date with `source`.

    Rows in shards of `done` stay. Other rows are dropped if `source` no longer has them; else they
    get what `source` says now, and keep their shard and their name. A dropped row that comes back
    gets a new shard, because its old one may be done by then.
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
    tight: Set[int] = frozenset(),
    every: int = 1,
) -> pa.Table:
    """`work` with the rows in `waiting` (image ids, by shard) moved to new shards at its end.

    They keep their names.

    Args:
        tight: shards whose rows wait for want of memory. The new shards have at most as many rows
            as the smallest number that one of these had room for.
        every: shard numbers of `work` are so far apart, and those of new shards are too: others
            have the numbers in between (`raypipe.data.parts`).
    """
    if not waiting:
        return work
    keys = zip(work.column("shard").to_pylist(), work.column("image_id").to_pylist(), strict=True)
    again = np.array([image_id in waiting.get(shard, ()) for shard, image_id in keys], bool)
    rows = work.filter(pa.array(again))
    waited = Counter(rows.column("shard").to_pylist())
    had = Counter(work.column("shard").to_pylist())
    fitted = [had[shard] - waited[shard] for shard in tight & waited.keys()]
    rows_per_shard = max(min([rows_per_shard, *fitted]), 1)
    first = int(work.column("shard").to_numpy().max()) + 1
    weights = None if weigh is None else weigh(rows)
    first += every - 1  # the last number, and so many more
    cut = _cut(rows.num_rows, rows_per_shard, taper=taper, weights=weights)
    numbers = pa.array(first + every * cut)
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
    """`work` with the rows of `source` whose image ids are new, in new shards."""
    known = set(work.column("image_id").to_pylist())
    new = np.array(
        [image_id not in known for image_id in source.column("image_id").to_pylist()], dtype=bool
    )
    fresh = source.filter(pa.array(new))
    # Names on disk stay. A new name that clashes with one of them is changed.
    names = unique_names(fresh.column("name").to_pylist(), taken=work.column("name").to_pylist())
    fresh = _with(fresh, "name", pa.array(names, pa.string()))
    first = (work.column("shard").to_numpy().max() + 1) if work.num_rows else 0
    added = make_work(
        fresh, rows_per_shard=rows_per_shard, taper=taper, weigh=weigh, first_shard=int(first)
    )
    return pa.concat_tables([work, added])


def in_shards(work: pa.Table, numbers: Set[int]) -> pa.Array:
    """Whether the shard of each row of `work` is among `numbers`."""
    return pa.array(
        np.isin(work.column("shard").to_numpy(), np.fromiter(numbers, np.int64, len(numbers)))
    )


def remaining(work: pa.Table, done: Set[int]) -> pa.Table:
    """The rows of `work` whose shard is not among `done`."""
    return work.filter(pc.invert(in_shards(work, done))) if done else work


def shards(work: pa.Table) -> Iterator[pa.Table]:
    """`work` cut at its shard boundaries, in order. Rows of a shard are adjacent."""
    if not work.num_rows:
        return
    work = work.combine_chunks()
    numbers = work.column("shard").to_numpy()
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 1))
    for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
        yield work.slice(start, stop - start)
