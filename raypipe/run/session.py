"""The Ray that a run uses: joined, or started for it alone; and how many actors it has room for."""

import logging
import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypipe import UsageError
from raypipe.insight import planner
from raypipe.run.causes import raised_in_logs
from raypipe.run.settings import Settings
from raypipe.stages import After
from raypipe.stages.actor import ACTOR_BYTES

REST_BYTES = 1500 * 10**6
"""Memory for the driver, Ray's own processes and the system, beside the actors."""

ROOM = 0.6
"""Share of a machine's memory that actors may take of themselves; the rest is for the object store and others."""

START_S = {"opencv": 1.0, "torchvision": 3.0}
"""CPU seconds that the start of an actor costs (measured: libraries imported, mostly)."""


def versions() -> dict[str, str]:
    """Versions of what a run's results and speed depend on."""
    names = (
        "raypipe",
        "ray",
        "opencv-python-headless",
        "torch",
        "torchvision",
        "simplejpeg",
        "tifffile",
        "pillow",
        "numpy",
        "pyarrow",
    )
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except (
            ImportError
        ):  # PackageNotFoundError: raypipe itself, when only its source travels with a job
            found[name] = "source" if name == "raypipe" else "missing"
    return found


def cores_here() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Pools:
    """How many actors preprocess gets, and the stage after it; 0 where there is none."""

    actors: int
    after: int = 0


@dataclass(frozen=True, kw_only=True)
class Session:
    """The Ray that a run uses. `at_most`: actors of all stages together that there is room for; `cpus_each`: logical CPUs of each."""

    at_most: int
    cpus_each: float
    cores: float  # physical on a machine of our own, logical CPUs of a cluster
    nodes: int
    joined: bool
    dashboard: str | None
    address: str  # HOST:PORT, for who joins it
    gpus: int = 0


