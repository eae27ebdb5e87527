"""Starts a module of raypipe in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def start(
    module: str, *arguments: str, through: Sequence[str] = (), **given: Any
) -> subprocess.Popen[bytes]:
    """Start `python -m MODULE ARGUMENT ...` so that it finds the modules of this process.

    raypipe may be in a checkout that is not installed. Ctrl-C does not reach the process: it is for
    the run, which ends the process.

    Args:
        through: a file of Python that starts the module, with its arguments before the module's.
        given: further arguments of Popen.

    Raises:
        OSError: the system starts no more processes.
    """
    return subprocess.Popen(
        # -P: no module of the current folder is taken for one of a library.
        [sys.executable, *(["-P", *through] if through else []), "-P", "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        start_new_session=True,
        **given,
    )
