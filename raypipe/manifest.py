"""What runs raypipe on Kubernetes: a RayJob for the KubeRay operator, and the image for it.

The fields are those of KubeRay 1.6. `tests/test_manifest.py` holds the RayJob against a schema of
them.
"""

import re
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import Annotated, Any

import tyro
import yaml

from raypipe.errors import UsageError

PLACES = ("--input", "--annotations", "--output", "--storage", "--checkpoint", "--report")
"""Flags of jobs that name folders or files, which all pods must see."""


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """Print a RayJob: a cluster that starts with the job, grows with it, and ends after it.

    The job comes last, after `--`:

    raypipe manifest rayjob --image me/raypipe -- preprocess --input s3://b/photos --output s3://b/out
    """

    image: str
    """Container image of all pods (`raypipe manifest dockerfile`)."""
    name: str = "raypipe"
    """Name of the RayJob."""
    cpus: int = 8
    """CPUs of a worker, GPU workers included."""
    memory: int = 32
    """Memory of a worker, in GiB."""
    min_workers: int = 1
    """Workers from the start."""
    max_workers: int = 4
    """Workers at most: the autoscaler adds them for actors that wait."""
    max_gpus: int = 0
    """Workers with a GPU at most, one each, beside the others."""
    token_secret: str = "raypipe-token"
    """Secret with the cluster's token. Who has it may run code on the cluster."""
    service_account: str | None = None
    """Service account of all pods: their rights to buckets."""


@dataclass(frozen=True, kw_only=True)
class Dockerfile:
    """Print a Dockerfile for the checkout of raypipe: `docker build -t NAME -f - .`"""

    gpu: bool = False
    """With CUDA, for GPU workers."""


Kinds = (
    Annotated[RayJob, tyro.conf.subcommand("rayjob")]
    | Annotated[Dockerfile, tyro.conf.subcommand("dockerfile")]
)


@dataclass(frozen=True)
class Manifest:
    """Print what runs raypipe on Kubernetes: a RayJob, or the Dockerfile of its image."""

    kind: tyro.conf.OmitSubcommandPrefixes[Kinds]


def text(kind: RayJob | Dockerfile, job: Sequence[str], *, jobs: Collection[str]) -> str:
    """The manifest.

    Args:
        job: a job of raypipe and its arguments, for a RayJob.
        jobs: the jobs that there are.

    Raises:
        UsageError: no Kubernetes could take it.
    """
    if isinstance(kind, Dockerfile):
        return dockerfile(kind)
    _check(kind, job, jobs)
    head = (
        f"# kubectl create secret generic {kind.token_secret} "
        "--from-literal=auth_token=$(openssl rand -hex 32)\n"
        "# kubectl apply -f THIS-FILE; KubeRay 1.6 or newer. Look at it while it runs:\n"
        f"# kubectl port-forward service/$(kubectl get rayjob {kind.name} "
        "-o jsonpath={.status.rayClusterName})-head-svc 8265\n"
        "# RAY_AUTH_MODE=token RAY_AUTH_TOKEN=... raypipe watch --address http://127.0.0.1:8265\n"
    )
    for flag, place in _places(job):
        head += (
            f"# {flag} {place} is a folder of a pod: mount a volume there that all pods share.\n"
        )
    return head + yaml.safe_dump(ray_job(kind, job), sort_keys=False, width=100)


def _places(job: Sequence[str]) -> list[tuple[str, str]]:
    """The flags of the job that name a local place."""
    words = [part for word in job for part in word.split("=", 1)]
    return [
        (flag, value)
        for flag, value in pairwise(words)
        if flag in PLACES and "://" not in value and not re.fullmatch(r"demo(:\d+)?", value)
    ]


def ray_job(wanted: RayJob, job: Sequence[str]) -> dict[str, Any]:
    """The RayJob as a mapping."""
    limits = {"cpu": str(wanted.cpus), "memory": f"{wanted.memory}Gi"}
    cpu = _group(wanted, "cpu", limits, least=wanted.min_workers, most=wanted.max_workers)
    groups = [cpu]
    if wanted.max_gpus:
        with_gpu = limits | {"nvidia.com/gpu": "1"}
        groups.append(_group(wanted, "gpu", with_gpu, least=0, most=wanted.max_gpus))
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": wanted.name},
        "spec": {
            "entrypoint": shlex.join(["raypipe", *job]),
            # The same command goes on from what is done: a driver that is lost costs a start.
            "backoffLimit": 2,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": 300},
                "authOptions": {"mode": "token", "secretName": wanted.token_secret},
                "headGroupSpec": {
                    # It does no work: the driver, the dashboard and Ray's own services only.
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _pod(wanted, "ray-head", {"cpu": "4", "memory": "16Gi"}),
                },
                "workerGroupSpecs": groups,
            },
        },
    }


def _check(wanted: RayJob, job: Sequence[str], jobs: Collection[str]) -> None:
    if not job or job[0] not in jobs:
        given = f"{job[0]!r} is none" if job else "none is given"
        raise UsageError(
            f"A RayJob needs a job of raypipe, and {given}. Give it after --, such as: "
            "raypipe manifest rayjob --image NAME -- preprocess --input s3://bucket/photos"
        )
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", wanted.name):
        raise UsageError(
            f"--name is {wanted.name!r}; Kubernetes takes lower-case letters, digits and '-', at "
            "most 47 here."
        )
    for flag, count, least in (
        ("cpus", wanted.cpus, 1),
        ("memory", wanted.memory, 1),
        ("min-workers", wanted.min_workers, 0),
        ("max-workers", wanted.max_workers, max(wanted.min_workers, 1)),
        ("max-gpus", wanted.max_gpus, 0),
    ):
        if count < least:
            raise UsageError(f"--{flag} is {count}; it must be at least {least}.")


def _group(
    wanted: RayJob, name: str, limits: dict[str, str], *, least: int, most: int
) -> dict[str, Any]:
    return {
        "groupName": name,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": _pod(wanted, "ray-worker", limits),
    }


def _pod(wanted: RayJob, container: str, limits: dict[str, str]) -> dict[str, Any]:
    account = (
        {} if wanted.service_account is None else {"serviceAccountName": wanted.service_account}
    )
    # Requests as limits: a pod that may take more than it asked for is the first to be evicted.
    resources = {"limits": dict(limits), "requests": dict(limits)}
    containers = [{"name": container, "image": wanted.image, "resources": resources}]
    return {"spec": account | {"containers": containers}}


def dockerfile(wanted: Dockerfile) -> str:
    """A Dockerfile, for the Ray and the Python of this process."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    base = f"rayproject/ray:{version('ray')}-{python}{'-gpu' if wanted.gpu else ''}"
    torch = " ".join(
        f'"{name}=={version(name).partition("+")[0]}"' for name in ("torch", "torchvision")
    )
    return f"""\
# raypipe manifest dockerfile | docker build -t NAME -f - .    # in a checkout of raypipe
FROM {base}
# The largest layer first: it stays when raypipe changes.
RUN pip install --no-cache-dir {torch}
COPY --chown=ray pyproject.toml README.md LICENSE /tmp/raypipe/
COPY --chown=ray raypipe /tmp/raypipe/raypipe
RUN pip install --no-cache-dir /tmp/raypipe && rm -r /tmp/raypipe
"""
