"""Ray around a run: a cluster that is joined, or one that is started and ended with the run."""

import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypipe.errors import UsageError
from raypipe.run.causes import raised_in_logs
from raypipe.run.cluster import internals, joining
from raypipe.run.cluster.forkserver import ForkServer
from raypipe.run.cluster.interrupts import Interrupts
from raypipe.run.cluster.joined import as_it_is
from raypipe.run.cluster.machine import Session, cores_here
from raypipe.run.cluster.sizing import bounded, room_here
from raypipe.stages.stage import Stage

if TYPE_CHECKING:
    from raypipe.run.cluster.helpers import Helpers
    from raypipe.run.cluster.starting import Start


def joins() -> bool:
    """Whether a session that opens now would use an existing Ray, instead of starting one."""
    return bool(os.environ.get("RAY_ADDRESS")) or ray.is_initialized()


def check_shared(file: str, *, option: str) -> None:
    """Raise UsageError if a node of the cluster does not see `file`, a local file of this node.

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
            f"{option} is a folder of this node, and {blind} of the cluster's {len(nodes)} nodes "
            f"do not see it: what they wrote would stay with them, unknown to the run. Nothing was "
            f"started. Give a folder that all of them share, or s3:// or gs://."
        )


ENDING = threading.Lock()
"""Held while a session's Ray ends, and by other threads that call it. A call after the end would
start another Ray."""


@dataclass(kw_only=True)
class _Open:
    """The open session of this process.

    ours: whether Ray ends with it.
    start: starts the rest of Ray after the first output; None: all of it is there.
    thread: the one that opened it.
    interrupts: raises KeyboardInterrupt by signals, if the Ray is ours.
    users: how many are inside. It ends with the last of them, whichever that is.
    """

    session: Session
    ours: bool
    start: "Start | None"
    thread: int
    interrupts: Interrupts
    users: int = 0


_open: list[_Open] = []
"""The session of this process, if there is one."""

_OPENING = threading.Lock()
"""Held while the session is opened or closed."""


@contextmanager
def forking(stages: Sequence[Stage]) -> Iterator[ForkServer | None]:
    """A fork server with what the actors of `stages` import, for a Ray that will start.

    It ends with the block, or with the session that has taken it. None: Ray is there already, or
    this system gives no process or socket, or TMPDIR is too long for a socket.
    """
    server = None
    if not _open and not joins() and _is_quick():
        with suppress(OSError):
            server = ForkServer(_modules(stages))
    try:
        yield server
    finally:
        taken = any(opened.start is not None and opened.start.forks is server for opened in _open)
        if server is not None and not taken:
            server.close()


@contextmanager
def ray_session(
    stages: Sequence[Stage],
    *,
    beside: int = 0,
    trains: bool = False,
    shard_bytes: int = 0,
    run_id: str | None = None,
    forks: ForkServer | None = None,
) -> Iterator[Session]:
    """Join the cluster of RAY_ADDRESS, use the Ray of this process, or start one for this run.

    While another ray_session is open, this is that session with its room; on a cluster, as it is
    now. So several runs share what was opened once, for the largest of them.

    Args:
        stages: whose actors need room.
        beside: CPUs for others than these actors: the workers of a training.
        trains: Ray Train's processes take part.
        shard_bytes: memory that an actor of the first stage takes for its largest shard.
        run_id: the run that opens it; it stands in the metadata of the job.
        forks: starts the workers of a Ray that this starts, and ends with it.

    Raises:
        UsageError: no cluster is at RAY_ADDRESS; or there is no memory for the actors asked for; or
            another run of this process has a Ray that ends with it.
    """
    with _OPENING:
        if not _open:
            _open.append(
                _opened(
                    stages,
                    beside=beside,
                    trains=trains,
                    shard_bytes=shard_bytes,
                    run_id=run_id,
                    forks=forks,
                )
            )
        elif _open[0].ours and _open[0].thread != threading.get_ident():
            raise UsageError(
                "Another run of this process is in progress, with a Ray that ends with it. Wait "
                "for it (`run.wait()`), start this one in a process of its own, or call ray.init() "
                "before both."
            )
        opened = _open[0]
        opened.users += 1
    try:
        session = opened.session
        yield as_it_is(session, stages, beside=beside) if session.joined else session
    finally:
        with _OPENING:
            opened.users -= 1
            if not opened.users:
                _open.clear()
                _end(ours=opened.ours, interrupts=opened.interrupts, start=opened.start)


def ends_soon() -> None:
    """Tell the session that it ends as soon as its actors have ended, if this is its last user.

    For each task of an actor that is ended, Ray would print on stdout that it is repeated, which
    never happens. Nothing of Ray is printed any more.
    """
    if internals.missing("printing"):
        return
    from ray._private.worker import global_worker

    for opened in _open:
        if opened.ours and opened.users == 1:
            global_worker.threads_stopped.set()
            global_worker.gcs_error_subscriber.close()


def output_is_there() -> None:
    """Tell the session that its first output is there: the rest of its Ray may start."""
    for opened in _open:
        if opened.start is not None:
            opened.start.output()


METADATA = "raypipe_run"
"""The key of the run's id in the metadata of its job, which Ray's dashboard and its API show."""

FREE_EVERY_MS = 100
"""How often the Ray that raypipe starts frees unused blocks; Ray's default is 1000.

