"""Ray's internal names that raypipe uses. On a Ray that lacks one, live scaling is off.

Written for Ray 2.60. Importing this module imports nothing of Ray.
"""

from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module

_EXECUTION = "ray.data._internal.execution"

PINNED: dict[str, tuple[str, ...]] = {
    f"{_EXECUTION}.execution_callback:ExecutionCallback": (
        "on_execution_step",
        "after_execution_succeeds",
        "after_execution_fails",
    ),
    f"{_EXECUTION}.operators.actor_pool_map_operator:_ActorPool": (
        "min_size",
        "num_running_actors",
        "num_active_actors",
        "num_pending_actors",
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
    "ray.data:DataContext": ("set_config", "get_config", "custom_execution_callback_classes"),
}
"""Classes, as module:name, and their members in use. Attributes of instances are not listed."""


@cache
def missing() -> tuple[str, ...]:
    """The names that this Ray lacks; empty: live scaling works."""
    return tuple(name for path, names in PINNED.items() for name in _missing_of(path, names))


def _missing_of(path: str, names: tuple[str, ...]) -> list[str]:
    module, _, name = path.partition(":")
    try:
        owner = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return [path]
    known = {field.name for field in fields(owner)} if is_dataclass(owner) else set()
    return [f"{name}.{one}" for one in names if one not in known and not hasattr(owner, one)]