def beside_driver() -> dict[str, Any]:
    """Options for an actor on this node that takes no CPU: should it end with a node, then with that of the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


def joins() -> bool:
    """Whether a session that opens now would use a Ray that is there, instead of starting one on this machine alone."""
    return bool(os.environ.get("RAY_ADDRESS")) or ray.is_initialized()


def memory_for(actors: Iterable[tuple[int, str]]) -> int:
    """Bytes of memory that so many actors, each with these libraries, take with all that a run has beside them."""
    return sum(count * ACTOR_BYTES[libraries] for count, libraries in actors) + REST_BYTES


def room_here(settings: Settings, after: After | None = None, *, shard_bytes: int = 0) -> int:
    """How many actors this machine has memory for; more than cores, as those that wait need none.

    Args:
        shard_bytes: what a preprocess actor takes for its largest shard.

    Raises:
        UsageError: it has not for as many as asked for.
    """
    memory = psutil.virtual_memory().total
    stages = [(settings.actors, settings.backend)] + (
        [(after.actors, after.libraries)] if after else []
    )
    each = max(
        ACTOR_BYTES[settings.backend] + shard_bytes,
        *(ACTOR_BYTES[libraries] for _, libraries in stages),
    )
    room = max(int(ROOM * memory / each), 2)
    asked = [(count, libraries) for count, libraries in stages if count != "auto"]
    needed = memory_for(asked) + (shard_bytes * settings.actors if settings.actors != "auto" else 0)
    if needed > memory and asked:
        actors, options = _named(settings.actors, after.actors if after else None, after)
        raise UsageError(
            f"{actors} need about {needed / 1e9:.0f} GB of memory; this machine has {memory / 1e9:.0f} GB and {cores_here()} cores. Ask for "
            f"fewer with {options}."
        )
    return max(room, sum(count for count, _ in asked) + 1)


def _named(actors: int | str, others: int | str | None, after: After | None) -> tuple[str, str]:
    """So many actors of each stage, in words; and the options that say how many."""
    if after is None:
        return f"{actors} preprocess actors", "--actors"
    return f"{actors} preprocess actors and {others} {after.noun}", f"--actors and --{after.noun}"


def on_gpus(count: int, noun: str, *, must: bool | None, session: Session) -> bool:
    """Whether `count` actors, called `noun` and by an option of that name, hold a GPU each. `must`: True, False, or None: where there are enough.

    Raises:
        UsageError: they must, and there are too few.
    """
    if must and count > session.gpus:
        raise UsageError(
            f"--gpu with {count} {noun} needs as many GPUs, but Ray sees {session.gpus}. Ask for fewer with --{noun}, add GPU nodes, or take --cpu."
        )
    return must is not False and count <= session.gpus


def seated(after: After, session: Session) -> After:
    """`after` with it decided whether its actors hold GPUs; then as many as there are, unless it was said how many.

    Raises:
        UsageError: they must, and there are too few.
    """
    count = max(session.gpus, 1) if after.actors == "auto" else after.actors
    on_gpu = on_gpus(count, after.noun, must=after.gpu, session=session)
    return replace(after, gpu=on_gpu, actors=count if on_gpu else after.actors)


def size_pools(
    settings: Settings,
    costs: Sequence[planner.StageCost] | None,
    session: Session,
    *,
    images: int,
    after: After | None = None,
) -> Pools:
    """How many actors to start.

    Args:
        costs: of preprocess and the stage after it, timed beforehand; what is not known is left out. None: nothing is, then by rule of thumb.
        images: to do.
        after: the stage after preprocess, `seated`.

    Raises:
        UsageError: the cluster has fewer CPUs than asked for.
    """
    cpus = int(session.cores)
    wanted = {"preprocess": settings.actors} | ({after.name: after.actors} if after else {})
    fixed = {name: count for name, count in wanted.items() if count != "auto"}
    seats = (
        fixed[after.name] if after is not None and after.gpu else 0
    )  # on GPUs, which take no CPU
    room = session.at_most + seats
    # What was timed of a stage that turns out to be on GPUs was timed on a CPU.
    known = [
        replace(c, actors=fixed.get(c.name, 1))
        for c in costs or ()
        if not seats or after is None or c.name != after.name
    ]
    free = wanted.keys() - fixed.keys()
    if free and free <= {cost.name for cost in known}:
        start_s = max(
            START_S[libraries]
            for libraries in (settings.backend, *([after.libraries] if after else []))
        )
        machine = planner.Machine(cores=session.cores, actors=session.at_most)
        counts = planner.best(known, machine, fixed=fixed, images=images, start_s=start_s)
    else:
        counts = {}
        if after is not None:
            counts[after.name] = fixed.get(after.name, max(1, int(after.share * cpus)))
        counts["preprocess"] = max(1, min(cpus, room - sum(counts.values())))
    counts |= fixed
    if sum(counts.values()) > room:
        actors, options = _named(counts["preprocess"], counts[after.name] if after else None, after)
        raise UsageError(
            f"{actors} take {sum(counts.values()) - seats} CPUs, one each, but the cluster has {session.at_most}: Ray would wait for ever for "
            f"the rest. Ask for fewer with {options}, or add nodes first."
        )
    return Pools(actors=counts["preprocess"], after=counts[after.name] if after else 0)


def check_shared(file: str, *, option: str) -> None:
    """Raises UsageError where a node of the cluster does not see `file`, a local one of this node, which is where the user's `option` is."""
    sees = ray.remote(num_cpus=0)(os.path.exists)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    where = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    blind = sum(
        not seen
        for seen in ray.get([sees.options(scheduling_strategy=on).remote(file) for on in where])
    )
    if blind:
        raise UsageError(
            f"{option} is a folder of this node, and {blind} of the cluster's {len(nodes)} nodes do not see it: what they wrote would stay with them, "
            f"unknown to the run. Nothing was started. Give a folder that all of them share, or s3:// or gs://."
        )


ENDING = threading.Lock()
"""Held while a session's Ray ends, and by whoever asks it something from another thread: asked after its end, Ray would start another by itself."""


@dataclass(frozen=True, kw_only=True)
class _Open:
    session: Session
    ours: bool  # Ray ends with it
    thread: int  # that opened it
    ending: Any  # what SIGTERM did before


_open: list[_Open] = []  # the one that this process is in: of runs that share one, the outermost
_OPENING = threading.Lock()
"""Held while it is opened or closed."""


