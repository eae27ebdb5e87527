"""How long a store that fails is asked again. Counted for the store, not for each image."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from raypipe.data.stores import StoreError, short

T = TypeVar("T")

READ_PATIENCE_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
"""Pauses double from the first to the longest: 11 tries in 60 s."""


class Patience:
    """The failures of one store. Threads may share it.

    The store is asked again with growing pauses, for at most `seconds` without a success. After
    that it is asked once in LONGEST_PAUSE_S, and other calls fail at once. One success resets this.
    """

    def __init__(self, seconds: float = READ_PATIENCE_S):
        self._seconds = seconds
        self._lock = threading.Lock()
        self._failing_since: float | None = None
        self._ask_again_at = 0.0  # after the last of `seconds`
        self._said = ""

    def call(self, do: Callable[[], T], may_pass: Callable[[BaseException], bool]) -> T:
        """The result of `do`, which asks the store and may be called several times.

        Args:
            may_pass: whether an error of `do` is the store's (`Location.may_pass`).

        Raises:
            StoreError: the store did not answer within `seconds`.
            Exception: an error of `do` that is not the store's.
        """
        pauses = 0
        while True:
            self._check()
            try:
                result = do()
            except Exception as error:
                if not may_pass(error):
                    self.succeeded()  # the store has answered
                    raise
                pause = self.failed(short(error), pauses)
                if pause is None:
                    raise StoreError(short(error)) from error
                pauses += 1
                time.sleep(pause)
            else:
                self.succeeded()
                return result

    def succeeded(self) -> None:
        """The store has answered."""
        if self._failing_since is not None:
            with self._lock:
                self._failing_since = None

    def failed(self, said: str, pauses: int) -> float | None:
        """The store has failed. Returns the seconds to wait, or None if there is no patience left.

        Args:
            said: the failure, in short.
            pauses: the number of pauses so far.
        """
        with self._lock:
            now = time.monotonic()
            self._said = said
            if self._failing_since is None:
                self._failing_since = now
            left = self._failing_since + self._seconds - now
            if left <= 0:
                self._ask_again_at = now + LONGEST_PAUSE_S
                return None
            return min(FIRST_PAUSE_S * 2 ** min(pauses, 10), LONGEST_PAUSE_S, left)

    def _check(self) -> None:
        """Raise StoreError if the store must not be asked now."""
        with self._lock:
            now = time.monotonic()
            if self._failing_since is None or now < self._failing_since + self._seconds:
                return
            if now < self._ask_again_at:
                raise StoreError(self._said)
            self._ask_again_at = now + LONGEST_PAUSE_S  # this thread asks, the others do not
