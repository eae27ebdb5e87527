"""Cuts the blocks that a rank gets into its steps, in agreement with the other ranks.

A step is one batch on every rank. Before a step is given out, the ranks tell each other whether
they have images of the epoch for one more. If one has none, this step is the last of the epoch: the
others join the rows that they have left to their batch. So all ranks make the same number of steps,
none is empty, and each row is in exactly one. A loop that can do with an empty batch need not have
joined ones (`joins`): the others go on, and no batch is larger than wanted.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal, Protocol

import pyarrow as pa

from raypipe.data.batches import Batch, Row, check_read, rows_of
from raypipe.errors import UsageError
from raypipe.train.position import Range, ranges_of
from raypipe.train.seen import Seen

Equal = Literal["drop", "repeat"] | None
"""How batches become equal in size; None: they do not."""

_ALL = 2**63

Places = Mapping[int, Sequence[Range]]
"""The places of each shard's rows, in their order."""


class Exchange(Protocol):
    """Tells all ranks what one has: `Peers.exchange`."""

    def __call__(self, item: Any) -> list[Any]:
        """Give the items of all ranks, by rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of a rank.

    rows: good ones have pixels. None is good in a step that only says what became of rows: it is
        not given out to a loop of the user's.
    ranges: the places of all ranks' rows of this step.
    seen: what became of these, rank by rank.
    ends: whether the epoch is over.
    """

    epoch: int
    rows: list[Row]
    ranges: list[Range]
    seen: list[Seen]
    ends: bool

    @property
    def good(self) -> list[Row]:
        """The rows with pixels."""
        return [row for row in self.rows if row.pixels is not None]

    @property
    def rows_of_all(self) -> int:
        """How many rows of all ranks the step accounts for."""
        return sum(len(seen.image_ids) for seen in self.seen)

    @property
    def images_of_all(self) -> int:
        """How many of these have pixels."""
        return self.rows_of_all - sum(len(seen.rejects) for seen in self.seen)


class _Ahead:
    """Rows that have come and are in no step yet.

    Args:
        left: how many rows of each epoch will come; an epoch that is not there is over when a later
            one begins.
    """

    def __init__(self, blocks: Iterator[pa.Table], places: Places, left: Mapping[int, int]):
        self._blocks, self._places = blocks, places
        self._rows: dict[int, deque[tuple[Row, int]]] = defaultdict(deque)
        self._good: dict[int, int] = defaultdict(int)
        self._left = dict(left)
        self._reached = -1

    def has(self, epoch: int, good: int) -> bool:
        """Whether so many images of the epoch are there. Waits for blocks that may have some."""
        while self._good[epoch] < good and self._reached <= epoch and self._left.get(epoch, 1):
            block = next(self._blocks, None)
            if block is None:
                self._reached = epoch + 1
                break
            self._add(block)
        return self._good[epoch] >= good

    def _add(self, block: pa.Table) -> None:
        shard = block.column("shard")[0].as_py()
        places = (place for start, stop in self._places[shard] for place in range(start, stop))
        for row, place in zip(rows_of(block), places, strict=True):
            if row.reject is not None:
                check_read(row.reject)
            self._rows[row.epoch].append((row, place))
            self._good[row.epoch] += row.pixels is not None
            self._reached = max(self._reached, row.epoch)
        if row.epoch in self._left:
            self._left[row.epoch] -= block.num_rows

    def take(self, epoch: int, good: int) -> list[tuple[Row, int]]:
        """Take so many images of the epoch that are there, and the rejects before them."""
        rows = self._rows[epoch]
        taken: list[tuple[Row, int]] = []
        while rows and good:
            taken.append(rows.popleft())
            good -= taken[-1][0].pixels is not None
        self._good[epoch] -= sum(row.pixels is not None for row, _ in taken)
        return taken

    def rest(self, epoch: int) -> list[tuple[Row, int]]:
        """Take all rows of the epoch that are left. Waits for them."""
        self.has(epoch, _ALL)
        self._good.pop(epoch, None)
        return list(self._rows.pop(epoch, ()))


def steps(
    blocks: Iterator[pa.Table],
    places: Places,
    *,
    epochs: range,
    size: int,
    exchange: Exchange,
    left: Mapping[int, int],
    equal: Equal = None,
    joins: bool = True,
) -> Iterator[Step]:
    """The steps of a rank.

    Args:
        blocks: of the rank (schema BLOCK), by epochs.
        size: images of a batch.
        left: as in `_Ahead`.
        joins: whether an epoch ends with the first rank that has no more images. False: with the
            last one, and steps of the others are empty.

    Raises:
        UsageError: an epoch has not one image for each rank, or with `equal="drop"` not one batch.
        StoreError: a row could not be read.
    """
    ahead = _Ahead(blocks, places, left)
    least = size if equal == "drop" else 1
    for epoch in epochs:
        have = exchange(ahead.has(epoch, least))
        if joins and any(have) and not all(have):
            raise UsageError(_too_few(epoch, have, least))
        if not any(have):
            if equal == "drop" and ahead.has(epoch, 1):
                raise UsageError(_too_few(epoch, have, least))
            # All rows that are left were rejected.
            yield _step(epoch, [], ahead.rest(epoch), exchange, ends=True)
            continue
        kept: list[Row] = []
        ends = False
        while not ends:
            ahead.has(epoch, size)
            taken = ahead.take(epoch, size)
            have = exchange(ahead.has(epoch, least))
            ends = not (all(have) if joins and equal != "repeat" else any(have))
            rest = ahead.rest(epoch) if ends else []
            rows = [row for row, _ in taken]
            if equal == "repeat":
                good = [row for row in rows if row.pixels is not None]
                kept = (kept + good)[:size]
                rows += islice(cycle(kept), size - len(good))
            # Of what is dropped, the rejects are told all the same.
            rows += [row for row, _ in rest if equal != "drop" or row.pixels is None]
            yield _step(epoch, rows, taken + rest, exchange, ends=ends)


def _step(
    epoch: int,
    rows: list[Row],
    accounted: list[tuple[Row, int]],
    exchange: Exchange,
    *,
    ends: bool,
) -> Step:
    """A step with `rows`, and what all ranks say of theirs."""
    seen = Seen()
    seen.add(Batch(epoch=epoch, rows=[row for row, _ in accounted]))
    everybody = exchange((ranges_of([place for _, place in accounted]), seen))
    return Step(
        epoch=epoch,
        rows=rows,
        ranges=[one for ranges, _ in everybody for one in ranges],
        seen=[seen for _, seen in everybody],
        ends=ends,
    )


def _too_few(epoch: int, have: Sequence[bool], least: int) -> str:
    images = "image" if least == 1 else f"batch of {least} images"
    return (
        f"Epoch {epoch} has no {images} left for {have.count(False)} of {len(have)} ranks, and "
        f"each takes part in every step. Train this epoch with fewer ranks, or with more images."
    )
