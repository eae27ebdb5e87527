"""Ray's internal names that raypipe uses, by what they are for. Where a Ray lacks one, that is off.

Written for Ray 2.60. Importing this module imports nothing of Ray.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from typing import Any

_EXECUTION = "ray.data._internal.execution"

PINNED: dict[str, dict[str, tuple[str, ...]]] = {
    "scaling": {
        f"{_EXECUTION}.execution_callback:ExecutionCallback": (
            "before_execution_starts",
            "on_execution_step",
            "after_execution_succeeds",
            "after_execution_fails",
        ),
        f"{_EXECUTION}.operators.actor_pool_map_operator:_ActorPool": (
            "min_size",
            "num_running_actors",
            "num_active_actors",
            "num_pending_actors",
            "num_restarting_actors",
            "current_size",
            "scale",
            "refresh_actor_state",
            "_update_rank",
            "_release_running_actor",
            "_try_remove_pending_actor",
        ),
        f"{_EXECUTION}.operators.actor_pool_map_operator:ActorPoolMapOperator": (
            "get_autoscaling_actor_pools",
            "has_completed",
        ),
        f"{_EXECUTION}.streaming_executor_state:OpState": ("total_enqueued_input_blocks",),
        "ray.data._internal.actor_autoscaler.autoscaling_actor_pool:ActorPoolScalingRequest": (
            "upscale",
        ),
        "ray.data._internal.actor_autoscaler.autoscaling_actor_pool:AutoscalingActorConfig": (
            "min_size",
            "max_size",
            "initial_size",
        ),
        f"{_EXECUTION}.interfaces.op_runtime_metrics:OpRuntimeMetrics": (
            "num_tasks_finished",
            "num_outputs_taken",
        ),
        "ray.data._internal.utils.cached_ray_internals:": (
            "get_draining_nodes",
            "get_local_ongoing_lineage_reconstruction_tasks",
        ),
        "ray.actor:ActorHandle": ("_actor_id",),
        "ray.data:DataContext": ("set_config", "get_config", "custom_execution_callback_classes"),
    },
    "draining": {"ray._private.state:GlobalState": ("get_draining_nodes",)},
    "placing": {
        "ray._private.state:": ("available_resources_per_node",),
        "ray.data:Dataset": ("map_batches_internal",),
    },
    "autoscaling": {
        "ray._private.state:GlobalState": ("get_cluster_config",),
        "ray.autoscaler.v2.sdk:": ("get_cluster_status",),
        "ray.autoscaler.v2.schema:NodeInfo": ("ray_node_type_name",),
        "ray.data._internal.cluster_autoscaler:DefaultAutoscalingCoordinator": (
            "request_resources",
            "cancel_request",
            "get_reserved_resources",
        ),
        "ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator:": (
            "STANDARD_RESOURCE_TYPES",
        ),
        "ray.data._internal.cluster_autoscaler:ClusterAutoscaler": (
            "try_trigger_scaling",
            "on_executor_shutdown",
            "get_total_resources",
        ),
        f"{_EXECUTION}.interfaces:ExecutionResources": ("from_resource_dict", "zero", "add"),
    },
    "starting": {
        "ray._private.node:Node": (
            "start_api_server",
            "start_log_monitor",
            "start_monitor",
            "start_raylet",
            "get_gcs_client",
        ),
        "ray._private.services:": ("start_ray_process", "start_api_server", "get_node"),
        "ray._private.utils:": ("get_dashboard_dependency_error",),
        "ray._private.ray_constants:": (
            "DEFAULT_DASHBOARD_PORT",
            "KV_NAMESPACE_DASHBOARD",
            "PROCESS_TYPE_DASHBOARD",
            "PROCESS_TYPE_RAYLET",
        ),
        "ray._raylet:InnerGcsClient": ("get_all_node_info",),
    },
    "forking": {"ray.actor:": ("ActorClassID",)},
    "joining": {
        "ray._private.services:": ("find_node_ids",),
        "ray._raylet:GcsClient": (),
    },
    "printing": {
        "ray._private.worker:": ("global_worker",),
        "ray._raylet:GcsErrorSubscriber": ("close",),
    },
    "token": {
        "ray._private.authentication.authentication_token_setup:": (
            "maybe_enable_token_auth_if_token_available",
        ),
    },
    "helpers": {
        f"{_EXECUTION}.streaming_executor:": ("create_cluster_autoscaler",),
        f"{_EXECUTION}.operators.actor_pool_map_operator:": (
            "get_or_create_actor_location_tracker",
            "get_actor_locations",
        ),
        f"{_EXECUTION}.interfaces:ExecutionResources": ("from_resource_dict",),
        "ray.data._internal.cluster_autoscaler:ClusterAutoscaler": (
            "try_trigger_scaling",
            "on_executor_shutdown",
            "get_total_resources",
        ),
        "ray.data._internal.stats:": ("get_or_create_stats_actor",),
        "ray.data._internal.stats:_StatsManager": ("gen_dataset_id_from_stats_actor",),
    },
    "training": {
        "ray.train.v2.api.data_parallel_trainer:": ("PlacementGroupCleanerCallback",),
        "ray.train.v2._internal.execution.callback:": ("ControllerCallback",),
    },
}
"""For each purpose: classes, as module:name, or modules, as module:, and their members in use.

