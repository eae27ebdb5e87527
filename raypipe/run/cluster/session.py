"""Ray's life around a run: joined, or started for it alone, and ended with it."""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypipe.errors import UsageError
from raypipe.run.causes import raised_in_logs
from raypipe.run.cluster.machine import Session, cores_here
from raypipe.run.cluster.sizing import room_here
from raypipe.stages.stage import Stage


def beside_driver() -> dict[str, Any]:
    """Options for an actor on the driver's node that takes no CPU: no other node's loss can end it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


def joins() -> bool:
    """Whether a session that opens now would use a Ray that exists, instead of starting one."""
    return bool(os.environ.get("RAY_ADDRESS")) or ray.is_initialized()


def check_shared(file: str, *, option: str) -> None:
    """Raise UsageError where a node of the cluster does not see `file`, a local file of this node.

    Args:
        option: the user's flag and value, for the message.
    """
    sees = ray.remote(num_cpus=0)(os.path.exists)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    where = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    blind = sum(
        not seen
        for seen in ray.get([sees.options(scheduling_strategy=on).remote(file) for on in where])
    )
    if blind:
        raise UsageError(
            f"{option} is a folder of this node, and {blind} of the cluster's {len(nodes)} nodes do not "
            f"see it: what they wrote would stay with them, unknown to the run. Nothing was started. Give a "
            f"folder that all of them share, or s3:// or gs://."
        )


ENDING = threading.Lock()
"""Held while a session's Ray ends, and by other threads that ask it something. Asked after its end, Ray
would start another one by itself."""


@dataclass(frozen=True, kw_only=True)
class _Open:
    session: Session
    ours: bool  # Ray ends with it
    thread: int  # that opened it
    ending: Any  # what SIGTERM did before


_open: list[_Open] = []  # the session of this process, if there is one
_OPENING = threading.Lock()
"""Held while it is opened or closed."""


@contextmanager
def ray_session(
    stages: Sequence[Stage], *, beside: int = 0, shard_bytes: int = 0
) -> Iterator[Session]:
    """Join the cluster that RAY_ADDRESS names, use the Ray of this process, or start one for this run alone.

    Within another ray_session it is that one, with its room. Several runs then share what was opened
    once, for the largest of them.

    Args:
        stages: what the run needs room for.
        beside: CPUs that others than these actors take: the workers of a training.
        shard_bytes: memory that an actor of the first stage takes for its largest shard.

    Raises:
        UsageError: there is no cluster at RAY_ADDRESS, no memory here for the actors asked for, or
            another run of this process has a Ray that ends with it.
    """
    with _OPENING:
        inner = bool(_open)
        if not inner:
            _open.append(_opened(stages, beside, shard_bytes))
        elif _open[0].ours and _open[0].thread != threading.get_ident():
            raise UsageError(
                "Another run of this process is going on, with a Ray that ends with it. Wait for it "
                "(`run.wait()`), start this one in a process of its own, or call ray.init() before both."
            )
        opened = _open[0]
    try:
        yield opened.session
    finally:
        if not inner:
            with _OPENING:
                _open.clear()
                _end(ours=opened.ours, ending=opened.ending)


ANSWERS_WITHIN_S = 10.0


def check_answers(address: str) -> None:
    """Raise ConnectionError where no Ray answers at `address`, HOST:PORT or ray://HOST:PORT.

    Ray itself would ask for minutes where nobody listens, and for 75 s where another program does
    (measured).
    """
    where = address.removeprefix("ray://")
    host, _, port = where.rpartition(":")
    if not host or "/" in host or not port.isdigit() or os.environ.get("RAY_USE_TLS", "0") == "1":
        return
    socket.create_connection((host, int(port)), timeout=ANSWERS_WITHIN_S).close()
    with grpc.insecure_channel(where) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWERS_WITHIN_S)
        except grpc.FutureTimeoutError as error:
            raise ConnectionError(f"no answer in {ANSWERS_WITHIN_S:.0f} s") from error


FREE_EVERY_MS = 100
"""How often the Ray that raypipe starts frees blocks that nobody needs; Ray's default is 1000.