Two cores make about 5 blocks a second. Storing a block takes 25 to 60 ms in memory that is new to
its actor, and otherwise 13 ms. In two runs 19 blocks were in new memory with the default, and 10
with this value."""


def ray_here(*, num_cpus: int, **options: Any) -> Any:
    """Start a Ray for this process alone. Arguments and result are those of ray.init."""
    # 0 would free at once, but then Ray no longer checks whether its store must spill.
    own = (
        {}
        if "RAY_free_objects_period_milliseconds" in os.environ
        else {"free_objects_period_milliseconds": FREE_EVERY_MS}
    )
    return ray.init(address="local", num_cpus=num_cpus, _system_config=own, **options)


def _opened(
    stages: Sequence[Stage],
    *,
    beside: int,
    trains: bool,
    shard_bytes: int,
    run_id: str | None,
    forks: ForkServer | None,
) -> _Open:
    joined = joins()
    ours = not ray.is_initialized()
    room = 0 if joined else room_here(stages, shard_bytes=shard_bytes)
    start = _quick(forks) if ours and not joined else None
    interrupts = Interrupts(tell=ends_soon)
    dashboard = None
    try:
        if ours:
            # Where a user, or a notebook, has a handler of their own, that one decides.
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                interrupts.take(signal.SIGINT)
            dashboard = _connected(
                joined=joined,
                stages=stages,
                beside=beside,
                trains=trains,
                start=start,
                run_id=run_id,
            )
            # `ray job stop` and batch schedulers send it. Ray's handler, which is there now, would
            # print a stack and exit.
            interrupts.take(signal.SIGTERM)
        session = _session(stages, joined=joined, room=room, dashboard=dashboard)
    except BaseException:
        _end(ours=ours, interrupts=interrupts, start=start)
        raise
    return _Open(
        session=session,
        ours=ours,
        start=start,
        thread=threading.get_ident(),
        interrupts=interrupts,
    )


def _is_quick() -> bool:
    """Whether this Ray and this system can start without what the first output does not need."""
    if internals.missing("starting"):
        return False
    from raypipe.run.cluster import starting  # another Ray may lack what it imports

    return starting.works_here()


def _quick(forks: ForkServer | None) -> "Start | None":
    """Such a start; None: this Ray or system cannot."""
    if not _is_quick():
        return None
    from raypipe.run.cluster.starting import Start

    return Start(forks)


def _helpers(*, trains: bool) -> "Helpers | None":
    """Ray Data and Ray Train without their helper actors; None: this Ray cannot."""
    if internals.missing("helpers"):
        return None
    from raypipe.run.cluster.helpers import Helpers

    return Helpers(trains=trains and not internals.missing("training"))


def _in_advance(stages: Sequence[Stage]) -> int:
    """How many workers Ray starts in advance: an actor each, and the run's collector."""
    cores = cores_here()
    counts = [
        stage.actors if isinstance(stage.actors, int) else max(1, int(stage.share * cores))
        for stage in stages
    ]
    return min(sum(counts), 2 * cores) + 1