- scaling: changing actor pools during a run (`scaling.py`, `pools.py`);
- draining: knowing which nodes are about to go (`capacity.py`);
- placing: which node an actor starts on (`placement.py`);
- autoscaling: the autoscaler's bounds, and asking it (`capacity.py`, `asking.py`);
- starting: starting Ray's processes in the order in which they are needed (`starting.py`);
- forking: importing Ray before workers are forked (`forkserver.py`);
- joining: telling at once that this machine is no node of a cluster (`joining.py`);
- printing: keeping what Ray prints in this process off stdout (`session.py`);
- token: sending the user's token to the Ray of another process (`joining.py`);
- helpers: doing without Ray Data's helper actors on one machine (`helpers.py`);
- training: doing without the one of Ray Train (`helpers.py`).

Attributes of instances are in INSTANCES."""

INSTANCES: dict[str, tuple[str, ...]] = {
    f"{_EXECUTION}.streaming_executor:StreamingExecutor": (
        "_topology",
        "_data_context",
        "_cluster_autoscaler",
    ),
    f"{_EXECUTION}.operators.actor_pool_map_operator:_ActorPool": ("_running_actors",),
    f"{_EXECUTION}.operators.actor_pool_map_operator:_ActorState": (
        "num_tasks_in_flight",
        "actor_location",
        "is_restarting",
    ),
    "ray.data._internal.actor_autoscaler.autoscaling_actor_pool:AutoscalingActorPool": ("_config",),
    f"{_EXECUTION}.interfaces.physical_operator:PhysicalOperator": ("_inputs_complete",),
    "ray._private.worker:Worker": ("threads_stopped",),
    "ray._private.worker:connect": ("gcs_error_subscriber",),
    "ray._private.node:Node": ("_ray_params", "_webui_url", "all_processes"),
    "ray._private.parameter:RayParams": (
        "dashboard_host",
        "dashboard_port",
        "metrics_agent_port",
        "metrics_export_port",
        "runtime_env_agent_port",
        "dashboard_agent_listen_port",
    ),
}
"""Attributes that instances of these classes have, or that a function gives to Ray's `worker`. Only
the source tells; a test reads it."""


@cache
def missing(purpose: str) -> tuple[str, ...]:
    """The names for `purpose` that this Ray lacks; empty: it works."""
    return tuple(
        name for path, names in PINNED[purpose].items() for name in _missing_of(path, names)
    )


def _missing_of(path: str, names: tuple[str, ...]) -> list[str]:
    module, _, name = path.partition(":")
    try:
        owner = import_module(module)
        owner = getattr(owner, name) if name else owner
    except (ImportError, AttributeError):
        return [path]
    known = {field.name for field in fields(owner)} if is_dataclass(owner) else set()
    return [f"{name or module}.{one}" for one in names if one not in known | set(dir(owner))]


@contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Have `new` in place of one of Ray's names, in the block."""
    old = vars(owner)[name]
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)
