import contextlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe import UsageError
from raypipe.data import reader
from raypipe.data.formats import files
from raypipe.data.formats.parquet import ParquetReader
from raypipe.data.listing import list_images
from raypipe.data.location import Location
from raypipe.data.reader import Reader
from raypipe.images.header import Reject
from tests.data.conftest import ids, put, read, reasons
from tests.support.objects import Objects, objects


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which only sleeping moves."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def sleep(seconds: float) -> None:
        now[0] += seconds
        assert now[0] < 2000, "it waits without a bound"

    monkeypatch.setattr(time, "sleep", sleep)
    return now


def rows(*ranges: tuple[str, int, int]) -> pa.Table:
    uris, offsets, lengths = zip(*ranges, strict=True)
    return pa.table({"uri": uris, "offset": offsets, "length": lengths})


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_what_cannot_be_read_is_a_reject_in_its_place(tmp_path, threads):
    put(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    a, b = str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")
    table = rows(
        (a, 0, -1),
        (str(tmp_path / "empty.jpg"), 0, -1),
        (str(tmp_path / "folder.jpg"), 0, -1),
        (str(tmp_path / "pipe.jpg"), 0, -1),
        (str(tmp_path / "vanished.jpg"), 0, -1),
        (a + "/below-a-file.jpg", 0, -1),
        ("/nul\0byte.jpg", 0, -1),
        (b, 10, 5),
        (b, 98, 10),
        (b, 5000, 10),
        (b, 5000, -1),
        (b, -3, 2),
        (b, 4, 0),
        (b, 90, -1),
        ("demo://x/y", 0, -1),
        ("s3://bucket/key?no_such_option=1", 0, -1),
        (b, 0, 101),
    )
    results = read(table, threads)
    good = {0: (tmp_path / "a.jpg").read_bytes(), 7: (tmp_path / "b.jpg").read_bytes()[10:15]}
    good[13] = (tmp_path / "b.jpg").read_bytes()[90:]
    good[16] = (tmp_path / "b.jpg").read_bytes()
    for index, result in enumerate(results):
        if index in good:
            assert result == good[index], index
        else:
            assert isinstance(result, Reject), index
            assert result.reason == ("empty" if index in (1, 12) else "unreadable"), (
                index,
                result.reason,
                result.detail,
            )
            assert result.detail
    assert "vanished.jpg" in results[4].detail


def test_order_is_that_of_the_rows_over_many_chunks(tmp_path):
    contents = put(tmp_path, *(f"{i}.jpg" for i in range(300)))
    table = list_images(str(tmp_path))
    order = np.random.default_rng(1).permutation(300)
    expected = [contents[one] for one in np.array(ids(table))[order]]
    for threads in (0, 1, 3):
        assert read(table.take(order), threads) == expected


def test_read_ahead_is_bounded_in_rows(tmp_path, monkeypatch):
    put(tmp_path, *(f"{i:04d}.jpg" for i in range(1000)))
    opened = []
    original = files.read_local
    monkeypatch.setattr(
        files, "read_local", lambda path, group: opened.append(path) or original(path, group)
    )
    with contextlib.closing(Reader(2)) as one:
        stream = one.read(list_images(str(tmp_path)))
        next(stream)
        one._pool.submit(lambda: None).result()  # behind everything that was queued
        one._pool.submit(lambda: None).result()
        assert len(opened) <= 5 * 16
        stream.close()


@pytest.mark.parametrize("name", ["", "a.tar"])
def test_one_thread_reads_ahead_where_reading_waits_and_stays_out_of_the_way_where_it_does_not(
    tmp_path, monkeypatch, name
):
    if name:
        packed(tmp_path / name, 100)
    else:
        put(tmp_path, *(f"{i:03d}.jpg" for i in range(100)))
    table = list_images(str(tmp_path / name))
    contents = read(table)
    waited_s, slow, here = 0.0, False, []
    original = files.read_local

    def watched(path, group):
        nonlocal waited_s
        here.append(threading.current_thread() is threading.main_thread())
        if slow:  # once, for however many rows that are next to each other
            waited_s += 0.02
        return original(path, group)

    monkeypatch.setattr(files, "read_local", watched)
    monkeypatch.setattr(reader, "_off_s", lambda: waited_s)
    monkeypatch.setattr(reader, "_TELLS", True)
    with contextlib.closing(Reader(1)) as one:
        assert list(one.read(table)) == contents
        assert all(here)
        slow = True
        here.clear()
        assert list(one.read(table)) == contents
        assert here[0] and not here[-1]
        for _ in range(3):
            here.clear()
            assert list(one.read(table)) == contents
            assert here[0] and not any(here[1:])
        slow = False
        here.clear()
        assert list(one.read(table)) == contents
        assert all(here)


@pytest.mark.skipif(not reader._TELLS, reason="only Linux tells")
def test_waiting_is_told_from_working_and_from_being_kept_from_it():
    before = reader._off_s()
    time.sleep(0.1)
    assert reader._off_s() - before > 0.09
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        others = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)
        ]  # on the same core
        before, began, ran = reader._off_s(), time.perf_counter(), time.thread_time()
        while (took := time.perf_counter() - began) < 1 + 1.5 * (time.thread_time() - ran):
            assert took < 60, "nobody was in the way"
        assert reader._off_s() - before < 0.1 * took
    finally:
        os.sched_setaffinity(0, cores)
        for other in others:
            other.kill()
            other.wait()


