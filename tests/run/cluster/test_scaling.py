"""Actor counts that change during a run: no row is lost or done twice."""

import ast
import inspect
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

from raypipe import UsageError
from raypipe.data import journal
from raypipe.data.location import Location
from raypipe.images import catalog
from raypipe.images.ops.geometry import Resize
from raypipe.images.recipe import Recipe
from raypipe.run.background import Run
from raypipe.run.cluster import internals, scaling
from raypipe.run.live.control import Control
from raypipe.run.preprocess import Settings, run, start, verdict_on
from raypipe.run.result import Outcome
from tests.conftest import ROOT, files
from tests.support.clusters import environment
from tests.support.killing import WaitUntil
from tests.support.runs import plain_loop, quiet, running, settings, until


def begin(output: Path, **given) -> Run:
    """Start a run in the background. Its stages wait 0.1 s a shard: actors decide its rate."""
    wanted = {"actors": 2, "writers": 2, "shard_rows": 4, "read_ms": 25.0, "store_ms": 25.0} | given
    return start(Settings.of(input="demo:3000", output=str(output), **wanted), console=quiet())


def check_all_done_once(outcome: Outcome, output: Path, images: int) -> None:
    assert outcome.report is not None
    assert verdict_on(outcome, Settings.of(input="demo", output=str(output))) is None
    assert outcome.report["images_out"] == images
    place = Location.of(str(output))
    entries = journal.read_entries(place, sorted(journal.done_shards(place)))
    done = Counter(row.image_id for entry in entries for row in entry.written)
    assert len(done) == images and set(done.values()) == {1}
    # What an actor did twice would count twice here, though the journal has it once.
    assert {stage["images"] for stage in outcome.report["stages"]} == {images}


def test_rays_internals_are_as_they_are_needed():
    for purpose in internals.PINNED:
        assert internals.missing(purpose) == ()
    for path, names in internals.INSTANCES.items():
        module, _, name = path.partition(":")
        source = inspect.getsource(getattr(import_module(module), name))
        for attribute in names:
            set_there = rf"\b(?:self|worker)\.{attribute}\b[^=\n]*=|^    {attribute}\s*:"
            assert re.search(set_there, source, re.MULTILINE), f"{path} sets no {attribute}"


def test_every_internal_module_that_the_room_imports_is_pinned():
    pinned = {path.partition(":")[0] for paths in internals.PINNED.values() for path in paths}
    pinned |= {path.partition(":")[0] for path in internals.INSTANCES}
    found = set()
    for file in (ROOT / "raypipe/run/cluster").glob("*.py"):
        for statement in ast.walk(ast.parse(file.read_text())):
            if isinstance(statement, ast.ImportFrom) and statement.module:
                found |= {(statement.module, alias.name) for alias in statement.names}
            if isinstance(statement, ast.Import):
                found |= {(alias.name, "") for alias in statement.names}
    inner = {one for one in found if one[0].startswith("ray.") and "._" in one[0]}
    assert len(inner) > 10
    for module, name in inner:
        assert {module, f"{module}.{name}"} & pinned, f"{name} of {module} is not pinned"


