"""Files of a shard in a store: put at once, each whole or not at all."""

import contextlib
import threading
import time

import pytest

from raypipe.data import lead, puts
from raypipe.data.lead import FEW, Lead
from raypipe.data.location import Location
from raypipe.data.patience import Patience
from raypipe.data.puts import Puts
from raypipe.data.sinks import Sink
from raypipe.data.stores import StoreError
from tests.data.conftest import IMAGES, block, files, read, write_block
from tests.data.test_reader import of
from tests.support.objects import objects
from tests.support.proxy import proxy


@pytest.mark.parametrize("failure", [503, 500, 429, "reset", "short"])
def test_a_put_that_fails_is_repeated_until_the_whole_object_is_there(failure):
    with objects() as store:
        store.fails = lambda key, n: failure if n in (2, 5) else None
        root = Location.of(store.uri(""))
        data = {f"{i}.bin": bytes([i]) * 200_000 for i in range(10)}
        with Puts(root) as putting:
            for name, content in data.items():
                putting.put(name, content)
        assert store.contents == data
        assert len(store.asked) == 12


def test_puts_overlap_within_bounds_and_the_block_waits_for_all(monkeypatch):
    monkeypatch.setattr(puts, "HELD_BYTES", 10_000)
    with objects() as store:
        store.wait_s = 0.05
        with Puts(Location.of(store.uri(""))) as putting:
            for i in range(40):
                putting.put(f"{i}.bin", bytes(1000))
        assert len(store.contents) == 40
        assert 4 <= store.together <= 10  # bytes of ten are held


def test_the_first_put_that_fails_for_good_ends_the_shard(monkeypatch):
    monkeypatch.setattr(Patience.__init__, "__defaults__", (0.2,))
    with objects() as store:
        store.fails = lambda key, n: 503
        with pytest.raises(StoreError, match="503"), Puts(Location.of(store.uri(""))) as putting:
            for i in range(500):
                putting.put(f"{i}.bin", b"x")
        asked = len(store.asked)
        assert asked < 500 and not store.contents
        with contextlib.suppress(ValueError), Puts(Location.of(store.uri(""))) as putting:
            putting.put("last.bin", b"x")
            raise ValueError
        assert store.now == 0  # none comes later


def test_a_shard_in_a_store_has_the_files_of_a_local_one(tmp_path):
    with objects() as store:
        store.fails = lambda key, n: "reset" if n == 1 else None
        for root in (str(tmp_path), store.uri("")):
            sink = Sink(format="png", root=Location.of(root))
            written = write_block(sink, block(IMAGES))
        assert store.contents == files(tmp_path) and len(written.files) == len(IMAGES)


# --- reading ahead ---------------------------------------------------------------------------


def test_as_many_requests_are_under_way_as_hide_the_latency(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(lead.time, "perf_counter", lambda: now[0])
    ahead = Lead(64)

    def ask(seconds: float) -> None:
        ahead.request(lambda: now.__setitem__(0, now[0] + seconds))

    assert ahead.requests == FEW  # nothing is known yet
    ahead.consumed(0.002)
    for _ in range(40):
        ask(0.030)
    assert ahead.requests == 30  # twice 30 ms over 2 ms
    ask(5.0)  # one that took long is no latency
    assert ahead.requests == 30
    for _ in range(40):
        ask(0.001)
    assert ahead.requests == FEW
    for _ in range(40):
        ask(1.0)
    assert ahead.requests == 64 and Lead(4).requests == 4


def test_reads_of_a_store_that_is_far_overlap_more():
    keys = [f"{i}.jpg" for i in range(200)]
    with objects(**{key: key.encode() * 100 for key in keys}) as store:
        together = now = 0
        lock = threading.Lock()

        def fails(key: str, n: int) -> None:
            nonlocal together, now
            with lock:
                now += 1
                together = max(together, now)
            time.sleep(0.02)
            with lock:
                now -= 1

        store.fails = fails
        assert read(of(store, *keys), threads=64) == [store.contents[key] for key in keys]
    assert together > 2 * FEW


# --- a way that breaks -----------------------------------------------------------------------


def test_a_store_that_cuts_answers_and_goes_away_gives_every_byte_in_the_end(tmp_path):
    keys = [f"{i}.jpg" for i in range(60)]
    with objects(**{key: key.encode() * 20_000 for key in keys}) as store:
        before = dict(store.contents)
        with proxy(f"127.0.0.1:{store.port}", latency_s=0.005) as way:
            near, store.port = store.port, int(way.address.rpartition(":")[2])
            table, root = of(store, *keys), Location.of(store.uri(""))
            store.port = near
            way.cut(5, to=1000)
            assert read(table, threads=16) == [before[key] for key in keys]
            assert way.cuts == 0
            way.away()
            threading.Timer(1.5, way.back).start()
            assert read(table, threads=16) == [before[key] for key in keys]
            way.cut(3, to=20)  # puts that were done, and whose answers are lost
            with Puts(root) as putting:
                for i in range(60):
                    putting.put(f"out/{i}", bytes([i]) * 50_000)
                    if i == 30:
                        way.away()
                        threading.Timer(1.5, way.back).start()
    assert {key: data for key, data in store.contents.items() if key.startswith("out/")} == {
        f"out/{i}": bytes([i]) * 50_000 for i in range(60)
    }