def test_read_ahead_is_bounded_in_bytes(tmp_path, monkeypatch):
    for i in range(64):
        with open(tmp_path / f"{i:02d}.jpg", "wb") as file:
            file.write(bytes([i]))
            file.truncate(3 << 20)
    held, peak, lock = 0, 0, threading.Lock()
    original = files.read_local

    def counted(path, group):
        nonlocal held, peak
        data = original(path, group)
        with lock:
            held += sum(map(len, data))
            peak = max(peak, held)
        return data

    monkeypatch.setattr(files, "read_local", counted)
    with contextlib.closing(Reader(2)) as one:
        for i, data in enumerate(one.read(list_images(str(tmp_path)))):
            assert data[0] == i
            with lock:
                held -= len(data)
    assert held == 0
    assert peak <= 5 * (4 + 3) << 20  # 2 * threads + 1 chunks, each at most 4 MiB and one image


def test_what_is_held_for_missing_files_is_bounded(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(reader, "HELD_BYTES", 10 << 20)
    for i in range(64):
        (tmp_path / f"{i:02d}.jpg").write_bytes(bytes([i]) * (1 << 20))
    table = list_images(str(tmp_path))
    for missing in (3, 4, 40):
        (tmp_path / f"{missing:02d}.jpg").rename(tmp_path / f"{missing:02d}.away")
    held = peak = 0
    original = files.read_local

    def counted(path, group):
        nonlocal held, peak
        data = original(path, group)
        held += sum(map(len, data))
        peak = max(peak, held)
        return data

    monkeypatch.setattr(files, "read_local", counted)
    found = []
    with contextlib.closing(Reader(0)) as one:
        for data in one.read(table):
            held -= len(data) if isinstance(data, bytes) else 0
            found.append(data if isinstance(data, Reject) else data[0])
    assert [i for i, one in enumerate(found) if isinstance(one, Reject)] == [3, 4, 40]
    assert all(one == i for i, one in enumerate(found) if not isinstance(one, Reject))
    assert held == 0 and peak <= (10 + 1 + 4 + 1) << 20
    assert clock[0] - 1000 == 2 * reader.AGAIN_AFTER_S  # 3 and 4 together


def test_few_rows_are_shared_by_all_threads(tmp_path, monkeypatch):
    """A shard of large photos has 16 rows: on slow storage they must not wait for each other."""
    contents = put(tmp_path, *(f"{i:02d}.jpg" for i in range(16)))
    together = threading.Barrier(4, timeout=20)
    original = files.read_local
    monkeypatch.setattr(
        files, "read_local", lambda path, group: together.wait() >= 0 and original(path, group)
    )
    assert read(list_images(str(tmp_path)), threads=4) == list(contents.values())


def test_read_ahead_is_bounded_in_bytes_for_parquet_too(tmp_path):
    pictures = [bytes([i]) * (3 << 20) for i in range(20)]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "a.parquet", row_group_size=5)
    with contextlib.closing(ParquetReader()) as files:
        assert (
            files.read(
                Location.of(str(tmp_path / "a.parquet")), list(range(20)), most=reader.CHUNK_BYTES
            )
            == pictures[:2]
        )
    assert read(list_images(str(tmp_path)), threads=2) == pictures


def test_a_consumer_that_stops_leaves_the_reader_usable(tmp_path):
    contents = put(tmp_path, *(f"{i}.jpg" for i in range(100)))
    table = list_images(str(tmp_path))
    with contextlib.closing(Reader(2)) as one:
        for _ in range(20):
            next(one.read(table))
        streams = [one.read(table) for _ in range(3)]
        for triple, one in zip(zip(*streams, strict=True), ids(table), strict=True):
            assert set(triple) == {contents[one]}


def test_one_image_of_absurd_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    (tmp_path / "a.jpg").write_bytes(bytes(1001))
    (result,) = read(list_images(str(tmp_path)))
    assert isinstance(result, Reject) and "1001 bytes" in result.detail


