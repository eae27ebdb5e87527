"""Verdicts over planted cases: records of runs whose limit is known, through the report."""

from dataclasses import dataclass, field, replace

import pytest

from raypipe.insight.report import Clock, Counts, build
from raypipe.insight.states import Consumed, NodeCpu, PoolView, Sample, Snapshot
from raypipe.insight.verdict import OUTSIDE, SHORT_S

CORES = 8
SECONDS = 100.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is planted of a stage: actors, and milliseconds of an image."""

    actors: int
    busy_ms: float
    cpu_ms: float


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A run at a steady rate. `consume_ms`: of an image in the caller's own function."""

    preprocess: Stage
    write: Stage | None = None
    cores: float = CORES
    rate: float = 0.0
    seconds: float = SECONDS
    consume_ms: float = 0.0
    stages: dict[str, Stage] = field(init=False)

    def __post_init__(self) -> None:
        stages = {"preprocess": self.preprocess} | ({"write": self.write} if self.write else {})
        object.__setattr__(self, "stages", stages)

    def images_per_s(self) -> float:
        """What actors, cores and the consumer allow, unless it is given."""
        if self.rate:
            return self.rate
        rates = [1000 * stage.actors / stage.busy_ms for stage in self.stages.values()]
        rates.append(1000 * self.cores / sum(stage.cpu_ms for stage in self.stages.values()))
        if self.consume_ms:
            rates.append(1000 / self.consume_ms)
        return min(rates)


def records(planted: Planted) -> tuple[Snapshot, Consumed | None]:
    """What the collector and the driver know at the end of such a run."""
    images = round(planted.images_per_s() * planted.seconds)
    cpu_s = images * sum(stage.cpu_ms for stage in planted.stages.values()) / 1000
    slowest = max(
        planted.stages, key=lambda n: planted.stages[n].busy_ms / planted.stages[n].actors
    )
    first, last, pools, behind = [], [], {}, False
    for name, stage in planted.stages.items():
        actor_s = stage.actors * planted.seconds
        busy_s = min(images * stage.busy_ms / 1000, actor_s)
        behind = behind or (name == slowest and not planted.consume_ms)
        starved_s = actor_s - busy_s if behind and name != slowest else 0.0
        pools[name] = PoolView(
            start=stage.actors,
            min=stage.actors,
            max=stage.actors,
            end=stage.actors,
            actor_s=actor_s,
            starved_s=starved_s,
        )
        for n in range(stage.actors):
            begin = Sample(
                stage=name,
                actor=f"{name}-{n}",
                node="here",
                at=0.0,
                calls=0,
                images=0,
                bytes_in=0,
                bytes_out=0,
                busy_s=0.0,
                under_way_s=0.0,
                core_wait_s=0.0,
                cpu_s=0.0,
                rss_bytes=1,
                rss_peak_bytes=1,
                node_cpu_busy_s=0.0,
                node_cpu_total_s=0.0,
            )
            first.append(begin)
            last.append(
                replace(
                    begin,
                    at=planted.seconds,
                    calls=10,
                    images=images // stage.actors,
                    busy_s=busy_s / stage.actors,
                    cpu_s=images * stage.cpu_ms / 1000 / stage.actors,
                    node_cpu_busy_s=cpu_s,
                    node_cpu_total_s=planted.cores * planted.seconds,
                )
            )
    node = NodeCpu(cpu_busy_s=cpu_s, cpu_total_s=planted.cores * planted.seconds)
    snapshot = Snapshot(actors=tuple(last), first=tuple(first), pools=pools, nodes={"here": node})
    if not planted.consume_ms:
        return snapshot, None
    busy_s = images * planted.consume_ms / 1000
    return snapshot, Consumed(images=images, busy_s=busy_s, waiting_s=planted.seconds - busy_s)


