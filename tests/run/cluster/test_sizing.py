from dataclasses import replace

import psutil
import pyarrow as pa
import pytest

from raypipe import UsageError
from raypipe.data.tables import WORK
from raypipe.images import catalog
from raypipe.insight.planner import StageCost
from raypipe.insight.room import Node
from raypipe.run.cluster import sizing
from raypipe.run.cluster.machine import Session
from raypipe.run.cluster.session import check_shared, ray_session
from raypipe.run.cluster.sizing import (
    bound,
    bounded,
    chosen,
    memory_here,
    room_here,
    room_there,
    seated,
    size_pools,
)
from raypipe.run.job import preprocess_stage
from raypipe.run.preprocess import Settings, writing
from raypipe.run.todo import Todo
from raypipe.stages.stage import Stage, forms

CLUSTER = Session(
    at_most=16, cpus_each=1.0, cores=16, nodes=4, joined=True, dashboard=None, address=""
)
LAPTOP = Session(
    at_most=50, cpus_each=0.04, cores=2, nodes=1, joined=False, dashboard=None, address=""
)


def costs(preprocess_ms: float, write_ms: float, *, waits: bool = False) -> list[StageCost]:
    """Of stages that compute, or that only wait."""
    return [
        StageCost(name=name, actors=1, busy_s=ms / 1000, cpu_s=0.0001 if waits else ms / 1000)
        for name, ms in (("preprocess", preprocess_ms), ("write", write_ms))
    ]


def settings(**given) -> Settings:
    return Settings.of(**({"input": "demo", "output": "out"} | given))


def stages(wanted: Settings) -> tuple[Stage, ...]:
    recipe = catalog.get(wanted.stored.recipe)
    first = preprocess_stage(
        pa.table({"shard": [0] * 100}),
        wanted.decoding.pixels(recipe, seed=0),
        wanted.running,
        wanted.running.reading("demo"),
        run_id="never-run",
    )
    nothing, ids = WORK.empty_table(), pa.chunked_array([], pa.string())
    then = writing(wanted, Todo(recipe=recipe, work=nothing, left=nothing, image_ids=ids))
    return (first,) if then is None else (first, then)


def sized(
    wanted: Settings, known: list[StageCost] | None, session: Session, *, images: int, **given
) -> tuple[int, ...]:
    first, *others = stages(wanted)
    others = [seated(replace(stage, **given), session) for stage in others]
    return tuple(size_pools((first, *others), known, session, images=images).values())


def room(wanted: Settings) -> int:
    return room_here(stages(wanted))


def test_more_than_a_cluster_has_is_refused_before_starting_with_the_numbers():
    with pytest.raises(
        UsageError, match=r"30 preprocess actors and 4 writers take 34 CPUs.* has 16"
    ):
        sized(settings(actors=30, writers=4), None, CLUSTER, images=1000)
    assert sized(settings(actors=12, writers=4), None, CLUSTER, images=1000) == (12, 4)


def test_a_machine_of_our_own_has_room_for_more_actors_than_cores_and_not_for_more_than_memory():
    assert room(settings(actors=6, writers=2)) >= 8
    with pytest.raises(
        UsageError, match=r"50000 preprocess actors and 2 writers need about 12502 GB"
    ):
        room(settings(actors=50000, writers=2))
    with pytest.raises(
        UsageError, match=r"50000 preprocess actors and auto writers need about 12502 GB"
    ):
        room(settings(actors=50000))


GB = 10**9


def test_a_machine_with_little_memory_gets_as_many_actors_as_may_take_their_bound(monkeypatch):
    def auto(gigabytes: float, waits: tuple[float, float] = (170, 210), **given) -> tuple[int, ...]:
        session = machine(monkeypatch, gigabytes, **given)
        known = costs(*waits, waits=True)
        return sized(settings(**given), known, session, images=10**9)

    # 1.5 GB for the rest; a writer takes 0.25 GB, a preprocess actor up to --actor-memory, 2 GB.
    assert auto(16) == (6, 8) and auto(4) == (1, 2) and auto(4, actor_memory=0.5) == (2, 2)
    assert auto(16, (2, 210)) == (1, 16)  # as many as are expected to fit
    assert auto(16, output=None) == (7,) and auto(1) == (1, 1)
    assert auto(16, actors=12)[0] == 12  # asked for


