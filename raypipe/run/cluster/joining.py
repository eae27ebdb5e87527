"""Join a Ray that is there: what an address may be, why it may refuse, and what its nodes lack."""

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypipe.errors import UsageError
from raypipe.run.cluster import internals

ANSWERS_WITHIN_S = 10.0
CHECKED_WITHIN_S = 120.0
"""A node may first have to start a process."""

SUBMIT = "ray job submit --address http://HOST:8265 --working-dir . -- raypipe preprocess ..."
"""How a job gets to a cluster from anywhere."""

FROM_ANYWHERE = ("http://HOST:8265", "ray://HOST:10001")
"""The addresses by which a machine that is no node of a cluster can look at its runs."""


# --- the address -----------------------------------------------------------------------------


def is_job_server(address: str | None) -> bool:
    """Whether it is the address of a dashboard with a job server."""
    return (address or "").startswith(("http://", "https://"))


def check_address(address: str, *, job: bool) -> None:
    """Raise UsageError if a process of this machine cannot join `address`, as far as known before.

    Args:
        address: HOST:PORT, ray://HOST:PORT, or what else Ray takes.
        job: whether it is for a job, whose actors are started from this process; else for a look.
    """
    if job and (is_job_server(address) or address.startswith("ray://")):
        kind = "a job server" if is_job_server(address) else "Ray Client's address"
        raise UsageError(
            f"RAY_ADDRESS is {address!r}, {kind}: runs can be watched and scaled by it, but the "
            f"driver of a job must be on a node of the cluster. Nothing was started. Submit the "
            f"job: {SUBMIT}"
        )
    try:
        check_answers(address)
    except OSError as error:
        raise _no_answer(address, str(error), job=job) from error
    if _host(address) is not None and _no_node_here(address):
        raise _no_node(address, job=job)


def _no_node(address: str, *, job: bool) -> UsageError:
    return UsageError(
        f"A Ray cluster answers at {address!r}, but this machine is none of its nodes, and Ray "
        "lets only these join by that address. "
        + (
            f"Nothing was started. Submit the job: {SUBMIT}"
            if job
            else f"Give --address {FROM_ANYWHERE[0]}, or {FROM_ANYWHERE[1]}."
        )
    )


def _no_answer(address: str, said: str, *, job: bool) -> UsageError:
    if job:
        return UsageError(
            f"RAY_ADDRESS is {address!r}, but no Ray cluster answers there ({said}). Start it, "
            "correct the address, or unset RAY_ADDRESS to run on this machine alone."
        )
    return UsageError(
        f"No Ray cluster answers at {address!r} ({said}). Correct --address or RAY_ADDRESS."
    )


def _host(address: str) -> str | None:
    """The host of HOST:PORT; None for any other address."""
    host, _, port = address.rpartition(":")
    return host if host and "/" not in host and port.isdigit() else None


def check_answers(address: str) -> None:
    """Raise ConnectionError if no Ray answers at `address`, HOST:PORT or ray://HOST:PORT.

    Ray itself would try for minutes if nobody listens, and for 75 s if another program does
    (measured).
    """
    where = address.removeprefix("ray://")
    host = _host(where)
    if host is None or os.environ.get("RAY_USE_TLS", "0") == "1":
        return
    port = int(where.rpartition(":")[2])
    socket.create_connection((host, port), timeout=ANSWERS_WITHIN_S).close()
    with grpc.insecure_channel(where) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWERS_WITHIN_S)
        except grpc.FutureTimeoutError as error:
            raise ConnectionError(f"no answer in {ANSWERS_WITHIN_S:.0f} s") from error


def _no_node_here(address: str) -> bool:
    """Whether no raylet of the cluster runs on this machine. False where that cannot be told.

    Ray would wait for one for a minute.
    """
    if internals.missing("joining"):
        return False
    from ray._private.services import find_node_ids
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    here = set(find_node_ids())
    if not here:
        return True
    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=ANSWERS_WITHIN_S)
    except Exception:  # a token, a version: joining says which
        return False
    return here.isdisjoint(node.hex() for node in nodes)