@pytest.mark.slow
def test_both_stages_scale_up_and_down_under_full_load_and_every_change_is_in_the_report(
    session, tmp_path, monkeypatch
):
    # 1 s a shard until the test is done with it: minutes of work, however slowly actors start.
    ops = (WaitUntil(there=str(tmp_path / "done")), Resize(height=30, width=30))
    monkeypatch.setitem(catalog.RECIPES, "waits", Recipe(name="waits", ops=ops))
    given = {"recipe": "waits", "limit": 240, "shard_rows": 1, "read_ms": 0.0, "store_ms": 0.0}
    run = begin(tmp_path / "out", **given)
    assert run.scale(preprocess=2)["preprocess"] == 2  # waits for the first actors
    until(run, lambda record: record["done"] > 0)
    steps = [
        {"preprocess": 3, "write": 3},
        {"preprocess": 1, "write": 1},
        {"preprocess": 2},
        {"write": 2},
    ]
    for step in steps:
        before = until(run, lambda record: True)
        wanted = run.scale(**step)
        assert {name: wanted[name] for name in step} == step
        record = until(
            run,
            lambda record, wanted=wanted: all(
                running(record)[name] == (n, 0, 0) for name, n in wanted.items()
            ),
        )
        # Full load: there was work for every actor all the while.
        assert (
            record["done"] < record["images"]
            and before["stages"][0]["queued"] + record["stages"][0]["queued"] > 0
        )
    (tmp_path / "done").touch()
    outcome = run.wait()
    check_all_done_once(outcome, tmp_path / "out", 240)
    events = [
        (event["stage"], event["from"], event["to"], event["by"])
        for event in outcome.report["scale_events"]
    ]
    assert events == [
        ("preprocess", 2, 3, "user"),
        ("write", 2, 3, "user"),
        ("preprocess", 3, 1, "user"),
        ("write", 3, 1, "user"),
        ("preprocess", 1, 2, "user"),
        ("write", 1, 2, "user"),
    ]
    preprocess, write = (stage["actors"] for stage in outcome.report["stages"])
    assert (preprocess["start"], preprocess["min"], preprocess["max"]) == (2, 1, 3)
    # Only a pool with blocks in its queue counts for `min`, and these writers never have one.
    assert (write["start"], write["max"]) == (2, 3)
    page = (tmp_path / "out/_raypipe/report.html").read_text()
    assert (
        "preprocess" in page
        and json.loads((tmp_path / "out/_raypipe/report.json").read_text())["scale_events"]
    )


@pytest.mark.slow
def test_what_cannot_be_is_refused_with_the_reason_and_the_run_goes_on(session, tmp_path):
    run = begin(tmp_path / "out", limit=100, actors=1, writers=0)
    until(run, lambda record: record["done"] > 0)
    for counts, reason in (
        ({"preprocess": 500}, r"500 preprocess\+write are 500 actors, but there is room for"),
        ({"preprocess": 0}, "at least 1"),
        ({"train": 2}, r"no stage 'train'; its stages are preprocess\+write"),
        ({"write": 2}, "in this run preprocess actors write too, and it is fixed for a run"),
    ):
        with pytest.raises(UsageError, match=reason):
            run.scale(**counts)
    assert run.live()["scale_events"] == []
    outcome = run.wait()
    check_all_done_once(outcome, tmp_path / "out", 100)
    with pytest.raises(UsageError, match="has ended"):
        run.scale(preprocess=3)


@pytest.mark.slow
def test_auto_sizes_pools_from_a_timing_before_the_start_and_leaves_alone_what_is_set_by_hand(
    session, tmp_path
):
    run = begin(
        tmp_path / "out", actors="auto", writers="auto", read_ms=100.0, store_ms=0.0, limit=400
    )
    record = until(run, lambda record: record["stages"] and record["done"] > 0)
    counts = {stage["name"]: stage["wanted"] for stage in record["stages"]}
    # 400 images wait 0.1 s each, and there is room for 8 actors. The rule of thumb would give 2.
    # Writing is work of the CPU: the actors do that too.
    (name,) = counts
    assert name == "preprocess+write" and counts[name] >= 5
    assert record["auto"]
    run.scale(preprocess=3)
    assert not until(run, lambda record: running(record)[name] == (3, 0, 0))["auto"]
    outcome = run.wait()
    check_all_done_once(outcome, tmp_path / "out", 400)
    assert outcome.report["predicted"]["actors"] == counts
    assert [event["by"] for event in outcome.report["scale_events"]] == ["user"]
    assert not list((tmp_path / "out/_raypipe").glob("tmp/*"))  # what the timing wrote is gone