def machine(monkeypatch, gigabytes: float, **given) -> Session:
    """A machine of 2 cores, and what it has room for."""
    monkeypatch.setattr(sizing, "memory_here", lambda: int(gigabytes * GB))
    pipeline = stages(settings(**given))
    at_most = room_here(pipeline, shard_bytes=300_000_000)
    return replace(LAPTOP, at_most=at_most, memory=bounded(pipeline))


def form(known: list[StageCost] | None, session: Session = LAPTOP, **given) -> list[str]:
    pipeline = chosen(stages(settings(**given)), known, session, images=10**9)
    return [stage.name for stage in pipeline]


FUSED, SEPARATE = ["preprocess+write"], ["preprocess", "write"]


def test_actors_write_themselves_where_writing_is_work_and_where_memory_allows(monkeypatch):
    assert form(costs(2.0, 0.7)) == FUSED
    waiting = [*costs(2.0, 0)[:1], *costs(0, 40.0, waits=True)[1:]]
    assert form(waiting, machine(monkeypatch, 256)) == FUSED
    # 16 GB are enough for 7 actors that decode, or for 1 that does and 16 that only write.
    assert form(waiting, machine(monkeypatch, 16)) == SEPARATE
    # One actor that does both would leave a core idle.
    assert form(costs(2.0, 1.5), actors=1) == SEPARATE
    # 16 actors leave the cluster no CPU for a writer.
    assert form(costs(2.0, 0.7), CLUSTER, actors=16) == FUSED


def test_without_a_timing_actors_write_themselves_unless_writing_is_known_to_wait():
    assert form(None) == FUSED
    assert form(None, store_ms=5.0) == SEPARATE


def test_whoever_names_a_number_of_writers_gets_that_form():
    slow = costs(2.0, 40.0, waits=True)
    assert form(slow, replace(LAPTOP, memory=10 * GB), writers=0) == FUSED
    assert form(costs(2.0, 0.7), writers=1) == SEPARATE


def test_a_fused_actor_is_counted_with_what_the_file_of_a_shard_takes(monkeypatch):
    def taken(**given) -> int:
        wanted = settings(writers=0, **given)
        first, then = stages(wanted)
        (step,) = then.steps
        then = replace(then, steps=(replace(step, shard_pixels=64 * 10**6),))
        return sum(bound(stage) for stage in forms((first, then))[0])

    assert taken(format="jpeg") == 2 * GB  # --actor-memory, libraries included
    assert taken(format="parquet") == 2 * GB + 3 * 64 * 10**6


def node(cpus: int, memory: int) -> Node:
    return Node(id=f"{cpus}-{memory}", name="", cpus=cpus, memory=memory)


def test_nodes_of_a_cluster_get_as_many_actors_as_they_have_memory_for():
    auto = stages(settings())
    large, small = node(16, 100 * GB), node(16, 9 * GB)
    assert room_there(auto, [large, small]) == 16 + 4
    assert room_there(auto, [node(1, 100 * GB)]) == 1
    assert room_there(auto, [node(8, GB)]) == 2
    assert room_there(stages(settings(actors=6, writers=4)), [small]) == 10


@pytest.mark.parametrize(
    ("group", "files", "limit"),
    [
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "1000"}, 1000),
        ("0::/", {"memory.max": "2000"}, 2000),
        ("0::/docker/xyz", {"memory.max": "3000"}, 3000),
        (
            "5:cpu,cpuacct:/a\n4:memory:/a",
            {"cpu/a/memory.limit_in_bytes": "1", "memory/a/memory.limit_in_bytes": "4000"},
            4000,
        ),
        ("0::/a", {"a/memory.max": "max", "memory.max": str(2**62)}, None),
        ("", {}, None),
    ],
)
def test_memory_is_what_the_cgroup_leaves(tmp_path, group, files, limit):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group + "\n" * bool(group))
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert memory_here(tmp_path) == (limit or psutil.virtual_memory().total)


