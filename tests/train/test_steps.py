"""What each rank gets, without Ray: ranks are threads, and blocks are dealt as Ray Data does."""

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from raypipe import UsageError
from raypipe.data.tables import BLOCK, rows
from raypipe.data.work import shards
from raypipe.train import epochs as epochs_module
from raypipe.train.epochs import Epochs, dealt
from raypipe.train.position import Position, from_states, ranges_of, to_state, union
from raypipe.train.steps import Step, steps

DECIDES = {"count": 100, "digest": "d", "seed": 0, "shuffle": True}


def source(count: int) -> pa.Table:
    ids = [f"i{number:03d}" for number in range(count)]
    return rows(ids, ids, ids)


def block_of(shard: pa.Table, rejected: set[tuple[int, str]]) -> pa.Table:
    """What an actor makes of a shard: images of 1x1 pixels."""
    keys = zip(shard.column("epoch").to_pylist(), shard.column("image_id").to_pylist(), strict=True)
    bad = [key in rejected for key in keys]
    known = {
        "source_height": [1] * len(bad),
        "source_width": [1] * len(bad),
        "height": [1] * len(bad),
        "width": [1] * len(bad),
        "image": [None if is_bad else b"rgb" for is_bad in bad],
        "reason": ["corrupt" if is_bad else None for is_bad in bad],
        "detail": [None] * len(bad),
        "orientation": [1] * len(bad),
        "boxes_from": [None] * len(bad),
        "boxes_dropped": [[]] * len(bad),
    }
    columns = [
        shard.column(name) if name in shard.column_names else pa.array(known[name], type)
        for name, type in zip(BLOCK.names, BLOCK.types, strict=True)
    ]
    return pa.table(columns, schema=BLOCK)


class Ranks:
    """An exchange between threads."""

    def __init__(self, size: int):
        self._items: list = [None] * size
        self._barrier = threading.Barrier(size)

    def exchange(self, rank: int):
        def exchange(item):
            self._items[rank] = item
            self._barrier.wait(20)
            items = list(self._items)
            self._barrier.wait(20)
            return items

        return exchange


def given(
    of: Epochs,
    *,
    size: int,
    position: Position | None = None,
    ranks: int = 1,
    rejected: set[tuple[int, str]] = frozenset(),
    equal=None,
    at_most: int = 10**9,
) -> list[list[tuple[Step, Position]]]:
    """The first steps of each rank that are given out, and the position after each."""
    position = position or Position()
    together = Ranks(ranks)

    def run(rank: int) -> list[tuple[Step, Position]]:
        now, out = position, []
        for segment in of.segments(position, ranks=ranks):
            tables = list(shards(segment.work))
            totals, mine = [0] * ranks, []
            for table in tables:
                to = totals.index(min(totals))
                totals[to] += table.num_rows
                if to == rank:
                    mine.append(block_of(table, rejected))
            for step in steps(
                iter(mine),
                segment.places,
                epochs=segment.epochs,
                size=size,
                exchange=together.exchange(rank),
                left=segment.left if ranks == 1 else {},
                equal=equal,
            ):
                now = now.after(step.ranges, ends=step.ends)
                if step.good:
                    out.append((step, now))
                if len(out) == at_most:
                    return out
        return out

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def images(out: list[list[tuple[Step, Position]]]) -> Counter:
    """How often each image was given in each epoch."""
    return Counter(
        (step.epoch, row.image_id) for rank in out for step, _ in rank for row in step.good
    )


def all_of(of: Epochs, rejected: set[tuple[int, str]] = frozenset()) -> Counter:
    ids = of.source.column("image_id").to_pylist()
    return Counter({(e, i): 1 for e in range(of.epochs) for i in ids if (e, i) not in rejected})


def test_batches_fill_past_rejects_and_the_last_has_those_at_the_end():
    of = Epochs(source=source(10), epochs=2, seed=None, rows_per_shard=4)
    bad = {(0, "i001"), (0, "i002"), (0, "i008"), (0, "i009"), (1, "i000")}
    (out,) = given(of, size=3, rejected=bad)
    of_rows = [[row.image_id for row in step.rows] for step, _ in out]
    assert of_rows[0] == ["i000", "i001", "i002", "i003", "i004"]
    assert of_rows[1] == ["i005", "i006", "i007", "i008", "i009"]
    assert [len(step.good) for step, _ in out] == [3, 3, 3, 3, 3]
    assert [position for _, position in out][:3] == [
        Position(epoch=0, seen=((0, 5),)),
        Position(epoch=1),  # after the last batch, the next epoch begins
        Position(epoch=1, seen=((0, 4),)),
    ]
    assert images([out]) == all_of(of, bad)


def test_an_epoch_without_an_image_has_no_step_and_is_over():
    of = Epochs(source=source(3), epochs=3, seed=1, rows_per_shard=2)
    bad = {(1, f"i{number:03d}") for number in range(3)}
    (out,) = given(of, size=2, rejected=bad)
    assert [step.epoch for step, _ in out] == [0, 0, 2, 2]
    assert out[-1][1] == Position(epoch=3)


