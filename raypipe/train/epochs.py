"""The rows of all epochs as tables of work, from a position on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from raypipe.data.tables import WORK
from raypipe.data.work import Weigh, Weights, make_work, order_of
from raypipe.train.peers import Peers
from raypipe.train.position import Position, Range, ranges_of
from raypipe.train.steps import Equal, Step, steps

SEGMENT_ROWS = 1_000_000
"""Rows of one execution, at least an epoch. Its table is in memory, with 200 bytes a row. Actors
start anew for the next one, which takes seconds, where a million images take many minutes."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Epochs that are one execution.

    work: the rows that are left (schema WORK), shard after shard.
    places: the places in their epoch of each shard's rows, in their order.
    left: number of rows of each epoch.
    """

    epochs: range
    work: pa.Table
    places: dict[int, list[Range]]
    left: dict[int, int]

    def steps(
        self,
        blocks: Iterable[pa.Table],
        *,
        size: int,
        peers: Peers,
        equal: Equal = None,
        joins: bool = True,
    ) -> Iterator[Step]:
        """The steps of a rank that gets `blocks` of these epochs (`steps.steps`)."""
        return steps(
            iter(blocks),
            self.places,
            epochs=self.epochs,
            size=size,
            exchange=peers.exchange,
            # Of several ranks nobody knows beforehand which rows each gets.
            left=self.left if peers.size == 1 else {},
            equal=equal,
            joins=joins,
        )

    def without_rows(self) -> "Segment":
        """The segment as ranks need it that only take blocks."""
        return replace(self, work=self.work.slice(0, 0))


@dataclass(kw_only=True)
class Epochs:
    """All epochs of a loader or a training.

    source: the rows of an epoch (schema SOURCE).
    seed: of each epoch's order; None: the order of `source`.
    rows_per_shard: at most.
    weigh: as in `make_work`.
    """

    source: pa.Table
    epochs: int
    seed: int | None
    rows_per_shard: int
    weigh: Weigh | None = None
    _weighed: Weights | None = field(default=None, init=False)

    @property
    def rows(self) -> int:
        """Number of rows of an epoch."""
        return self.source.num_rows

    @property
    def total(self) -> int:
        """Number of rows of all epochs."""
        return self.rows * self.epochs

    def segments(self, position: Position, *, ranks: int) -> Iterator[Segment]:
        """What is left from `position` on, for so many ranks."""
        while position.epoch < self.epochs:
            segment = self.next(position, ranks=ranks)
            yield segment
            position = Position(epoch=segment.epochs.stop)

    def next(self, position: Position, *, ranks: int) -> Segment:
        """The first segment of what is left. It is empty if nothing is."""
        at_once = max(1, SEGMENT_ROWS // self.rows)
        epochs = range(position.epoch, min(position.epoch + at_once, self.epochs))
        tables = [WORK.empty_table()]
        places: dict[int, list[Range]] = {}
        left: dict[int, int] = {}
        for epoch in epochs:
            at = position.left(self.rows) if epoch == position.epoch else np.arange(self.rows)
            order = np.arange(self.rows)
            if self.seed is not None:
                order = order_of(epoch, self.rows, seed=self.seed)
            work = self._cut(order[at], epoch, ranks)
            shards = work.column("shard").to_numpy()
            edges = np.flatnonzero(np.diff(shards, prepend=-1))
            for shard, of in zip(shards[edges], np.split(at, edges[1:]), strict=True):
                places[int(shard)] = ranges_of(of)
            tables.append(work)
            left[epoch] = len(at)
        return Segment(epochs=epochs, work=pa.concat_tables(tables), places=places, left=left)

    def _cut(self, rows: np.ndarray, epoch: int, ranks: int) -> pa.Table:
        """The work of an epoch: rows of `source`, by number, in order."""
        weights = self._weights()
        most = self.rows_per_shard
        if ranks > 1:
            # As many shards for each rank. They go to the rank with the fewest rows so far.
            most = max(len(rows) // (ranks * -(-len(rows) // (most * ranks))), 1)
        return make_work(
            self.source.take(pa.array(rows)),
            rows_per_shard=most,
            taper=ranks > 1 and weights is not None,
            weigh=None if weights is None else lambda _: weights.taken(rows),
            epoch=epoch,
            first_shard=epoch * self.rows,
        )

    def _weights(self) -> Weights | None:
        """The weights of the rows of `source`: reading headers takes 35 us an image."""
        if self.weigh is None:
            return None
        if self._weighed is None:
            self._weighed = self.weigh(self.source)
        return self._weighed

    def steps(self, batch_size: int, *, ranks: int, equal: Equal) -> int:
        """Number of steps of an epoch in which no row is rejected."""
        shards = [self.rows]
        if ranks > 1:
            work = self._cut(np.arange(self.rows), 0, ranks)
            shards = np.bincount(work.column("shard").to_numpy()).tolist()
        rows = dealt(shards, ranks)
        if equal == "drop":
            return min(rows) // batch_size
        return -(-(max(rows) if equal == "repeat" else min(rows)) // batch_size)


def dealt(shards: list[int], ranks: int) -> list[int]:
    """Rows of each rank if each shard goes to the rank with the fewest rows so far.

    That is how Ray Data splits a dataset whose blocks keep their order.
    """
    rows = [0] * ranks
    for count in shards:
        rows[rows.index(min(rows))] += count
    return rows
