"""What an actor measures of itself."""

import os
import subprocess
import sys
import threading
import time
from multiprocessing.shared_memory import SharedMemory

import pytest

from raypipe.run.meter import Meter


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
    before, size = meter.sample(), 32 << 20
    shared = SharedMemory(create=True, size=size)
    try:
        for page in range(0, size, 4096):
            shared.buf[page] = 1
        after = meter.sample()
    finally:
        shared.close()
        shared.unlink()
    assert after.rss_bytes - before.rss_bytes > 0.9 * size
    assert after.private_bytes - before.private_bytes < 0.2 * size
    assert after.node_store_bytes - before.node_store_bytes > 0.5 * size  # others may free some
