"""What `raypipe manifest` prints is what KubeRay and Docker take."""

import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import yaml

from raypipe.cli import main
from tests.conftest import ROOT

SCHEMA = json.loads((Path(__file__).parent / "support" / "rayjob.schema.json").read_text())
JOB = ("preprocess", "--input", "s3://b/my photos", "--output", "s3://b/out", "--actors", "8")


def printed(capsys, *arguments: str) -> str:
    assert main(["manifest", *arguments]) == 0
    return capsys.readouterr().out


def test_a_rayjob_has_the_fields_of_kuberays_schema(capsys):
    text = printed(
        capsys,
        "rayjob",
        *("--image", "me/raypipe:1", "--name", "photos", "--cpus", "6", "--memory", "24"),
        *("--min-workers", "2", "--max-workers", "5", "--max-gpus", "3"),
        *("--token-secret", "mine", "--service-account", "reader", "--", *JOB),
    )
    made = yaml.safe_load(text)
    jsonschema.validate(made, SCHEMA)
    spec = made["spec"]
    assert shlex.split(spec["entrypoint"]) == ["raypipe", *JOB]
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token", "secretName": "mine"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    cpu, gpu = cluster["workerGroupSpecs"]
    assert [(g["minReplicas"], g["maxReplicas"]) for g in (cpu, gpu)] == [(2, 5), (0, 3)]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], cpu, gpu)]
    assert {pod["serviceAccountName"] for pod in pods} == {"reader"}
    assert {pod["containers"][0]["image"] for pod in pods} == {"me/raypipe:1"}
    assert pods[1]["containers"][0]["resources"]["limits"] == {"cpu": "6", "memory": "24Gi"}
    assert pods[2]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "is a folder of a pod" not in text


def test_the_schema_is_one_that_refuses():
    for change in ({"kind": "RayJobs"}, {"spec": {}}, {"spec": {"entrypoint": "x", "other": 1}}):
        good = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "x"}}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(good | change, SCHEMA)


def test_local_folders_of_a_job_are_pointed_out(capsys):
    job = ("train", "--input=demo:60", "--storage", "out", "--annotations=boxes.json")
    text = printed(capsys, "rayjob", "--image", "x", "--", *job)
    assert re.findall(r"# (--\S+ \S+) is a folder of a pod", text) == [
        "--storage out",
        "--annotations boxes.json",
    ]
    jsonschema.validate(yaml.safe_load(text), SCHEMA)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "needs a job of raypipe, and none is given"),
        (("--", "watch"), "'watch' is none"),
        (("--max-workers", "0", "--", "train"), "--max-workers is 0; it must be at least 1"),
        (("--min-workers", "3", "--max-workers", "2", "--", "train"), "at least 3"),
        (("--name", "My_Job", "--", "train"), "lower-case letters"),
    ],
)
def test_what_kubernetes_cannot_take_is_refused(capsys, arguments, said):
    assert main(["manifest", "rayjob", "--image", "x", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("gpu", [False, True])
def test_the_dockerfile_is_for_this_ray_and_copies_what_an_install_needs(capsys, gpu):
    text = printed(capsys, "dockerfile", *["--gpu"] * gpu)
    assert re.search(rf"^FROM rayproject/ray:{version('ray')}-py3\d+{'-gpu' * gpu}$", text, re.M)
    copied = re.findall(r"^COPY --chown=ray (.*) \S+$", text, re.M)
    assert all((ROOT / name).exists() for line in copied for name in line.split())
    assert {"pyproject.toml", "raypipe", "README.md", "LICENSE"} == {
        name for line in copied for name in line.split()
    }
