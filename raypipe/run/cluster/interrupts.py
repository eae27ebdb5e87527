"""How Ctrl-C and SIGTERM end a run."""

import logging
import queue
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

AGAIN_S = 0.02
"""After this, a signal that came where it would be lost is sent again."""

_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
"""A handler of a signal, as signal.signal takes and returns it."""

_LOGGING = logging.getLogger.__code__.co_filename


def is_lost_at(frame: FrameType | None) -> bool:
    """Whether an exception that a signal's handler raises there does not do what it should.

    Python prints an exception that leaves a `__del__`, and goes on. In `logging`, an exception may
    come when the lock is taken and the `try` has not begun. Then the lock stays taken, and the next
    thread that logs waits for ever. Both together once made a run hang.
    """
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename == _LOGGING:
            return True
        frame = frame.f_back
    return False


class Interrupts:
    """Signals that raise KeyboardInterrupt in the main thread, until `end`.

    Where it would be lost it is raised a moment later. In another thread, `take` does nothing.

    Args:
        tell: called in the main thread before it is raised.
    """

    def __init__(self, tell: Callable[[], None] = lambda: None) -> None:
        self._tell = tell
        self._before: dict[int, _Handler] = {}
        # A signal may come in the middle of a put, and put again: queue.Queue would wait for ever.
        self._late: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def take(self, number: signal.Signals) -> None:
        """Handle a signal from now on, in place of what handles it."""
        if threading.current_thread() is not threading.main_thread():
            return
        if not self._before:
            threading.Thread(target=self._repeat, name="raypipe-interrupts", daemon=True).start()
        self._before.setdefault(number, signal.signal(number, self._raise))

    def end(self) -> None:
        """Put back the handlers that were there before. Only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            self._late.put(None)
        self._before.clear()

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if is_lost_at(frame):
            self._late.put(number)
            return
        self._tell()
        signal.default_int_handler(number, frame)

    def _repeat(self) -> None:
        while (number := self._late.get()) is not None:
            time.sleep(AGAIN_S)
            signal.pthread_kill(threading.main_thread().ident or 0, number)
