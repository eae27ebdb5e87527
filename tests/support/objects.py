"""An HTTP object store on this machine that fails on demand, for real clients."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Objects:
    """`contents` by key. `fails(key, n)`: what the n-th request gets, from 0 on: an HTTP status,
    `reset` (in mid-body), `short` (a body that is closed early), or None: an answer. A put that
    gets `reset` or `short` is cut off in mid-body, or stored and not answered. `together`: the most
    requests at the same time."""

    contents: dict[str, bytes] = field(default_factory=dict)
    fails: Callable[[str, int], int | str | None] = lambda key, n: None
    asked: list[tuple[float, str]] = field(default_factory=list)
    port: int = 0
    wait_s: float = 0.0  # of each request
    now: int = 0
    together: int = 0

    def uri(self, key: str) -> str:
        return f"s3://anonymous@photos/{key}?endpoint_override=http://127.0.0.1:{self.port}&region=us-east-1"


@contextlib.contextmanager
def objects(**contents: bytes) -> Iterator[Objects]:
    """Serve `contents` until the end of the block."""
    store, lock = Objects(contents=dict(contents)), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            key = self.path.removeprefix("/photos/").partition("?")[0]
            failure = store.fails(key, len(store.asked))
            store.asked.append((time.monotonic(), key))
            if isinstance(failure, int):
                return self.answer(failure, b"<Error><Code>SlowDown</Code></Error>")
            data = store.contents.get(key)
            if data is None:
                return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            whole, status = len(data), 200
            if (wanted := self.headers.get("Range")) is not None:
                first, last = wanted.removeprefix("bytes=").split("-")
                start = int(first)
                if start >= whole:
                    return self.answer(416, b"")
                data, status = data[start : int(last) + 1], 206
                self.range = f"bytes {start}-{start + len(data) - 1}/{whole}"
            return self.answer(status, data, cut=failure)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_PUT(self) -> None:
            key = self.path.removeprefix("/photos/").partition("?")[0]
            failure = store.fails(key, len(store.asked))
            store.asked.append((time.monotonic(), key))
            with lock:
                store.now += 1
                store.together = max(store.together, store.now)
            time.sleep(store.wait_s)
            with lock:
                store.now -= 1
            size = int(self.headers["Content-Length"])
            if failure == "reset":
                self.rfile.read(size // 2)
                return self.hang_up(reset=True)
            data = self.rfile.read(size)
            if isinstance(failure, int):
                return self.answer(failure, b"<Error><Code>SlowDown</Code></Error>")
            if len(data) == size:
                store.contents[key] = data
            if failure == "short":
                return self.hang_up(reset=False)
            return self.answer(200, b"")

        def hang_up(self, *, reset: bool) -> None:
            if reset:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

        def answer(self, status: int, data: bytes, cut: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", formatdate(usegmt=True))
            if status == 206:
                self.send_header("Content-Range", self.range)
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(data if cut is None else data[: len(data) // 2])
            if cut is not None:
                self.wfile.flush()
                self.hang_up(reset=cut == "reset")

        def log_message(self, *args: object) -> None: ...

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Clients that hang up are part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    store.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
