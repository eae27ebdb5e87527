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
    `reset` (in mid-body), `short` (a body that is closed early), or None: an answer."""

    contents: dict[str, bytes] = field(default_factory=dict)
    fails: Callable[[str, int], int | str | None] = lambda key, n: None
    asked: list[tuple[float, str]] = field(default_factory=list)
    port: int = 0

    def uri(self, key: str) -> str:
        return f"s3://anonymous@photos/{key}?endpoint_override=http://127.0.0.1:{self.port}&region=us-east-1"


@contextlib.contextmanager
def objects(**contents: bytes) -> Iterator[Objects]:
    """Serve `contents` until the end of the block."""
    store = Objects(contents=dict(contents))

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
                if cut == "reset":
                    self.connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                self.connection.shutdown(
                    socket.SHUT_RDWR
                ) if cut == "short" else self.connection.close()
                self.close_connection = True

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    store.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
