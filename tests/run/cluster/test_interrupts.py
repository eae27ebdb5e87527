"""Ctrl-C where Python would lose it."""

import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT

LOOP = """
import logging, signal, sys, time
from raypipe.run.cluster.interrupts import Interrupts

interrupts = Interrupts()
interrupts.take(signal.SIGINT)

def wait():
    print("in", flush=True)
    time.sleep(0.5)
    print("out", flush=True)

class Deleted:
    def __del__(self):
        wait()

class Handler(logging.Handler):
    def emit(self, record):
        wait()

try:
    if sys.argv[1] == "delete":
        Deleted()
    else:
        logging.getLogger("x").addHandler(Handler())
        logging.getLogger("x").warning("a line")
    time.sleep(20)
    print("lost")
except KeyboardInterrupt:
    print("interrupted")
interrupts.end()
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


@pytest.mark.parametrize("where", ["delete", "log"])
def test_an_interruption_is_raised_after_what_would_lose_it(where):
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, where], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert (said, process.returncode) == ("out\ninterrupted\n", 0)