def test_what_went_before_the_first_step_was_no_time_of_the_actors(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: now[0])
    looks = []

    class Looking(scaling._Steering):
        def _look(self, executor, elapsed):
            looks.append(elapsed)

    steering = Looking()
    for now[0] in (
        130.0,
        130.2,
    ):  # an execution that waited for all its actors makes its first step 30 s later
        steering.on_execution_step(None)
    assert looks == [pytest.approx(0.2)]


@pytest.mark.slow
def test_a_run_that_has_ended_says_so_and_no_other_ray_is_started_to_ask_it():
    code = """if True:
        import time
        import ray
        from rich.console import Console
        from raypipe import UsageError
        import raypipe

        run = raypipe.start(input="demo:24", actors=1, read_ms=200.0, console=Console(quiet=True))
        run.live()
        other = raypipe.start(input="demo:60", actors=1, console=Console(quiet=True))
        try:
            other.wait()
        except UsageError as error:
            print(error)
        while True:
            try:
                run.live()
            except UsageError as error:
                said = str(error)
                if run.done:
                    break
            time.sleep(0.05)
        print(said, ray.is_initialized())
    """
    asked = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert asked.returncode == 0, asked.stderr
    assert "Another run of this process is in progress" in asked.stdout
    assert "has ended" in asked.stdout and asked.stdout.split()[-1] == "False"


def test_on_a_ray_with_other_internals_the_run_works_and_scaling_is_refused(
    session, photos, tmp_path, monkeypatch
):
    kind = "ray.data._internal.execution.operators.actor_pool_map_operator:_ActorPool"
    other = {kind: ("current_size", "renamed_in_a_later_ray"), "ray.gone:X": ()}
    monkeypatch.setitem(internals.PINNED, "scaling", other)
    internals.missing.cache_clear()
    try:
        wanted = settings(input=photos, output=tmp_path / "out", read_ms=20.0)
        console = quiet()
        refused = []

        def scale(control: Control) -> None:
            with pytest.raises(
                UsageError, match=r"live scaling is off: this Ray .* lacks"
            ) as error:
                control.scale({"preprocess": 3})
            refused.append(str(error.value))

        outcome = run(wanted, console=console, began=scale)
    finally:
        internals.missing.cache_clear()
    said = console.file.getvalue()
    assert refused and "_ActorPool.renamed_in_a_later_ray, ray.gone:X" in said
    assert verdict_on(outcome, wanted) is None and outcome.report["images_out"] == 60
    assert [stage["images"] for stage in outcome.report["stages"]] == [60]
    plain_loop(wanted, tmp_path / "plain")
    assert files(tmp_path / "out") == files(tmp_path / "plain")


class Foreign:
    """An actor pool as another backend of Ray may have it: it does what it is asked, and no more
    is known of it."""

    def __init__(self, pool):
        self._pool = pool

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._pool, name)


def test_with_pools_of_another_kind_the_run_works_and_scaling_is_refused(
    session, photos, tmp_path, monkeypatch
):
    before = ActorPoolMapOperator.get_autoscaling_actor_pools
    monkeypatch.setattr(
        ActorPoolMapOperator,
        "get_autoscaling_actor_pools",
        lambda operator: [Foreign(pool) for pool in before(operator)],
    )
    wanted = settings(input=photos, output=tmp_path / "out", read_ms=20.0)
    console, refused, threads = quiet(), [], []

    def scale(control: Control) -> None:
        with pytest.raises(UsageError, match="live scaling is off") as error:
            while True:  # it is found out when the first actors are there
                control.scale({"preprocess": 3}, wait=True)
        refused.append(str(error.value))

    def began(control: Control) -> None:
        threads.append(threading.Thread(target=scale, args=(control,)))
        threads[0].start()

    outcome = run(wanted, console=console, began=began)
    for one in threads:
        one.join()
    assert "the actor pools of this Ray" in refused[0] and "of the kind Foreign" in refused[0]
    assert "goes on" in refused[0]
    assert verdict_on(outcome, wanted) is None and outcome.report["images_out"] == 60
    plain_loop(wanted, tmp_path / "plain")
    assert files(tmp_path / "out") == files(tmp_path / "plain")
