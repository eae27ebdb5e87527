"""What is said of job servers that do not do it. tests/run/test_anywhere.py has one that does."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from raypipe.errors import UsageError
from raypipe.run.live import jobserver
from tests.support.clusters import free_ports


class Refuses(BaseHTTPRequestHandler):
    """A server with an error of its own for each request."""

    def do_GET(self) -> None:
        self.send_error(500, "no agent")

    def log_message(self, *given: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    """The address of a server that refuses all."""
    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_job_server_that_answers_with_an_error_is_not_said_to_be_absent(refusing):
    with pytest.raises(UsageError, match=r"does not take the command \(500 Server Error") as told:
        jobserver.do(refusing, ["runs"])
    assert refusing in str(told.value) and "No job server" not in str(told.value)


def test_an_address_where_nothing_listens_is_said_to_have_no_job_server():
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(UsageError, match="No job server answers at") as told:
        jobserver.do(address, ["runs"])
    assert address in str(told.value) and "Correct --address" in str(told.value)
