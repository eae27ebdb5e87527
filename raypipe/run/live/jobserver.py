"""`raypipe runs | watch | scale` by way of a cluster's job server, from a machine that is no node.

The command itself runs there, as a small job that needs no CPU. Its lines are printed here.
"""

import asyncio
import contextlib
import logging
import re
import shlex
import sys
from collections.abc import Sequence

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from raypipe.errors import UsageError, printable
from raypipe.run.cluster import joining
from raypipe.run.cluster.session import without_rays_lines

_OF_RAY = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\s+(?:INFO|WARNING)\b|\(.*pid=\d+\)"
    r"|Running entrypoint for job raysubmit_\w+: "
)
"""Lines of Ray's own in the log of a job."""

_TRACEBACK = "Traceback (most recent call last):"

logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)


def do(address: str, arguments: Sequence[str]) -> int:
    """Do `raypipe ARGUMENTS` on the cluster whose job server is at `address`, http://HOST:PORT.

    Returns:
        The exit status of the command there.

    Raises:
        UsageError: the job server does not take it, or raypipe cannot start there.
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
    except (RuntimeError, requests.HTTPError) as error:  # it answers, with an error
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
        raised = asyncio.run(_print(client, job))
        if raised:
            raise UsageError(
                f"raypipe does not run on the head of the cluster at {address!r} "
                f"({printable(raised[-1], 300)}). Install its dependencies there (`raypipe "
                f"manifest dockerfile` prints an image that has them), or give the command on a "
                f"node that has them. `ray job logs {job}` shows more."
            )
        return _status(client, job)
    finally:  # also after Ctrl-C
        with contextlib.suppress(RuntimeError, OSError):
            client.stop_job(job)


async def _print(client: JobSubmissionClient, job: str) -> list[str]:
    """Print the lines of the job until it ends, and return those of a traceback."""
    rest, raised = "", list[str]()
    with contextlib.suppress(aiohttp.ClientError):
        async for text in client.tail_job_logs(job):
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                _take(line, raised)
    _take(rest, raised)
    sys.stdout.flush()
    return raised


def _take(line: str, raised: list[str]) -> None:
    """Print a line, or keep it if a traceback has begun: the rest of the log belongs to that."""
    if not line.strip() or _OF_RAY.match(line):
        return
    if raised or line == _TRACEBACK:
        raised.append(line)
    else:
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