@contextmanager
def ray_session(
    settings: Settings, *, after: After | None = None, beside: int = 0, shard_bytes: int = 0
) -> Iterator[Session]:
    """Join the cluster that RAY_ADDRESS names, use the Ray that this process has already, or start one for this run alone.

    Within another ray_session it is that one, with its room: several runs then share what was opened once, for the largest of them.

    Args:
        after: the stage after preprocess.
        beside: CPUs that others than these actors take: the workers of a training.
        shard_bytes: what a preprocess actor takes for its largest shard.

    Raises:
        UsageError: there is no cluster at RAY_ADDRESS, no memory here for the actors asked for, or another run of this process has a Ray of
            its own.
    """
    with _OPENING:
        inner = bool(_open)
        if not inner:
            _open.append(_opened(settings, after, beside, shard_bytes))
        elif _open[0].ours and _open[0].thread != threading.get_ident():
            raise UsageError(
                "Another run of this process is going on, with a Ray that ends with it. Wait for it (`run.wait()`), start this one in a process "
                "of its own, or call ray.init() before both."
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
    """Raise ConnectionError where nobody who speaks Ray's protocol answers at `address`, HOST:PORT or ray://HOST:PORT.

    Ray itself would ask for minutes where nobody listens, and for 75 s where somebody else does (measured).
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
"""How often a Ray of our own frees blocks that nobody needs any more; Ray's default is 1000. In a second some 5 blocks come out of two cores, and
each takes memory that is new to the actor that stores it: 25 to 60 ms a block, where it else takes 13 (19 such blocks in two runs, then 10)."""


def ray_here(*, num_cpus: int, **options: Any) -> Any:
    """Start a Ray on this machine that is this process's own; the arguments, and what is returned, are those of ray.init."""
    # 0 would free at once, but have Ray no longer look whether its store is full enough to spill.
    own = (
        {}
        if "RAY_free_objects_period_milliseconds" in os.environ
        else {"free_objects_period_milliseconds": FREE_EVERY_MS}
    )
    return ray.init(address="local", num_cpus=num_cpus, _system_config=own, **options)


def _opened(settings: Settings, after: After | None, beside: int, shard_bytes: int) -> _Open:
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
                    room = room_here(settings, after, shard_bytes=shard_bytes)
                    context = ray_here(num_cpus=cores_here() + beside, **quiet)
        except ConnectionError as error:
            address = os.environ.get("RAY_ADDRESS", "")
            raise token_missing(address, error) or UsageError(
                f"RAY_ADDRESS is {address!r}, but no Ray cluster answers there ({error}). Start it, correct the address, or unset "
                f"RAY_ADDRESS to run on this machine alone."
            ) from error
        except Exception as error:
            if (
                type(error) is not Exception
            ):  # Ray has no class of its own for a node that does not come up
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
        # On a machine of our own, actors that wait may be many more than cores, and more may be asked for while it runs. More logical CPUs
        # instead would have Ray start an idle process for each of them.
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
        # After Ctrl-C Ray would say of every task under way that it will be retried, which it will not.
        with without_rays_lines(), ENDING:
            ray.shutdown()
    if ending is not None:
        signal.signal(signal.SIGTERM, ending)


def _end_by_sigterm() -> Any:
    """Have SIGTERM, which `ray job stop` and batch schedulers send, end a run as Ctrl-C does; returns what it did before. Ray has it print a stack and
    exit. None: this is not the main thread, and signals are not ours."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, signal.default_int_handler)


def token_missing(address: str, error: BaseException) -> UsageError | None:
    """What to tell the user if Ray refused to connect for want of a token; None: it was for another reason."""
    if "InvalidAuthToken" not in str(error.__cause__):
        return None
    return UsageError(
        f"The Ray cluster at {address!r} wants a token, and none was sent: Ray sends it to an address that is given only where "
        f"RAY_AUTH_MODE=token says so. Set that; and RAY_AUTH_TOKEN, unless the token is in ~/.ray/auth_token."
    )


@contextmanager
def without_rays_lines() -> Iterator[None]:
    """Keep Ray's account of itself off the terminal: a line for its log level at the start, and an alarming one for every actor pool, that its arguments are in the object store (as Ray Data puts them). They stay in Ray's log files; what raises still raises."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # What breaks a run is raised, and told in a line (command.attempt). Ray Data would log its whole trace before, twice.
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


def hardware(session: Session) -> dict[str, Any]:
    return {
        "cores": session.cores,
        "nodes": session.nodes,
        "gpus": session.gpus,
        "memory_bytes": psutil.virtual_memory().total,
        "processor": processor(),
    }


def processor() -> str:
    """What this machine's processor is called."""
    try:
        named = [
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    except OSError:
        named = []
    return (
        named[0].partition(":")[2].strip() if named else platform.processor() or platform.machine()
    )
