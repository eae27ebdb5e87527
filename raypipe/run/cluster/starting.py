"""Starts a Ray on this machine with what the first output needs, and the rest after that output.

Ray's own start waits 2 s for its dashboard and 2 s for its agents, and starts what one machine does
not need. Here:

- the cluster's autoscaler and the log monitor do not start;
- as many workers start in advance as there will be actors;
- workers are forked from a process that has imported what actors need (`forkserver.py`);
- the agents (metrics, runtime environments) wait for a line in a pipe. Their ports are chosen
  beforehand, so that Ray does not wait for them;
- the dashboard, with the job server, starts with them.

Import this module only if `internals.missing("starting")` is empty.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ray._private import ray_constants, services, utils
from ray._private.node import Node
from ray.exceptions import RayError

from raypipe.run.cluster import internals
from raypipe.run.cluster.forkserver import ForkServer

if TYPE_CHECKING:
    from raypipe.run.cluster.helpers import Helpers

PAUSE_S = 10.0
"""The rest starts so long after the first output. A run that ends before does not pay for it."""

AT_LATEST_S = 20.0
"""The rest starts so long after Ray in any case."""

_WAIT = 'read _ <"$0" && exec "$@"'
"""A shell waits for a line in a pipe, then becomes the agent. It ends when the driver ends."""

_ALL = "0.0.0.0"

_WORKER = "/workers/default_worker.py"
"""Ray's file of a worker."""

# Ray's own functions. `Start.quick` replaces them for a while.
_start_api_server = Node.start_api_server
_start_raylet = Node.start_raylet
_start_ray_process = services.start_ray_process
_get_node = services.get_node
_dependency_error = utils.get_dashboard_dependency_error


