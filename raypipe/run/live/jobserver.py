"""`raypipe runs | watch | scale` by way of a cluster's job server, from a machine that is no node.

The command itself runs there, as a small job that needs no CPU. Its lines are printed here.
"""

import asyncio
import contextlib
import re
import shlex
import sys
from collections.abc import Sequence

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from raypipe.errors import UsageError, printable
from raypipe.run.cluster import joining
from raypipe.run.cluster.session import without_rays_lines

_OF_RAY = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\s+(?:INFO|WARNING)\b|\(.*pid=\d+\)")
"""Lines of Ray's own in the log of a job."""


def do(address: str, arguments: Sequence[str]) -> int:
    """Do `raypipe ARGUMENTS` on the cluster whose job server is at `address`, http://HOST:PORT.

    Returns:
        The exit status of the command there.

    Raises:
        UsageError: the job server does not take it.
    """
    try:
        with without_rays_lines():
            client = JobSubmissionClient(address)
            job = client.submit_job(
                entrypoint="python -m raypipe.cli " + shlex.join(arguments),
                runtime_env={"py_modules": [joining.package()]},
                metadata={"raypipe": arguments[0]},
            )
    except AuthenticationError as error:
        raise joining.refusal(address, error, job=False) from error
    except RuntimeError as error:  # with a status: it is there
        raise UsageError(
            f"The job server at {address!r} does not take the command "
            f"({printable(str(error), 300)}). Try again, or look at the cluster's dashboard."
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"No job server answers at {address!r} ({printable(str(error), 300)}). Correct "
            "--address or RAY_ADDRESS; `ray dashboard cluster.yaml` makes a way to port 8265."
        ) from error
    try:
        asyncio.run(_print(client, job))
        return _status(client, job)
    finally:  # also after Ctrl-C
        with contextlib.suppress(RuntimeError, OSError):
            client.stop_job(job)


async def _print(client: JobSubmissionClient, job: str) -> None:
    """Print the lines of the job until it ends."""
    rest = ""
    with contextlib.suppress(aiohttp.ClientError):
        async for text in client.tail_job_logs(job):
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                _print_line(line)
    _print_line(rest)
    sys.stdout.flush()


def _print_line(line: str) -> None:
    if line.strip() and not _OF_RAY.match(line):
        print(printable(line, 20_000), flush=True)


def _status(client: JobSubmissionClient, job: str) -> int:
    found = client.get_job_info(job)
    if found.driver_exit_code is not None:
        return found.driver_exit_code
    if found.status == JobStatus.SUCCEEDED:
        return 0
    raise UsageError(
        f"The job server did not do it: {printable(found.message or str(found.status), 500)}"
    )
