"""What a run exports: scraped by a real Prometheus, asked with the expressions of the dashboard."""

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from raypipe.cli import main
from raypipe.insight.states import Sample
from raypipe.run.live.metrics import Places, Share
from tests.support.clusters import environment, free_ports, head, wait_for

ROOT = Path(__file__).parents[3]
RUN = "metrics-run_1.0"


def shipped() -> dict:
    """The dashboard as `raypipe dashboard` prints it."""
    done = subprocess.run(
        [sys.executable, "-m", "raypipe.cli", "dashboard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout)


def expressions(dashboard: dict) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


class Prometheus:
    """A real one, that scrapes a Ray session."""

    def __init__(self, port: int):
        self._root = f"http://127.0.0.1:{port}/api/v1/"

    def ask(self, path: str, **parameters: str):
        with urllib.request.urlopen(
            f"{self._root}{path}?{urllib.parse.urlencode(parameters)}", timeout=10
        ) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[tuple[dict, float]]:
        found = self.ask(
            "query", query=expression.replace("$run", RUN).replace("$__rate_interval", "60s")
        )["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]


def ready(port: int) -> bool:
    """It listens before it answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


@contextlib.contextmanager
def prometheus(session: Path, folder: Path):
    (port,) = free_ports(1)
    found = session / "prom_metrics_service_discovery.json"
    scrape = {
        "job_name": "ray",
        "file_sd_configs": [{"files": [str(found)], "refresh_interval": "2s"}],
    }
    (folder / "prometheus.yml").write_text(
        yaml.safe_dump({"global": {"scrape_interval": "5s"}, "scrape_configs": [scrape]})
    )
    command = [
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/tsdb",
    ]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: ready(port), process)
        yield Prometheus(port)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def sample(
    actor: str, node: str, at: float, images: int, *, stage: str = "preprocess", **figures
) -> Sample:
    zero = {field.name: 0 for field in dataclasses.fields(Sample)}
    return Sample(
        **zero
        | {
            "stage": stage,
            "actor": actor,
            "node": node,
            "at": at,
            "images": images,
            "rss_bytes": 100,
        }
        | figures
    )


def test_figures_are_summed_by_stage_and_node_whatever_the_nodes_clocks_say():
    places = Places()
    first = places.look(
        100.0,
        [
            sample("a", "n1", 5e9, 10),
            sample("b", "n1", 5e9, 5),
            sample("c", "n2", 7.0, 1, stage="write"),
        ],
    )
    assert first["preprocess", "n1"] == Share(
        actors=2, images=15, images_per_s=None, cpu_cores=None, rss_bytes=200
    )
    assert first["write", "n2"] == Share(
        actors=1, images=1, images_per_s=None, cpu_cores=None, rss_bytes=100
    )
    second = places.look(
        104.0, [sample("a", "n1", 5e9 + 4, 30, cpu_s=6.0), sample("b", "n1", 5e9 + 4, 5)]
    )
    assert second["preprocess", "n1"] == Share(
        actors=2, images=35, images_per_s=5.0, cpu_cores=1.5, rss_bytes=200
    )


def test_an_actor_that_is_gone_leaves_its_images_and_takes_its_memory():
    places = Places()
    for second in range(30):
        seen = places.look(
            float(second),
            [sample("a", "n1", second, 10 * second), sample("b", "n1", min(second, 10), 7)],
        )
    assert seen["preprocess", "n1"] == Share(
        actors=1, images=297, images_per_s=10.0, cpu_cores=0.0, rss_bytes=100
    )


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("prometheus") is None,
    reason="no prometheus binary here (Debian: apt-get install prometheus)",
)
def test_every_expression_of_the_shipped_dashboard_has_data_in_a_real_prometheus(tmp_path):
    wanted = expressions(shipped())
    # Ray's workers report every 10 s. Half of it keeps the test short and figures fresh.
    env = environment(
        RAY_metrics_report_interval_ms="5000", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 32
    )
    job = [
        sys.executable,
        "jobs/preprocess.py",
        "--input",
        "demo:3000",
        "--run-id",
        RUN,
        "--output",
        str(tmp_path / "out"),
    ]
    job += [
        "--shard-rows",
        "4",
        "--actors",
        "2",
        "--writers",
        "1",
        "--read-ms",
        "25",
        "--store-ms",
        "25",
    ]
    job += [
        "--max-pixels",
        "450000",
        "--max-reject-fraction",
        "1",
    ]  # some of the demo's images are larger
    with head(cpus=4, env=env) as ray_head, prometheus(ray_head.session, tmp_path) as server:
        env |= {"RAY_ADDRESS": ray_head.address}
        run = subprocess.Popen(
            job, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            missing = list(wanted)

            def all_answered() -> bool:
                missing[:] = [
                    expression
                    for expression in missing
                    if not told(server.query(expression), expression)
                ]
                return not missing

            try:
                wait_for(all_answered, run)
            except AssertionError as error:
                raise AssertionError(f"no data, or 0, for {missing}") from error
            assert server.ask(
                "label/run/values", **{"match[]": "ray_raypipe_stage_images_total"}
            ) == [RUN]
            actors = {
                labels["stage"]: value
                for labels, value in server.query(wanted_of(wanted, "stage_actors{"))
            }
            assert actors == {"preprocess": 2, "write": 1}
            (((_, rejected),), ((_, done),)) = (
                server.query(wanted_of(wanted, part)) for part in ("rejected", "images_done")
            )
            assert 0 < rejected <= done <= 3000
            for part, top in (
                ("busy_ratio", 1.0),
                ("starved_ratio", 1.0),
                ("blocked_ratio", 1.0),
                ("cpu_cores", 64),
                ("rss_bytes", 1e11),
            ):
                answer = server.query(wanted_of(wanted, part))
                assert {labels["stage"] for labels, _ in answer} == {"preprocess", "write"}
                assert all(0 <= value <= top for _, value in answer), (part, answer)
            for labels, value in server.query(f'ray_raypipe_stage_rss_bytes{{run="{RUN}"}}'):
                assert re.fullmatch(r"[0-9a-f]{56}", labels["node"]) and value > 50e6
            names = {
                labels["__name__"] for labels, _ in server.query('{__name__=~"ray_raypipe_.*"}')
            }
            assert all(
                any(re.search(rf"\b{name}\b", expression) for expression in wanted)
                for name in names
            ), names
        finally:
            run.kill()
            run.communicate()


def told(answer: list[tuple[dict, float]], expression: str) -> bool:
    """Whether there is data; and more than 0, where that must come."""
    return bool(answer) and (
        re.search("ratio|queued", expression) is not None or any(value > 0 for _, value in answer)
    )


def wanted_of(expressions: list[str], part: str) -> str:
    return next(expression for expression in expressions if part in expression)


def test_the_dashboard_is_whole():
    dashboard = shipped()
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {
        "datasource",
        "run",
    }
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    boxes = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [
        (x, y)
        for box in boxes
        for x in range(box["x"], box["x"] + box["w"])
        for y in range(box["y"], box["y"] + box["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}" and panel["title"] and panel["targets"]
        assert all(
            target["datasource"]["uid"] == "${datasource}" and '{run="$run"}' in target["expr"]
            for target in panel["targets"]
        )


def test_the_dashboard_is_written_to_a_file_but_never_over_one(tmp_path, capsys):
    file = tmp_path / "raypipe.json"
    assert main(["dashboard", str(file)]) == 0
    assert "Import" in capsys.readouterr().err
    assert json.loads(file.read_text()) == shipped()
    file.write_text("mine")
    for taken in (file, tmp_path / "no" / "folder.json"):
        assert main(["dashboard", str(taken)]) == 2
        assert "cannot be written" in capsys.readouterr().err
    assert file.read_text() == "mine"