@pytest.mark.parametrize("seed", range(12))
def test_every_row_comes_once_whoever_stops_and_however_many_go_on(seed, monkeypatch):
    """Random numbers of ranks, batch sizes and rejects; stopped after a random step, thrice."""
    rng = random.Random(seed)
    of = Epochs(
        source=source(rng.randint(40, 90)),
        epochs=3,
        seed=rng.choice([None, seed]),
        rows_per_shard=rng.randint(2, 9),
    )
    monkeypatch.setattr(epochs_module, "SEGMENT_ROWS", of.rows * rng.choice([1, 2, 9]))
    ids = of.source.column("image_id").to_pylist()
    bad = {(epoch, image) for epoch in range(3) for image in rng.sample(ids, 5)}
    decides = {**DECIDES, "count": of.rows}
    position, found = Position(), Counter()
    for last in (False, False, False, True):
        ranks, size = rng.randint(1, 4), rng.randint(1, 7)
        stop = 10**9 if last else rng.randint(1, 6)
        out = given(of, size=size, position=position, ranks=ranks, rejected=bad, at_most=stop)
        assert len({len(rank) for rank in out}) == 1  # all made the same number of steps
        assert all(step.good for rank in out for step, _ in rank)
        found += images(out)
        if out[0]:
            positions = {rank[-1][1] for rank in out}
            assert len(positions) == 1  # each knows what all have seen
            position = from_states([to_state(at, decides) for at in positions], decides)
    assert position == Position(epoch=3)
    assert found == all_of(of, bad)


def test_equal_batches_drop_or_repeat():
    of = Epochs(source=source(23), epochs=2, seed=3, rows_per_shard=3)
    for ranks in (1, 2, 3):
        dropped = given(of, size=4, ranks=ranks, equal="drop")
        assert {len(step.good) for rank in dropped for step, _ in rank} == {4}
        assert max(images(dropped).values()) == 1
        assert len(dropped[0]) == 2 * of.steps(4, ranks=ranks, equal="drop")
        repeated = given(of, size=4, ranks=ranks, equal="repeat")
        assert {len(step.good) for rank in repeated for step, _ in rank} == {4}
        assert images(repeated).keys() == all_of(of).keys()
        assert len(repeated[0]) == 2 * of.steps(4, ranks=ranks, equal="repeat")
        assert dropped[0][-1][1] == repeated[0][-1][1] == Position(epoch=2)


def test_the_number_of_steps_is_known_beforehand():
    for count, ranks, size in [(64, 1, 8), (65, 1, 8), (64, 2, 8), (70, 3, 5), (9, 4, 64)]:
        of = Epochs(source=source(count), epochs=1, seed=0, rows_per_shard=7)
        out = given(of, size=size, ranks=ranks)
        assert {len(rank) for rank in out} == {of.steps(size, ranks=ranks, equal=None)}


def test_ranks_get_nearly_as_many_rows():
    for count in (100, 101, 997):
        of = Epochs(source=source(count), epochs=1, seed=0, rows_per_shard=16)
        (segment,) = of.segments(Position(), ranks=4)
        counts = [table.num_rows for table in shards(segment.work)]
        assert max(counts) <= 16
        assert max(dealt(counts, 4)) - min(dealt(counts, 4)) <= 16


def test_a_rank_without_an_image_is_refused_rather_than_waited_for():
    of = Epochs(source=source(4), epochs=1, seed=None, rows_per_shard=1)
    bad = {(0, "i001"), (0, "i003")}
    with pytest.raises(UsageError, match=r"no image left for 1 of 2 ranks.*fewer ranks"):
        given(of, size=2, ranks=2, rejected=bad)


def test_two_runs_with_one_seed_give_equal_steps():
    of = Epochs(source=source(50), epochs=2, seed=5, rows_per_shard=6)

    def told(out):
        return [[[row.image_id for row in step.rows] for step, _ in rank] for rank in out]

    assert told(given(of, size=4, ranks=3)) == told(given(of, size=4, ranks=3))


# --- states


def test_ranges_are_joined_and_come_back():
    assert union([(5, 9), (0, 2), (2, 4), (8, 12), (3, 3)]) == ((0, 4), (5, 12))
    places = np.array([7, 3, 4, 5, 0])
    assert ranges_of(places) == [(0, 1), (3, 6), (7, 8)]
    assert Position(seen=((0, 2), (4, 5))).left(6).tolist() == [2, 3, 5]


def test_states_of_several_ranks_merge_and_a_full_epoch_is_over():
    states = [
        to_state(Position(epoch=1, seen=seen), DECIDES) for seen in [((0, 40),), ((30, 100),)]
    ]
    assert from_states(states[:1], DECIDES) == Position(epoch=1, seen=((0, 40),))
    assert from_states(states, DECIDES) == Position(epoch=2)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "cannot read the loader's state, version"),
        ([], "no state"),
        ({"version": 9}, "it is 9, and this raypipe knows 1"),
        ({"version": 1, "rows": DECIDES, "epoch": 0, "seen": [[0]]}, "cannot read"),
        ({"version": 1, "rows": DECIDES, "epoch": 0, "seen": [[5, 101]]}, "not among the 100"),
        (
            to_state(Position(), DECIDES | {"seed": 7}),
            "seed 7 then, 0 now.*Nothing was changed.*same images, seed",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state, said):
    with pytest.raises(UsageError, match=said):
        from_states(state, DECIDES)