KEYS = [f"{i}.jpg" for i in range(60)]


@pytest.fixture
def store() -> Iterator[Objects]:
    with objects(**{key: key.encode() * 100 for key in KEYS}) as served:
        yield served


def of(store: Objects, *keys: str) -> pa.Table:
    return rows(*((store.uri(key), 0, -1) for key in keys))


@pytest.mark.parametrize("failure", [503, 500, 429, "reset", "short"])
def test_a_store_that_fails_is_asked_again_until_it_gives_the_whole_object(store, failure):
    store.fails = lambda key, n: failure if n < 3 else None
    assert read(of(store, "0.jpg"), threads=1) == [store.contents["0.jpg"]]
    pauses = np.diff([at for at, _ in store.asked])
    assert len(pauses) == 3 and np.all(pauses >= [0.5, 1.0, 2.0])


def test_waiting_for_a_store_ends_and_it_is_not_asked_for_each_image(store):
    store.fails = lambda key, n: 503
    with contextlib.closing(Reader(0, patience_s=2.0)) as one:
        results = list(one.read(of(store, *KEYS)))
    assert reasons(results) == ["unread"] * 60
    assert {result.detail for result in results} == {"HTTP 503 Service Unavailable"}
    assert len(store.asked) <= 6  # 0.5, 1 and 0.5 s of pauses


def test_a_store_that_is_back_has_patience_again(store):
    store.fails = lambda key, n: 503 if n < 2 or 20 < n < 23 else None
    assert read(of(store, *KEYS), threads=0) == [store.contents[key] for key in KEYS]


def test_threads_have_one_patience_with_a_store(store):
    store.fails = lambda key, n: 503
    with contextlib.closing(Reader(8, patience_s=1.5)) as one:
        assert reasons(list(one.read(of(store, *KEYS)))) == ["unread"] * 60
    assert len(store.asked) <= 8 * 4


@pytest.mark.parametrize(("status", "words"), [(404, "not found"), (403, "403")])
def test_what_a_store_answers_is_final_after_one_more_try(store, status, words):
    store.fails = lambda key, n: status if key == "1.jpg" else None
    results = read(of(store, "0.jpg", "1.jpg", "2.jpg"))
    assert reasons(results) == [None, "unreadable", None] and words in results[1].detail
    assert [key for _, key in store.asked].count("1.jpg") == 2


def test_an_object_that_is_shorter_than_its_range_is_never_taken_for_whole(store):
    ranges = rows(
        (store.uri("7.jpg"), 100, 300),
        (store.uri("8.jpg"), 400, 200),
        (store.uri("9.jpg"), 900, 10),
    )
    whole, short, beyond = read(ranges, threads=0)
    assert whole == store.contents["7.jpg"][100:400]
    assert reasons([short, beyond]) == ["unreadable"] * 2 and "cut short" in short.detail


def test_a_file_that_appears_late_is_read(tmp_path):
    contents = put(tmp_path, *(f"{i}.jpg" for i in range(10)))
    table = list_images(str(tmp_path))
    for late in ("3.jpg", "7.jpg"):
        (tmp_path / late).rename(tmp_path / f"{late}.hidden")
    threading.Timer(
        0.5, lambda: [(p.rename(p.with_suffix(""))) for p in tmp_path.glob("*.hidden")]
    ).start()
    assert read(table, threads=1) == list(contents.values())


def test_files_that_stay_missing_are_rejected_together(tmp_path):
    put(tmp_path, *(f"{i}.jpg" for i in range(10)))
    table = list_images(str(tmp_path))
    for i in range(1, 10):
        (tmp_path / f"{i}.jpg").unlink()
    began = time.monotonic()
    assert reasons(read(table, threads=1)) == [None] + ["unreadable"] * 9
    assert time.monotonic() - began < 10  # one pause, not nine


@pytest.mark.parametrize("root", [True, False])
def test_a_mount_that_is_away_is_the_stores_failure(tmp_path, root):
    folder = tmp_path / "photos"
    contents = put(folder, *(f"{i}.jpg" for i in range(10)))
    table = list_images(str(folder))
    folder.rename(tmp_path / "away")
    folder.mkdir()  # a mount point without its mount
    with contextlib.closing(Reader(1, patience_s=0.5, root=str(folder) if root else None)) as one:
        assert reasons(list(one.read(table))) == ["unread"] * 10
    folder.rmdir()
    threading.Timer(3.0, lambda: (tmp_path / "away").rename(folder)).start()
    assert read(table, threads=1) == list(contents.values())