def report(planted: Planted, *, tell_consumer: bool = True, **more) -> dict:
    snapshot, consumer = records(planted)
    images = round(planted.images_per_s() * planted.seconds)
    return build(
        run_id="planted",
        settings={},
        versions={},
        hardware={"cores": planted.cores},
        counts=Counts(images_in=images, images_out=images, rejects_by_reason={}),
        clock=Clock(
            wall_s=planted.seconds,
            setup_s=0.0,
            ready_s=0.0,
            outputs=[(1.0, images // 100), (planted.seconds, images - images // 100)],
        ),
        cpu_percent=50.0,
        stage_names=list(planted.stages),
        snapshot=snapshot,
        consumer=consumer if tell_consumer else None,
        **more,
    )


QUICK = Stage(actors=4, busy_ms=4, cpu_ms=4)


@pytest.mark.parametrize(
    ("planted", "stage", "words"),
    [
        (
            Planted(preprocess=QUICK, write=Stage(actors=1, busy_ms=20, cpu_ms=2)),
            "write",
            "90% of that it waited for the store, not for a core",
        ),
        (
            Planted(
                preprocess=Stage(actors=4, busy_ms=40, cpu_ms=4),
                write=Stage(actors=2, busy_ms=2, cpu_ms=2),
            ),
            "preprocess",
            "90% of that it waited for the input, not for a core",
        ),
        (Planted(preprocess=QUICK, consume_ms=29), "consume", "consume limits: it was busy 100%"),
        (
            Planted(preprocess=QUICK, write=Stage(actors=1, busy_ms=50, cpu_ms=49)),
            "write",
            "write limits: its 1 actor was busy 100%",
        ),
        (
            Planted(
                preprocess=Stage(actors=1, busy_ms=10, cpu_ms=10),
                write=Stage(actors=2, busy_ms=2, cpu_ms=2),
            ),
            "preprocess",
            "preprocess limits: its 1 actor was busy 100%",
        ),
        (
            Planted(
                preprocess=Stage(actors=8, busy_ms=8, cpu_ms=8),
                write=Stage(actors=8, busy_ms=4, cpu_ms=4),
                cores=2,
            ),
            "preprocess",
            "The 2 cores limit",
        ),
    ],
    ids=["slow store", "slow read", "slow consumer", "slow model", "few actors", "few cores"],
)
def test_a_planted_cause_is_the_one_that_the_verdict_names(planted, stage, words):
    found = report(planted)["verdict"]
    assert found["stage"] == stage and words in found["reason"], found


def test_a_slow_consumer_blocks_the_stage_before_it_and_no_advice_gives_it_actors():
    found = report(Planted(preprocess=QUICK, consume_ms=29))
    preprocess, consume = found["stages"]
    assert preprocess["blocked"] > 0.9 and preprocess["starved"] < 0.01
    assert (consume["name"], consume["blocked"]) == ("consume", 0)
    assert consume["busy"] == pytest.approx(1, abs=0.001)
    assert "preprocess was blocked" in found["verdict"]["reason"]
    changes = [advice["change"] for advice in found["verdict"]["advice"]]
    assert changes and not [change for change in changes if change.startswith("consume")]


def test_a_consumer_that_keeps_up_limits_nothing():
    found = report(Planted(preprocess=QUICK, consume_ms=0.5))
    assert found["verdict"]["stage"] == "preprocess"
    assert found["stages"][1]["starved"] == pytest.approx(0.5)


@pytest.mark.parametrize("slower", [0.9 * OUTSIDE, 1.1 * OUTSIDE])
def test_a_rate_that_no_stage_explains_is_said_to_come_from_outside_with_what_was_measured(slower):
    planted = Planted(preprocess=QUICK)
    found = report(replace(planted, rate=planted.images_per_s() / slower))["verdict"]
    outside = "Something outside the stages limits" in found["reason"]
    assert outside == (slower > OUTSIDE)
    if outside:
        assert found["stage"] is None and found["advice"] == []
        for words in ("about 1000 images/s", "455 were measured", "preprocess 4.00 ms"):
            assert words in found["reason"]


def test_in_a_short_run_nothing_is_blamed_on_the_outside():
    found = report(Planted(preprocess=QUICK, rate=35, seconds=0.9 * SHORT_S))["verdict"]
    assert "Too short a run to tell" in found["reason"]


def test_a_stage_that_was_scaled_up_on_the_way_is_no_cause_outside():
    planted = Planted(preprocess=Stage(actors=8, busy_ms=8, cpu_ms=1), rate=400)
    snapshot, _ = records(planted)
    pool = replace(snapshot.pools["preprocess"], min=1, actor_s=3.3 * SECONDS)
    images = round(400 * SECONDS)
    found = build(
        run_id="scaled",
        settings={},
        versions={},
        hardware={"cores": CORES},
        counts=Counts(images_in=images, images_out=images, rejects_by_reason={}),
        clock=Clock(wall_s=SECONDS, setup_s=0.0, ready_s=0.0, outputs=[(SECONDS, images)]),
        cpu_percent=50.0,
        stage_names=["preprocess"],
        snapshot=replace(snapshot, pools={"preprocess": pool}),
    )
    assert found["verdict"]["stage"] == "preprocess"


def test_the_machine_is_divided_into_the_stages_and_what_no_stage_used():
    planted = Planted(preprocess=QUICK)
    found = report(planted)
    assert found["stages_cpu_percent"] == pytest.approx(50.0)
    assert found["other_cpu_percent"] == pytest.approx(0.0)
    assert report(replace(planted, rate=500))["other_cpu_percent"] == pytest.approx(25.0)


def test_the_fixed_cost_is_what_is_spent_before_the_first_image_and_after_the_last():
    planted = Planted(preprocess=Stage(actors=1, busy_ms=10, cpu_ms=10))
    snapshot, _ = records(planted)
    found = build(
        run_id="fixed",
        settings={},
        versions={},
        hardware={"cores": CORES},
        counts=Counts(images_in=100, images_out=100, rejects_by_reason={}),
        clock=Clock(wall_s=2.3, setup_s=0.0, ready_s=0.0, outputs=[(0.6, 10), (1.9, 90)]),
        cpu_percent=50.0,
        stage_names=["preprocess"],
        snapshot=snapshot,
    )
    # 0.6 s to the first output, of which its 10 images are 0.1 s of work; and 0.4 s after the last.
    assert found["fixed_s"] == pytest.approx(0.5 + 0.4)