class Start:
    """One start of Ray: first `quick`, later the rest."""

    def __init__(self, forks: ForkServer | None = None) -> None:
        """forks: starts Ray's workers, and ends with Ray; None: they start by themselves."""
        self._output = threading.Event()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._kept: list[socket.socket] = []
        self._processes: list[Any] = []
        self._node: Any = None
        self._pipe: int | None = None
        self._helpers: Helpers | None = None
        self.forks = forks

    @contextlib.contextmanager
    def quick(self, *, workers: int, agents: bool) -> Iterator[None]:
        """Have ray.init, in the block, start what the first output needs.

        Args:
            workers: to start in advance.
            agents: whether they start with Ray: Ray Train needs them at once.
        """

        def process(command: list[str], process_type: str, **given: Any) -> Any:
            if process_type == ray_constants.PROCESS_TYPE_RAYLET:
                command = self._raylet(command, workers)
            self._processes.append(_start_ray_process(command, process_type, **given))
            return self._processes[-1]

        replaced: list[tuple[Any, str, Callable[..., Any]]] = [
            (Node, "start_api_server", self._expect_dashboard),
            (Node, "start_log_monitor", _nothing),
            (Node, "start_monitor", _nothing),
            (services, "start_ray_process", process),
            (services, "get_node", self._get_node),
        ]
        if not agents:
            replaced += [
                (Node, "start_raylet", self._expect_agents),
                (utils, "get_dashboard_dependency_error", _nothing),  # it imports for 0.3 s
            ]
        with contextlib.ExitStack() as stack:
            for owner, name, new in replaced:
                stack.enter_context(internals.replaced(owner, name, new))
            try:
                yield
            except BaseException:
                # Ray knows its processes only when all have started.
                for one in self._processes:
                    one.process.kill()
                    one.process.wait()
                raise

    def wait_for_output(self, helpers: "Helpers | None") -> None:
        """Ray is there. Start a thread that starts the rest."""
        self._helpers = helpers
        threading.Thread(target=self._rest, daemon=True, name="raypipe-rest").start()

    def output(self) -> None:
        """The first output is there."""
        self._output.set()

    def end(self) -> None:
        """Ray ends: nothing starts from now on."""
        self._ended.set()
        self._output.set()
        with self._lock:  # wait for what is starting
            if self._helpers is not None:
                self._helpers.restore()

    def close(self) -> None:
        """Ray has ended. Agents that wait end too, and Ray ends with its agents."""
        if self.forks is not None:
            self.forks.close()
        if self._pipe is not None:
            os.close(self._pipe)
        for kept in self._kept:
            kept.close()

    # --- in place of Ray's functions ------------------------------------------------------------

    @property
    def _expect_dashboard(self) -> Callable[..., None]:
        def expect(node: Node, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
            host, first = node._ray_params.dashboard_host, ray_constants.DEFAULT_DASHBOARD_PORT
            self._node = node
            port = self._keep(host, range(first, first + 50))
            node._ray_params.dashboard_port = port
            node._webui_url = f"{host}:{port}"

        return expect

    @property
    def _expect_agents(self) -> Callable[..., None]:
        def expect(node: Node, *given: Any, **named: Any) -> None:
            params = node._ray_params
            params.metrics_agent_port = self._keep(_ALL, [0])
            params.metrics_export_port = self._keep(_ALL, [0])
            params.runtime_env_agent_port = self._keep(_ALL, [0])
            params.dashboard_agent_listen_port = self._keep(_ALL, [0])
            os.mkfifo(self._pipe_path)
            # For both directions: so opening waits for nobody, and a line waits for the agents.
            self._pipe = os.open(self._pipe_path, os.O_RDWR)
            _start_raylet(node, *given, **named)

        return expect

    def _keep(self, host: str, ports: Iterable[int]) -> int:
        self._kept.append(kept_port(host, ports))
        return int(self._kept[-1].getsockname()[1])

    @property
    def _pipe_path(self) -> str:
        return os.path.join(self._node.get_session_dir_path(), "raypipe-agents")

    def _raylet(self, command: list[str], workers: int) -> list[str]:
        changes: dict[str, Callable[[str], str]] = {
            "--num_prestart_python_workers=": lambda value: str(workers),
            "--python_worker_command=": self._forking,
        }
        if self._pipe is not None:
            waiting = subprocess.list2cmdline(["/bin/sh", "-c", _WAIT, self._pipe_path])
            for agent in ("dashboard_agent", "runtime_env_agent"):
                changes[f"--{agent}_command="] = lambda value: f"{waiting} {value}"
            # Ray's own function leaves this port out.
            port = self._node._ray_params.dashboard_agent_listen_port
            command = [*command, f"--dashboard_agent_listen_port={port}"]
        for start, change in changes.items():
            # Where a Ray has no such flag, what it would change starts in Ray's own way.
            command = [
                start + change(word.removeprefix(start)) if word.startswith(start) else word
                for word in command
            ]
        return command

    def _forking(self, command: str) -> str:
        files = [word for word in command.split() if word.endswith(_WORKER)]
        if self.forks is None or len(files) != 1:
            return command
        return command.replace(files[0], self.forks.instead_of(files[0]))

    def _get_node(self, *given: Any) -> Any:
        # Ray's function asks for 30 s, also if there can be no answer.
        for one in self._processes:
            if one.process.poll() is not None:
                raise Exception(f"Its process {os.path.basename(one.process.args[0])} ended.")
        with contextlib.suppress(RayError):
            if self._node.get_gcs_client().get_all_node_info(timeout=1):
                return _get_node(*given)
        time.sleep(0.02)
        raise RuntimeError("This node has not registered yet.")  # Ray calls again, for 30 s

    # --- the rest -------------------------------------------------------------------------------

    def _rest(self) -> None:
        if self._output.wait(AT_LATEST_S):
            self._ended.wait(PAUSE_S)
        # Ray ends when an agent cannot start. This imports what agents and dashboard import.
        if not self._ended.is_set() and _dependency_error() is None:
            for do in (self._start_agents, self._start_dashboard, self._start_stats):
                with self._lock:
                    if not self._ended.is_set():
                        do()
        # Linux kills a process when the thread that started it ends.
        self._ended.wait()

    def _start_agents(self) -> None:
        if self._pipe is not None:
            os.write(self._pipe, b"\n\n")  # a line for each

    def _start_dashboard(self) -> None:
        with internals.replaced(services, "start_ray_process", _launch):
            try:
                _start_api_server(self._node, include_dashboard=None, raise_on_failure=False)
            except _Launched as launched:
                # From now on Ray ends it.
                kind = ray_constants.PROCESS_TYPE_DASHBOARD
                self._node.all_processes[kind] = [launched.process]
        self._node.get_gcs_client().internal_kv_put(
            b"webui:url",
            self._node.webui_url.encode(),
            True,
            ray_constants.KV_NAMESPACE_DASHBOARD,
        )

    def _start_stats(self) -> None:
        if self._helpers is not None:
            self._helpers.start_stats()


class _Launched(BaseException):
    """Leaves Ray's function once the dashboard's process is there: it would wait for its answer.

    No Exception, which that function catches.
    """

    def __init__(self, process: Any):
        self.process = process


def _launch(command: list[str], process_type: str, **given: Any) -> Any:
    raise _Launched(_start_ray_process(command, process_type, **given))


def _nothing(*given: Any) -> None:
    pass


def works_here() -> bool:
    """Whether this system keeps ports as `kept_port` needs it."""
    if sys.platform != "linux":
        return False
    try:
        kept_port(_ALL, [0]).close()
    except OSError:
        return False
    return True


def kept_port(host: str, ports: Iterable[int]) -> socket.socket:
    """A socket that has the first free port of `ports` at `host`, where a server may yet listen.

    Linux gives the port only to who asks for it and to share it (SO_REUSEADDR), as servers do.

    Raises:
        OSError: no port is free, or this system does not share them so.
    """
    error = OSError("no port")
    for port in ports:
        kept = socket.socket()
        try:
            kept.bind((host, port))
            # Only now: another raypipe binds without it, and gets another port.
            kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with socket.socket() as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind(kept.getsockname())
                server.listen()
            return kept
        except OSError as failed:
            kept.close()
            error = failed
    raise error
