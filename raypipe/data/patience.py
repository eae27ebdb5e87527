"""How long a store that fails is asked again. Counted for the store, not for each image."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from raypipe.data.location import StoreError, may_pass, short

T = TypeVar("T")

READ_PATIENCE_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
"""Pauses double from the first to the longest: 11 tries in 60 s."""


class Patience:
    """One store's failures. It is asked again with growing pauses, for at most `seconds` without one success.

    After that it is asked once in LONGEST_PAUSE_S; what is wanted meanwhile fails at once. One
    success, and it is as if nothing had been. Threads may share it.
    """

    def __init__(self, seconds: float = READ_PATIENCE_S):
        self._seconds = seconds
        self._lock = threading.Lock()
        self._failing_since: float | None = None
        self._ask_again_at = 0.0  # once patience is at its end
        self._said = ""

    def call(self, do: Callable[[], T], location: str) -> T:
        """What `do` returns, which reads from `location` and may be called several times.

        Raises:
            StoreError: the store did not answer for as long as that.
            Exception: what `do` raises of the file itself.
        """
        pauses = 0
        while True:
            self._check()
            try:
                result = do()
            except Exception as error:
                if not may_pass(error, location):
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
        """The store has failed after so many pauses: seconds to wait before it is asked again; None:
        there is no patience left."""
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
        """Raise StoreError where the store is not to be asked now."""
        with self._lock:
            now = time.monotonic()
            if self._failing_since is None or now < self._failing_since + self._seconds:
                return
            if now < self._ask_again_at:
                raise StoreError(self._said)
            self._ask_again_at = now + LONGEST_PAUSE_S  # one asks, the others do not


def listed(do: Callable[[], T], uri: str) -> T:
    """What `do` returns, which asks a remote store by pyarrow; a store that does not answer is asked again.

    Raises:
        OSError: it did not, or there is no such thing.
    """

    def ask() -> T:
        try:
            return do()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:  # Arrow has no class for what may pass
            raise StoreError(short(error)) from error

    return Patience().call(ask, uri)
