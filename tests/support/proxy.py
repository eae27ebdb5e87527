"""A proxy in front of a server on this machine: a longer way, and a way that breaks.

python -m tests.support.proxy 127.0.0.1:5000 --latency-ms 30    # prints where it listens
"""

import argparse
import asyncio
import contextlib
import threading
from collections.abc import Iterator


class Proxy:
    """Passes connections on to `target`, HOST:PORT. Methods are for other threads.

    latency_s: from a request to its answer, and for a new connection. Bytes in between arrive late
        by half of it, at whatever rate they were sent.
    address: where it listens.
    """

    def __init__(self, target: str, *, latency_s: float = 0.0) -> None:
        self.latency_s = latency_s
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._loop = asyncio.new_event_loop()
        self._cuts = 0
        self._cut_to = 0
        self._away = False
        self.sides: set[_Side] = set()
        server = self._loop.run_until_complete(
            self._loop.create_server(lambda: _Side(self), "127.0.0.1", 0)
        )
        self.address = "127.0.0.1:{1}".format(*server.sockets[0].getsockname())

    def serve(self) -> None:
        """Until `end`."""
        self._loop.run_forever()

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    def cut(self, answers: int, to: int) -> None:
        """Cut the next so many answers off after `to` bytes: the connection is reset."""
        self._cut_to, self._cuts = to, answers

    @property
    def cuts(self) -> int:
        """Answers that are still to be cut."""
        return self._cuts

    def away(self) -> None:
        """Reset all connections, and every new one, until `back`."""
        self._away = True

        def cut_all() -> None:
            for side in list(self.sides):
                side.abort()

        self._loop.call_soon_threadsafe(cut_all)

    def back(self) -> None:
        self._away = False

    # --- of the loop -------------------------------------------------------------------------

    def refuses(self) -> bool:
        return self._away

    def cut_off(self, size: int) -> int | None:
        """How many of `size` bytes of an answer may pass before it is reset; None: all."""
        if self._cuts and size > self._cut_to:
            self._cuts -= 1
            return self._cut_to
        return None

    def connect(self, side: "_Side") -> None:
        """Open the way from a client's connection to the server."""

        async def connect() -> None:
            try:
                await self._loop.create_connection(lambda: side, self._host, self._port)
            except OSError:
                side.other.abort()

        self.later(lambda: self._loop.create_task(connect()), ways=2)

    def later(self, do, ways: int = 1) -> None:
        if self.latency_s:
            self._loop.call_later(ways * self.latency_s / 2, do)
        else:
            do()


class _Side(asyncio.Protocol):
    """One of two connections. What it receives goes to `other`."""

    other: "_Side"

    def __init__(self, proxy: Proxy, client: "_Side | None" = None) -> None:
        self._proxy, self._is_client = proxy, client is None
        self._transport: asyncio.Transport | None = None
        self._waiting: list[bytes] = []
        if client is not None:
            self.other = client

    def connection_made(self, transport) -> None:
        self._transport = transport
        if self._proxy.refuses():
            transport.abort()
            return
        self._proxy.sides.add(self)
        if self._is_client:
            self.other = _Side(self._proxy, self)
            self._proxy.connect(self.other)
        for data in self._waiting:
            transport.write(data)

    def data_received(self, data: bytes) -> None:
        allowed = None if self._is_client else self._proxy.cut_off(len(data))
        if allowed is not None:
            self._proxy.later(lambda: self.other.send(data[:allowed], last=True))
        else:
            self._proxy.later(lambda: self.other.send(data))

    def send(self, data: bytes, *, last: bool = False) -> None:
        if self._transport is None:
            self._waiting.append(data)
        elif not self._transport.is_closing():
            self._transport.write(data)
            if last:
                self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._proxy.sides.discard(self)
        if getattr(self, "other", None) is not None:
            self._proxy.later(self.other.close)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


@contextlib.contextmanager
def proxy(target: str, *, latency_s: float = 0.0) -> Iterator[Proxy]:
    """A proxy in a thread of this process."""
    made = Proxy(target, latency_s=latency_s)
    thread = threading.Thread(target=made.serve, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.end()
        thread.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--latency-ms", type=float, default=0.0)
    given = parser.parse_args()
    here = Proxy(given.target, latency_s=given.latency_ms / 1000)
    print(here.address, flush=True)
    here.serve()