def test_a_folder_that_only_the_drivers_node_has_is_no_output_for_a_cluster(session, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    check_shared(str(tmp_path / "run.json"), option="--output 'out'")
    with pytest.raises(
        UsageError,
        match=r"--output 'out' is a folder of this node, and 1 of the cluster's 1 nodes do not see",
    ):
        check_shared(str(tmp_path / "elsewhere/run.json"), option="--output 'out'")


def test_auto_gives_each_stage_what_its_timing_asks_for():
    images = 10**9  # the start of an actor is nothing beside that
    assert sized(settings(), costs(2.0, 0.7), LAPTOP, images=images) == (
        2,
        1,
    )  # computing: as many as cores
    waiting = sized(settings(), costs(170, 210, waits=True), LAPTOP, images=images)
    assert sum(waiting) == 50 and waiting[0] / waiting[1] == pytest.approx(170 / 210, rel=0.05)
    assert sized(settings(), costs(2.0, 0.7), CLUSTER, images=images) == (12, 4)
    assert sized(settings(output=None), costs(2.0, 0.7)[:1], CLUSTER, images=images) == (16,)


def test_auto_starts_no_actors_that_would_come_too_late():
    few = sized(settings(), costs(170, 210, waits=True), LAPTOP, images=100)
    assert sum(few) < 20


def test_what_was_asked_for_is_not_changed_by_the_timing():
    asked = settings(actors=3)
    assert sized(asked, costs(170, 210, waits=True), replace(LAPTOP, at_most=10), images=10**9) == (
        3,
        4,
    )
    assert sized(asked.changed(writers=2), costs(170, 210, waits=True), LAPTOP, images=10**9) == (
        3,
        2,
    )


def test_without_a_timing_there_is_a_rule_of_thumb():
    assert sized(settings(), None, LAPTOP, images=100) == (2, 1)
    assert sized(settings(), None, CLUSTER, images=100) == (12, 4)
    assert sized(settings(output=None), None, CLUSTER, images=100) == (16,)


GPUS = replace(CLUSTER, gpus=4)


def test_a_stage_that_may_takes_a_gpu_for_each_actor_and_no_cpu():
    known = costs(2.0, 500.0)  # timed on a CPU, which says nothing of a GPU
    assert sized(settings(), known, GPUS, images=10**9, gpu=None) == (16, 4)
    assert sized(settings(writers=3), None, GPUS, images=100, gpu=True) == (16, 3)
    assert sized(settings(writers=3, actors=16), None, GPUS, images=100, gpu=None) == (16, 3)
    assert sized(settings(), known[:1], GPUS, images=10**9, gpu=True) == (16, 4)


def test_without_enough_gpus_it_runs_on_cpus_or_is_refused():
    assert sized(settings(writers=5), None, GPUS, images=100, gpu=None) == (11, 5)
    assert sized(settings(), None, CLUSTER, images=100, gpu=None) == (12, 4)
    with pytest.raises(
        UsageError, match=r"--gpu with 5 writers needs as many GPUs, but Ray sees 4"
    ):
        sized(settings(writers=5), None, GPUS, images=100, gpu=True)
    with pytest.raises(UsageError, match=r"Ray sees 0"):
        sized(settings(), None, CLUSTER, images=100, gpu=True)


def test_a_session_within_another_is_that_one_with_its_room(session):
    with ray_session(stages(settings(actors=2, writers=2))) as outer:
        with ray_session(stages(settings(actors=50000))) as inner:
            assert inner == outer
        with ray_session(stages(settings())) as again:  # the first to end has ended nothing
            assert again == outer