def _modules(stages: Sequence[Stage]) -> list[str]:
    """What the actors of `stages` import."""
    return [
        "raypipe.stages.actor",
        *(type(step).__module__ for stage in stages for step in stage.steps),
        *(f"raypipe.images.{name}" for stage in stages for name in stage.libraries),
    ]


def _connected(
    *,
    joined: bool,
    stages: Sequence[Stage],
    beside: int,
    trains: bool,
    start: "Start | None",
    run_id: str | None,
) -> str | None:
    """Join the cluster of RAY_ADDRESS or start Ray. Returns the address of its dashboard."""
    num_cpus = cores_here() + beside
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if run_id is not None:
        quiet["job_config"] = JobConfig(metadata={METADATA: run_id})
    try:
        with without_rays_lines():
            if joined:
                context = _join(quiet)
            elif start is None:
                context = ray_here(num_cpus=num_cpus, **quiet)
            else:
                with start.quick(workers=_in_advance(stages), agents=trains):
                    context = ray_here(num_cpus=num_cpus, **quiet)
                start.wait_for_output(_helpers(trains=trains))
    except Exception as error:
        # Ray raises a bare Exception for a raylet that does not start, or a RuntimeError for a GCS.
        if type(error) not in (Exception, RuntimeError):
            raise
        cause = raised_in_logs()
        raise TimeoutError(
            f"Ray did not start: {cause}. Install or mend what it names, then start again."
            if cause
            else f"Ray did not start: {' '.join(str(error).split())} Try again when other programs "
            f"use less of the machine."
        ) from None
    return context.dashboard_url or None


def _join(options: dict[str, Any]) -> Any:
    """Join the cluster of RAY_ADDRESS. raypipe travels to its nodes if one of them lacks it.

    Raises:
        UsageError: it cannot be joined, or nodes lack more than raypipe itself.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    joining.check_address(address, job=True)
    try:
        context = ray.init(**options)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise joining.refusal(address, error, job=True) from error
    lacks = joining.lacking()
    if lacks and not joining.submitted():
        ray.shutdown()
        context = ray.init(**joining.with_package(options))
        lacks = joining.lacking()
    if lacks:
        raise joining.absence(lacks, nodes=len(ray.nodes()))
    return context


def _session(stages: Sequence[Stage], *, joined: bool, room: int, dashboard: str | None) -> Session:
    """Describe the Ray that is there now, but for what the nodes of a cluster have (`as_it_is`).

    `room`: for actors, in a Ray that raypipe started.
    """
    cores = cores_here()
    return Session(
        at_most=room,
        # Actors that mostly wait may outnumber the cores, and more may be asked for later. Each
        # gets a fraction of a CPU: for more logical CPUs, Ray would start an idle process each.
        cpus_each=1.0 if joined else int(10_000 * cores / room) / 10_000,
        cores=cores,
        nodes=1,
        joined=joined,
        dashboard=dashboard,
        address=ray.get_runtime_context().gcs_address,
        gpus=int(ray.cluster_resources().get("GPU", 0)),
        memory=math.inf if joined else bounded(stages),
    )


def _end(*, ours: bool, interrupts: Interrupts, start: "Start | None") -> None:
    if start is not None:
        start.end()
    if ours:
        with without_rays_lines(), ENDING:
            ray.shutdown()
    if start is not None:
        start.close()
    interrupts.end()


@contextmanager
def without_rays_lines() -> Iterator[None]:
    """Keep Ray's own lines off the terminal. They stay in its log files, and errors are raised.

    The lines are one for its log level at the start, and for every actor pool a warning that its
    arguments are in the object store (where Ray Data puts them).
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
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
