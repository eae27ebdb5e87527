"""Begins a process as a fork of the fork server (`forkserver.py`).

    python forked.py ADDRESS WORKER ARGUMENT ...
    python forked.py ADDRESS -P -m MODULE ARGUMENT ...

The raylet runs this file in place of WORKER, Ray's own file of a worker. It sends its arguments,
environment and standard streams to the server, which forks a process that becomes the worker. Where
that cannot be, this process becomes the worker itself, as without the server.

A MODULE of raypipe begins so too. Then this process waits for the fork. When this process is
killed, the kernel kills the fork.

This file imports no more than it needs: each worker waits for it.
"""

import json
import os
import socket
import sys

MODULE = ["-P", "-m"]
"""The first arguments for a module of raypipe."""


def fork(address: str, arguments: list[str]) -> bool:
    """Ask the server at `address` for a fork. False: it gives none."""
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
            is_forked = server.recv(1) != b""
        except OSError:
            return False
        if is_forked and arguments[:2] == MODULE:
            server.recv(1)  # b"" when the fork ends
        return is_forked


def main() -> None:
    """Begin a process."""
    _, address, *arguments = sys.argv
    if not fork(address, arguments):
        os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    main()