@pytest.mark.parametrize("named", [True, False])
def test_a_mount_that_stays_away_is_waited_for_once_for_at_most_the_patience(
    tmp_path, clock, named
):
    folder = tmp_path / "photos"
    put(folder, *(f"{i}.jpg" for i in range(10)))
    table = list_images(str(folder))
    folder.rename(tmp_path / "away")
    root = str(folder) if named else None
    with contextlib.closing(Reader(0, patience_s=60.0, root=root)) as one:
        assert reasons(list(one.read(table))) == ["unread"] * 10
        assert 60 <= clock[0] - 1000 <= 60 + reader.AGAIN_AFTER_S
        before = clock[0]
        assert reasons(list(one.read(table))) == ["unread"] * 10  # the next shard
        assert clock[0] - before == reader.AGAIN_AFTER_S
        (tmp_path / "away").rename(folder)  # it is back, and has patience again
        assert reasons(list(one.read(table))) == [None] * 10
        folder.rename(tmp_path / "away")
        before = clock[0]
        assert reasons(list(one.read(table))) == ["unread"] * 10
        assert clock[0] - before >= 60


@pytest.mark.parametrize("input", ["photos", "photos/*.jpg", "photos/{0..9}.jpg", "{photos}/?.jpg"])
def test_a_mount_that_goes_away_within_a_shard_is_waited_for_with_a_bound(tmp_path, clock, input):
    folder = tmp_path / ("{photos}" if input.startswith("{") else "photos")
    put(folder, *(f"{i}.jpg" for i in range(10)))
    table = list_images(f"{tmp_path}/{input}")
    root = files.root_of(f"{tmp_path}/{input}")
    with contextlib.closing(Reader(0, patience_s=60.0, root=root)) as one:
        found = one.read(table)
        first = next(found)
        folder.rename(tmp_path / "away")
        if input != "photos":  # a mount point without its mount
            folder.mkdir()
        assert reasons([first, *found])[2:] == ["unread"] * 8  # two are a chunk
    assert 60 <= clock[0] - 1000 <= 60 + reader.AGAIN_AFTER_S


def test_rejects_of_the_reader_survive_pickling(tmp_path):
    (result,) = read(rows((str(tmp_path / "x.jpg"), 0, -1)))
    again = pickle.loads(pickle.dumps(result))
    assert (again.reason, again.detail) == (result.reason, result.detail)


def test_threads_below_zero():
    with pytest.raises(UsageError, match="-1"):
        Reader(-1)


def packed(path, count):
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = 1000
            archive.addfile(info, io.BytesIO(bytes([i]) * 1000))


def test_neighbours_in_a_tar_are_read_at_once(tmp_path, monkeypatch):
    packed(tmp_path / "a.tar", 48)
    table = list_images(str(tmp_path / "a.tar"))
    calls = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: calls.append(args) or pread(*args))
    assert read(table, threads=1) == [bytes([i]) * 1000 for i in range(48)]
    assert len(calls) == 4


def test_large_objects_are_not_read_ahead_together(store, monkeypatch):
    """As many are read ahead as have room; the one in turn is read whatever its size."""
    large = {f"large{n}.jpg": bytes([n]) * (1 << 20) for n in range(12)}
    store.contents |= large
    monkeypatch.setattr(reader, "AHEAD_BYTES", 3 << 20)
    original, lock, sizes = reader._Ahead.hold, threading.Lock(), {"held": 0, "peak": 0}
    taken = reader._Ahead.take

    def counted(self, size: int) -> None:
        taken(self, size)
        with lock:
            sizes["peak"] = max(sizes["peak"], self._held)

    def settled(self, size: int) -> None:
        original(self, size)
        sizes["held"] = self._held

    monkeypatch.setattr(reader._Ahead, "take", counted)
    monkeypatch.setattr(reader._Ahead, "hold", settled)
    keys = [*large, *KEYS[:5], "missing.jpg", *large]
    results = read(of(store, *keys), threads=4)
    assert [one for one in results if isinstance(one, bytes)] == [
        store.contents[key] for key in keys if key in store.contents
    ]
    assert isinstance(results[17], Reject)
    assert sizes["held"] == 0 and (2 << 20) <= sizes["peak"] <= 3 << 20
    store.contents["huge.jpg"] = bytes(4 << 20)  # has room in its turn only
    assert read(of(store, "0.jpg", "huge.jpg", "1.jpg"), threads=4) == [
        store.contents[key] for key in ("0.jpg", "huge.jpg", "1.jpg")
    ]


def test_room_that_a_failed_read_had_is_free_again(store, monkeypatch):
    store.contents |= {key: bytes(1 << 20) for key in KEYS[:8]}
    monkeypatch.setattr(reader, "AHEAD_BYTES", 2 << 20)
    store.fails = lambda key, n: "short" if n < 2 else None
    assert read(of(store, *KEYS[:8]), threads=2) == [bytes(1 << 20)] * 8
