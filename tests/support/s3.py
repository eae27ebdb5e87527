"""A real S3 server on this machine, in a process of its own."""

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

# moto checks the condition of a put and then puts: two threads of it may both find a key free.
MOTO = """
import threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

app, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

def answer(environ, start_response):
    with one_at_a_time:
        return list(app(environ, start_response))

run_simple("127.0.0.1", 0, answer, threaded=True)
"""


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Where the server listens, HOST:PORT, until the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", MOTO],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        address = next(
            match[1]
            for line in process.stderr
            if (match := re.search(r"http://(127\.0\.0\.1:\d+)", line))
        )
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        yield address
    finally:
        process.kill()
        process.wait()


def query(address: str) -> str:
    """The options of a URI of the server at `address`."""
    return f"scheme=http&endpoint_override={address}&region=us-east-1&allow_bucket_creation=true"
