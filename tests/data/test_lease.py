"""One driver at a time, with real processes that are really killed."""

import contextlib
import json
import subprocess
import sys
import threading
import time

import pytest

from raypipe import UsageError
from raypipe.data import lease
from raypipe.data.lease import LeaseLost, file_of, hold, myself
from raypipe.data.location import Location
from tests.conftest import ROOT

HOLD = (
    "import sys, time\nfrom raypipe.data.lease import hold\n"
    "from raypipe.data.location import Location\n"
    "with hold(Location.of(sys.argv[1]), run_id='other', option='--output'):\n"
    "    print('held', flush=True)\n    time.sleep(600)"
)


@pytest.fixture
def other(root):
    """Another process, which has the lease of `root`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    if request.param == "local":
        return Location.of(str(tmp_path / "out"))
    return Location.of(request.getfixturevalue("bucket")("out"))


def test_a_second_driver_is_refused_with_who_has_it(root, other):
    for attempt in (
        lambda: hold(root, run_id="mine", option="--output").__enter__(),
        lambda: lease.check(root, option="--output"),
    ):
        with pytest.raises(
            UsageError, match=rf"run other of process {other.pid} on .*, started 20.* Two would mix"
        ):
            attempt()


def test_a_dead_process_frees_its_lease_at_once(root, other):
    other.kill()
    other.wait()
    waited: list[str] = []
    with hold(root, run_id="mine", option="--output", tell=waited.append):
        assert json.loads((root / file_of(root)).read())["run_id"] == "mine"
    assert not waited
    assert not (root / file_of(root)).exists()


def foreign_lease(root: Location) -> bytes:
    """The lease of a driver on another host, which nobody here can ask."""
    data = json.dumps({**json.loads(myself("far").data), "boot": "another", "host": "far"}).encode()
    assert root.create(file_of(root), data)
    return data


def test_a_lease_of_another_host_is_free_when_nobody_renews_it(root, monkeypatch):
    monkeypatch.setattr(lease, "FREE_AFTER_S", 2.0)
    foreign_lease(root)
    waited: list[str] = []
    began = time.monotonic()
    with hold(root, run_id="mine", option="--output", tell=waited.append):
        assert time.monotonic() - began >= 2
    assert len(waited) == 1 and "run far of process" in waited[0] and "Waiting 2 s" in waited[0]


def test_a_lease_of_another_host_that_is_renewed_is_respected(root, monkeypatch):
    monkeypatch.setattr(lease, "FREE_AFTER_S", 20.0)
    data = foreign_lease(root)
    renewed = json.dumps({**json.loads(data), "beat": 7}).encode()
    threading.Timer(1.5, lambda: root.replace_same(file_of(root), data, renewed)).start()
    with pytest.raises(UsageError, match="run far of process"):
        hold(root, run_id="mine", option="--output").__enter__()
    assert (root / file_of(root)).read() == renewed


def test_of_many_who_take_a_lease_that_is_free_one_gets_it(root, monkeypatch):
    monkeypatch.setattr(lease, "FREE_AFTER_S", 1.0)
    foreign_lease(root)
    together = threading.Barrier(6)
    got: list[lease.Holder] = []

    def take() -> None:
        together.wait()
        mine = myself("mine")
        with contextlib.suppress(UsageError):
            got.append(lease._acquired(root, mine, "--output", lambda line: None).holder)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    holder, _ = lease.read(root)
    assert holder == got[0]


def test_who_has_lost_its_lease_is_told(root, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    with hold(root, run_id="mine", option="--output") as held:
        held.check()
        (root / file_of(root)).delete()
        data = foreign_lease(root)
        time.sleep(1)
        with pytest.raises(LeaseLost, match=r"taken over by another driver .*run far of process"):
            held.check()
    assert (root / file_of(root)).read() == data  # it is not ours to delete


def test_a_lease_that_says_nothing_is_waited_for_and_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "FREE_AFTER_S", 1.0)
    for content in (b"", b"[]", b'{"pid": "x"}', b"\xff" * 100):
        root = Location.of(str(tmp_path / str(len(content))))
        assert root.create(file_of(root), content)
        with hold(root, run_id="mine", option="--output"):
            pass
