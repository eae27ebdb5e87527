"""What an actor measures of itself."""

import os
import subprocess
import sys
import threading
import time
from multiprocessing.shared_memory import SharedMemory

import pytest

from raypipe.run.meter import Meter, private_bytes
from tests.conftest import ROOT


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_waiting_for_a_core_is_told_from_being_busy_whichever_thread_ray_calls_in(session):
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    meter = Meter(stage="preprocess", collector=None)
    meter.start()

    def work() -> None:
        os.sched_setaffinity(0, [core])  # of this thread alone
        with meter.call():
            until = time.thread_time() + 0.3
            while time.thread_time() < until:
                pass

    thread = threading.Thread(target=work)
    try:
        assert other.stdout is not None and other.stdout.readline()
        thread.start()
        thread.join()
    finally:
        other.kill()
        other.wait()
    seen = meter.sample()
    assert seen.core_wait_s > 0.1  # the two get the core in turns
    assert 0.2 < seen.busy_s - seen.core_wait_s < 0.9 * seen.busy_s


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs Linux")
def test_shared_pages_are_the_store_s_and_not_an_actor_s_private_memory(session):
    meter = Meter(stage="preprocess", collector=None)
    meter.start()
    before, private, size = meter.sample(), private_bytes(), 32 << 20
    shared = SharedMemory(create=True, size=size)
    try:
        for page in range(0, size, 4096):
            shared.buf[page] = 1
        after, private_after = meter.sample(), private_bytes()
    finally:
        shared.close()
        shared.unlink()
    assert after.rss_bytes - before.rss_bytes > 0.9 * size
    assert before.private_bytes is not None and private_after - private < 0.2 * size
    assert after.node_store_bytes - before.node_store_bytes > 0.5 * size  # others may free some


FORKS = """
import os
from raypipe.run.meter import private_bytes
held = b"1" * (64 << 20)
print(private_bytes(), flush=True)
if os.fork() == 0:
    print(private_bytes(), flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_what_forks_share_is_divided_among_them():
    done = subprocess.run([sys.executable, "-c", FORKS], cwd=ROOT, capture_output=True, text=True)
    alone, shared = map(int, done.stdout.split())
    assert alone > 64 << 20
    assert shared == pytest.approx(alone / 2, rel=0.1)
