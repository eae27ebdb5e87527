import contextlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe import UsageError
from raypipe.data import reader
from raypipe.data.reader import Reader
from raypipe.data.sources import list_images
from raypipe.images.decode import Reject
from tests.data.conftest import ids, put, read, reasons


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
            assert result.reason == ("empty" if index in (1, 12) else "unreadable"), (index, result.reason, result.detail)
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
    original = reader._read_local
    monkeypatch.setattr(reader, "_read_local", lambda path, group: opened.append(path) or original(path, group))
    with contextlib.closing(Reader(2)) as one:
        stream = one.read(list_images(str(tmp_path)))
        next(stream)
        one._pool.submit(lambda: None).result()  # behind everything that was queued
        one._pool.submit(lambda: None).result()
        assert len(opened) <= 5 * 16
        stream.close()


@pytest.mark.parametrize("name", ["", "a.tar"])
def test_one_thread_reads_ahead_where_reading_waits_and_stays_out_of_the_way_where_it_does_not(tmp_path, monkeypatch, name):
    if name:
        packed(tmp_path / name, 100)
    else:
        put(tmp_path, *(f"{i:03d}.jpg" for i in range(100)))
    table = list_images(str(tmp_path / name))
    contents = read(table)
    waited_s, slow, here = 0.0, False, []
    original = reader._read_local

    def watched(path, group):
        nonlocal waited_s
        here.append(threading.current_thread() is threading.main_thread())
        if slow:  # once, for however many rows that are next to each other
            waited_s += 0.02
        return original(path, group)

    monkeypatch.setattr(reader, "_read_local", watched)
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
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]  # on the same core
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
    original = reader._read_local

    def counted(path, group):
        nonlocal held, peak
        data = original(path, group)
        with lock:
            held += sum(map(len, data))
            peak = max(peak, held)
        return data

    monkeypatch.setattr(reader, "_read_local", counted)
    with contextlib.closing(Reader(2)) as one:
        for i, data in enumerate(one.read(list_images(str(tmp_path)))):
            assert data[0] == i
            with lock:
                held -= len(data)
    assert held == 0
    assert peak <= 5 * (4 + 3) << 20  # 2 * threads + 1 chunks, each at most 4 MiB and one image


def test_few_rows_are_shared_by_all_threads(tmp_path, monkeypatch):
    """A shard of large photos has 16 rows: on slow storage they must not wait for each other."""
    contents = put(tmp_path, *(f"{i:02d}.jpg" for i in range(16)))
    together = threading.Barrier(4, timeout=20)
    original = reader._read_local
    monkeypatch.setattr(reader, "_read_local", lambda path, group: together.wait() >= 0 and original(path, group))
    assert read(list_images(str(tmp_path)), threads=4) == list(contents.values())


def test_read_ahead_is_bounded_in_bytes_for_parquet_too(tmp_path):
    pictures = [bytes([i]) * (3 << 20) for i in range(20)]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "a.parquet", row_group_size=5)
    with contextlib.closing(reader._ParquetReader()) as files:
        assert files.read(str(tmp_path / "a.parquet"), list(range(20))) == pictures[:2]
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
    monkeypatch.setattr(reader, "MAX_BYTES", 1000)
    (tmp_path / "a.jpg").write_bytes(bytes(1001))
    (result,) = read(list_images(str(tmp_path)))
    assert isinstance(result, Reject) and "1001 bytes" in result.detail


class Flaky:
    """Stands in for a store that does not answer: nothing else fails on demand and comes back."""

    def __init__(self, monkeypatch, failures: int, error: type[OSError] = OSError) -> None:
        self.calls = 0
        self.failures = failures
        self.error = error
        self.slept: list[float] = []
        monkeypatch.setattr(reader, "_read_remote", self.read)
        monkeypatch.setattr(reader.time, "sleep", self.slept.append)

    def read(self, uri, group):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error(5, "no answer")
        return [b"bytes"] * len(group)


def test_a_store_that_does_not_answer_is_asked_again(monkeypatch):
    store = Flaky(monkeypatch, failures=2)
    assert read(rows(("s3://bucket/a.jpg", 0, -1)), threads=1) == [b"bytes"]
    assert len(store.slept) == 2 and store.calls == 3


def test_waiting_for_a_store_ends(monkeypatch):
    """A thousand rows of a store that is gone must not take hours; when it is back, patience is back."""
    store = Flaky(monkeypatch, failures=50)
    results = read(rows(*((f"s3://bucket/{i}.jpg", 0, -1) for i in range(60))), threads=0)
    assert reasons(results) == ["unreadable"] * 47 + [None] * 13
    assert store.slept == list(reader._PAUSES)
    assert isinstance(results[0], Reject) and "no answer" in results[0].detail
    with contextlib.closing(Reader(1)) as one:
        for _ in range(2):
            store.failures = store.calls + 50
            table = rows(*((f"s3://bucket/{i}.jpg", 0, -1) for i in range(60)))
            assert reasons(list(one.read(table))) == ["unreadable"] * 47 + [None] * 13
    assert store.slept == list(reader._PAUSES) * 3


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_what_a_store_answers_is_not_asked_again(monkeypatch, error):
    store = Flaky(monkeypatch, failures=1, error=error)
    assert reasons(read(rows(("s3://bucket/a.jpg", 0, -1)))) == ["unreadable"]
    assert store.calls == 1 and not store.slept


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