def refusal(address: str, error: BaseException, *, job: bool) -> UsageError:
    """Why Ray did not join `address`, for the user."""
    said = " ".join(f"{error} {error.__cause__ or ''}".split())
    if "InvalidAuthToken" in said or isinstance(error, AuthenticationError):
        return _token(address)
    if "Version mismatch" in said:
        versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", said)
        there, here = (" and Python ".join(pair) for pair in (*versions, *(("?", "?"),) * 2)[:2])
        return UsageError(
            f"The cluster at {address!r} has Ray {there}, and this is Ray {here}: they cannot talk "
            "to each other. Use an environment with the cluster's versions"
            + (f", or submit the job: {SUBMIT}" if job else f", or --address {FROM_ANYWHERE[0]}.")
        )
    if "No node info found" in said:
        return _no_node(address, job=job)
    if "Ray client server failed" in said:
        return UsageError(
            f"The cluster at {address!r} did not start its server for this client in time: it is "
            f"overloaded. Try again, or give --address {FROM_ANYWHERE[0]}."
        )
    return _no_answer(address, said[:300], job=job)


def send_token() -> None:
    """Send the user's token, if there is one, to addresses that are given too.

    By itself, Ray sends it only to a Ray that it finds on this machine. A process that has imported
    Ray does not read RAY_AUTH_MODE again.
    """
    if internals.missing("token"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        return
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _token(address: str) -> UsageError:
    """The error if a cluster does not take the token that was sent, or none was."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        place = (
            "RAY_AUTH_TOKEN"
            if os.environ.get("RAY_AUTH_TOKEN")
            else os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
        )
        return UsageError(
            f"The Ray cluster at {address!r} does not take the token in {place}: it is that of "
            "another cluster, or it is missing. Put the cluster's token there."
        )
    return UsageError(
        f"The Ray cluster at {address!r} wants a token, and none was sent: Ray sends it to a given "
        "address only if RAY_AUTH_MODE=token says so. Set that; and RAY_AUTH_TOKEN, unless the "
        "token is in ~/.ray/auth_token."
    )


# --- the package -----------------------------------------------------------------------------


def package() -> str:
    """The folder of raypipe, which can travel to the nodes (`py_modules`)."""
    return str(Path(__file__).parents[2])


def submitted() -> bool:
    """Whether this process is a submitted job, whose submitter chose what travels."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _looker() -> Callable[[], str]:
    """A function that says which raypipe its process can import; `no ...` if it cannot.

    It is made here so that Ray sends it whole: a node without raypipe could not import it.
    """

    def look() -> str:
        import hashlib
        import importlib
        import importlib.util
        import pathlib

        try:
            found = importlib.util.find_spec("raypipe")
            if found is None or found.origin is None:
                return "no raypipe"
            for module in ("cv2", "obstore", "simplejpeg", "tifffile", "raypipe.stages.actor"):
                importlib.import_module(module)
        except ImportError as error:
            return f"no {error.name or error}"
        root = pathlib.Path(found.origin).parent
        digest = hashlib.sha256()
        for file in sorted(root.rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
        return digest.hexdigest()

    return look


def lacking() -> dict[str, str]:
    """The nodes of the joined cluster that cannot import this raypipe: what each has.

    The driver's own node is not asked if it imports raypipe from the working folder: Ray has its
    processes look there too.

    Returns:
        By node id: `no MODULE`, `another raypipe`, or why it did not say.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if Path(package()).parent == Path.cwd():
        nodes.remove(here)
    if not nodes:
        return {}
    look = _looker()
    asked = ray.remote(num_cpus=0, max_retries=0)(look)
    answers = {
        asked.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(): node
        for node in nodes
    }
    ready, _ = ray.wait([*answers], num_returns=len(answers), timeout=CHECKED_WITHIN_S)
    mine, lacks = look(), {}
    for answer, node in answers.items():
        try:
            said = ray.get(answer, timeout=1) if answer in ready else "no answer"
        except RayError as error:
            said = f"no answer: {str(error).splitlines()[-1][:200]}"
        if said != mine:
            lacks[node] = said if said.startswith("no ") else "another raypipe"
    return lacks


def absence(lacks: dict[str, str], *, nodes: int) -> UsageError:
    """The error for nodes that lack something (`lacking`), also with the package sent along."""
    what = ", ".join(sorted(set(lacks.values())))
    return UsageError(
        f"{len(lacks)} of the cluster's {nodes} nodes cannot do this job: {what}. Nothing was "
        f"started. Install raypipe's dependencies there, and have the package travel: {SUBMIT}"
    )


def with_package(options: dict[str, Any]) -> dict[str, Any]:
    """Options of ray.init, with raypipe sent along to each node."""
    return options | {"runtime_env": {"py_modules": [package()]}}
