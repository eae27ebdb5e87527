"""Commands that read what a run left. For running runs: test_watch.py, run/test_watching.py."""

import json
import subprocess
import sys

import pytest

from raypipe.cli import JOBS, main
from raypipe.data.location import Location
from raypipe.insight import report as reports
from tests.conftest import ROOT
from tests.support.clusters import environment

COUNTS = reports.Counts(images_in=7, images_out=7, rejects_by_reason={})


def report(**given) -> dict:
    """The parts of a report.json that a plan needs.

    2 preprocess actors compute, and a writer waits for a slow store.
    """

    def stage(name: str, actors: int, busy_ms: float, cpu_ms: float) -> dict:
        counts = dict.fromkeys(("start", "min", "max", "end"), actors)
        costs = {
            "busy_s_per_image": busy_ms / 1000,
            "cpu_s_per_image": cpu_ms / 1000,
            "core_wait_s_per_image": 0.0,
        }
        return {"name": name, "actors": counts, "on_gpu": False, **costs}

    stages = [stage("preprocess", 2, 4.0, 4.0), stage("write", 1, 20.0, 1.0)]
    return {
        "stages": stages,
        "hardware": {"cores": 4},
        "steady_images_per_s": 48.0,
        "overhead_cpu_s_per_image": 0.0005,
    } | given


def planned(capsys, tmp_path, found: dict, *flags: str) -> tuple[int, str]:
    (tmp_path / "report.json").write_text(json.dumps(found))
    status = main(["plan", str(tmp_path), *flags])
    out, err = capsys.readouterr()
    return status, out + err


def cells(text: str, start: str) -> list[str]:
    return next(line for line in text.splitlines() if line.strip().startswith(start)).split()


def test_a_plan_names_the_bottleneck_the_best_allocation_and_what_more_would_bring(
    capsys, tmp_path
):
    status, text = planned(capsys, tmp_path, report(), "--cpus", "32")
    assert status == 0
    assert cells(text, "measured")[-4:] == ["48", "write", "2", "1"]
    assert cells(text, "as it ran")[-4:] == ["50", "write", "2", "1"]
    best = cells(text, "best on 32 CPUs")
    images_per_s, preprocess, write = float(best[-4]), int(best[-2]), int(best[-1])
    assert preprocess + write == 32 and images_per_s == pytest.approx(
        min(preprocess / 0.004, write / 0.020), abs=1
    )
    # No other way to share 32 out is better.
    assert images_per_s >= max(min(p / 0.004, (32 - p) / 0.020) for p in range(1, 32)) - 1
    assert "one more write actor" in text and "one more core" in text


def test_gpus_matter_only_to_a_stage_that_has_one(capsys, tmp_path):
    _, text = planned(capsys, tmp_path, report(), "--cpus", "8", "--gpus", "8")
    assert "GPU" not in text
    train = report()["stages"][1] | {"name": "train", "on_gpu": True}
    _, text = planned(
        capsys,
        tmp_path,
        report(stages=[report()["stages"][0], train]),
        "--cpus",
        "8",
        "--gpus",
        "3",
    )
    assert cells(text, "best on 8 CPUs, 3 GPUs")[-1] == "3"
    assert "one more GPU" in text


@pytest.mark.parametrize(
    ("found", "flags", "words"),
    [
        (report(), ("--cpus", "0"), "--cpus is 0"),
        (report(), ("--gpus", "-1"), "--gpus is -1"),
        (report(stages=[]), (), "does not say what stages cost"),
        ({"not": "a report"}, (), "does not say what stages cost"),
    ],
)
def test_what_cannot_be_planned_is_said_and_exits_with_2(capsys, tmp_path, found, flags, words):
    status, text = planned(capsys, tmp_path, found, *flags)
    assert status == 2 and words in " ".join(text.split())


def test_a_folder_without_a_report_is_named(capsys, tmp_path):
    assert main(["plan", str(tmp_path / "nowhere")]) == 2
    assert "There is no report in" in " ".join(capsys.readouterr().err.split())


HELPS = """
import contextlib, raypipe
from raypipe.cli import JOBS, main
from raypipe.data.location import Location
from raypipe.insight import report as reports
print(raypipe.__file__)
for job in JOBS:
    with contextlib.suppress(SystemExit):
        main([job, "--help"])
"""


@pytest.mark.slow
def test_jobs_start_where_only_the_package_is_installed(tmp_path):
    """From a built wheel, beside the libraries that are here."""
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, ROOT], check=True, cwd=tmp_path)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    where = environment(PYTHONPATH=str(site))

    def raypipe(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, site / "bin/raypipe", *words]
        return subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, text=True)

    helped = subprocess.run(
        [sys.executable, "-c", HELPS], cwd=tmp_path, env=where, capture_output=True, text=True
    )
    assert helped.stdout.startswith(str(site)), helped
    for job in JOBS:
        assert f"usage: raypipe {job}" in helped.stdout, helped
    done = raypipe("preprocess", "--input", "demo:8", "--output", "out", "--actors", "1")
    assert done.returncode == 0 and "8 images in = 8 out + 0 rejected" in done.stdout, done
    assert raypipe("report", "out").stdout in done.stdout
    refused = raypipe("predict", "--checkpoint", "none", "--input", "demo:8", "--output", "out2")
    assert refused.returncode == 2 and "error: " in refused.stderr, refused


def test_a_report_that_cannot_be_read_is_an_error_in_a_line(capsys, tmp_path):
    (tmp_path / "_raypipe/report.json").mkdir(parents=True)
    assert main(["report", str(tmp_path)]) in (1, 2)
    _, err = capsys.readouterr()
    assert err.startswith("error: ") and "Traceback" not in err and "report.json" in err


def test_a_report_in_a_store_is_printed_and_one_that_cannot_be_had_is_a_line(bucket, capsys):
    found = json.dumps(reports.unmeasured(run_id="r", settings={}, versions={}, counts=COUNTS))
    Location.of(bucket("out")).write("_raypipe/report.json", found.encode())
    assert main(["report", bucket("out")]) == 0
    assert "7 images in = 7 out" in capsys.readouterr().out
    away = "s3://anonymous@b/out?endpoint_override=http://127.0.0.1:1&region=us-east-1"
    for place, said in (
        (bucket("nothing"), "There is no report in"),
        (bucket("out").replace("://b", "://no-such-b"), "There is no report in"),
        (away, "cannot be read: "),
    ):
        assert main(["report", place]) == 2
        err = " ".join(capsys.readouterr().err.split())
        assert err.startswith("error: ") and said in err and "Traceback" not in err


def test_control_characters_in_a_report_never_reach_the_terminal(capsys, tmp_path):
    evil = "\x1b[31mred\x07"
    found = report(verdict={"stage": evil, "reason": evil, "advice": []}, **{evil: evil})
    found["stages"][0]["name"] = evil
    (tmp_path / "report.json").write_text(json.dumps(found))
    for command in ("report", "plan"):
        main([command, str(tmp_path)])
        out, err = capsys.readouterr()
        assert not {"\x1b", "\x07"} & set(out + err), command
