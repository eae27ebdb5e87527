"""Begins a worker of Ray as a fork of the fork server (`forkserver.py`).

    python forked.py ADDRESS WORKER ARGUMENT ...

The raylet runs this file in place of WORKER, Ray's own file of a worker. It sends its arguments,
environment and standard streams to the server, which forks a process that becomes the worker. Where
that cannot be, this process becomes the worker itself, as without the server.

This file imports no more than it needs: each worker waits for it.
"""

import json
import os
import socket
import sys


def fork(address: str, arguments: list[str]) -> bool:
    """Ask the server at `address` for a worker. False: it gives none."""
    asked = {
        "python": sys.executable,
        "argv": arguments,
        "env": dict(os.environ),
        "cwd": os.getcwd(),
    }
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(address)
            socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
            server.shutdown(socket.SHUT_WR)
            return server.recv(1) != b""
        except OSError:
            return False


def main() -> None:
    """Begin a worker."""
    _, address, *arguments = sys.argv
    if not fork(address, arguments):
        os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    main()
