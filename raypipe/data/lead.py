"""How far reads go ahead of their consumer, from the latency that is measured."""

import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

REQUESTS_AT_ONCE = 64
"""Requests to a store that one actor makes at the same time, at most: 2,000 a second at 30 ms."""

FEW = 8
"""Requests at the same time until their latency is known, and at least."""

_REMEMBERED = 32  # requests and chunks that count


class Lead:
    """How many requests must be under way so that the consumer does not wait for one.

    That is twice the time of a request over the consumer's time for its rows: requests differ. A
    request's time is the median of the last ones.
    """

    def __init__(self, most: int) -> None:
        """
        Args:
            most: requests at the same time.
        """
        self._most = most
        self._requests_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._consumer_s: float | None = None

    def request(self, do: Callable[[], T]) -> T:
        """The result of `do`, whose time is remembered."""
        began = time.perf_counter()
        try:
            return do()
        finally:
            self._requests_s.append(time.perf_counter() - began)

    def consumed(self, seconds: float) -> None:
        """The consumer took `seconds` for the rows of one request."""
        before = seconds if self._consumer_s is None else self._consumer_s
        self._consumer_s = before + (seconds - before) / _REMEMBERED

    @property
    def requests(self) -> int:
        """How many to have under way."""
        known = sorted(self._requests_s)
        if len(known) < FEW or self._consumer_s is None:
            return min(FEW, self._most)
        wanted = 2 * known[len(known) // 2] / max(self._consumer_s, 1e-6)
        return int(min(max(wanted, FEW), self._most))