Two cores make some 5 blocks a second. A block in memory that is new to its actor takes 25 to 60 ms to
store, otherwise 13 ms (19 such blocks in two runs, then 10)."""


def ray_here(*, num_cpus: int, **options: Any) -> Any:
    """Start a Ray for this process alone; arguments and result are those of ray.init."""
    # Not 0, which frees at once: Ray then no longer checks whether its store must spill.
    own = (
        {}
        if "RAY_free_objects_period_milliseconds" in os.environ
        else {"free_objects_period_milliseconds": FREE_EVERY_MS}
    )
    return ray.init(address="local", num_cpus=num_cpus, _system_config=own, **options)


def _opened(stages: Sequence[Stage], beside: int, shard_bytes: int) -> _Open:
    joined = joins()
    ours = not ray.is_initialized()
    dashboard = None
    if ours:
        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        try:
            with without_rays_lines():
                if joined:
                    check_answers(os.environ.get("RAY_ADDRESS", ""))
                    context = ray.init(**quiet)
                else:
                    room = room_here(stages, shard_bytes=shard_bytes)
                    context = ray_here(num_cpus=cores_here() + beside, **quiet)
        except ConnectionError as error:
            address = os.environ.get("RAY_ADDRESS", "")
            raise token_missing(address, error) or UsageError(
                f"RAY_ADDRESS is {address!r}, but no Ray cluster answers there ({error}). Start it, correct "
                f"the address, or unset RAY_ADDRESS to run on this machine alone."
            ) from error
        except Exception as error:
            if (
                type(error) is not Exception
            ):  # Ray raises a bare one for a node that does not come up
                raise
            cause = raised_in_logs()
            raise TimeoutError(
                f"Ray did not start: {cause}. Install or mend what it names, then start again."
                if cause
                else f"Ray did not start: {error} Try again when other programs leave it more of the machine."
            ) from None
        dashboard = context.dashboard_url or None
    ending = _end_by_sigterm() if ours else None
    try:
        cpus = int(ray.cluster_resources().get("CPU", 0)) - (beside if joined else 0)
        nodes = sum(1 for node in ray.nodes() if node["Alive"])
        cores = min(cpus + (beside if joined else 0), cores_here()) if nodes == 1 else cpus + beside
        # Actors that mostly wait may outnumber the cores, and more may be asked for later. Each gets a
        # fraction of a CPU: with more logical CPUs Ray would start an idle process for each.
        at_most, each = (cpus, 1.0) if joined else (room, int(10_000 * cores / room) / 10_000)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        address = ray.get_runtime_context().gcs_address
        session = Session(
            at_most=at_most,
            cpus_each=each,
            cores=cores,
            nodes=nodes,
            joined=joined,
            dashboard=dashboard,
            address=address,
            gpus=gpus,
        )
    except BaseException:
        _end(ours=ours, ending=ending)
        raise
    return _Open(session=session, ours=ours, thread=threading.get_ident(), ending=ending)


def _end(*, ours: bool, ending: Any) -> None:
    if ours:
        # After Ctrl-C Ray would announce retries of every task under way, which never happen.
        with without_rays_lines(), ENDING:
            ray.shutdown()
    if ending is not None:
        signal.signal(signal.SIGTERM, ending)


def _end_by_sigterm() -> Any:
    """Have SIGTERM, which `ray job stop` and batch schedulers send, end a run as Ctrl-C does.

    Ray would have it print a stack and exit. Returns the handler before; None: this is not the main
    thread, so signals cannot be set.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, signal.default_int_handler)


def token_missing(address: str, error: BaseException) -> UsageError | None:
    """The error for the user if Ray refused to connect without a token; None: it was another reason."""
    if "InvalidAuthToken" not in str(error.__cause__):
        return None
    return UsageError(
        f"The Ray cluster at {address!r} wants a token, and none was sent: Ray sends it to an address "
        f"that is given only where RAY_AUTH_MODE=token says so. Set that; and RAY_AUTH_TOKEN, unless the "
        f"token is in ~/.ray/auth_token."
    )


@contextmanager
def without_rays_lines() -> Iterator[None]:
    """Keep Ray's own lines off the terminal; they stay in its log files, and what raises still raises.

    They are a line for its log level at the start, and a warning for every actor pool that its
    arguments are in the object store (where Ray Data puts them).
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # Errors are raised, and told in a line (command.attempt). Ray Data would log the whole trace twice.
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
