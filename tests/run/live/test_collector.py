"""The collector without Ray: the clock and the pipeline that it watches are played here."""

import math
from dataclasses import replace

import pytest

from raypipe.insight.report import Clock, Counts, build
from raypipe.insight.states import STATES, Consumed, Moment, PoolView, Sample, ScaleEvent
from raypipe.run.live.collector import Collector, Facts


class Pipeline:
    """Stages with given costs, in steps of half a second, that follow the collector as Ray does.

    Actors take a second to start, one after the other, and finish what they have before they go.
    """

    def __init__(
        self,
        *,
        busy_s: dict[str, float],
        counts: dict[str, int],
        facts: Facts,
        start_s: float = 1.0,
        consume_s: float = 0.0,
        tells: bool = True,
    ):
        self.now = 1000.0
        self.busy_s = busy_s
        self.start_s = start_s
        self.collector = Collector("test", facts, clock=lambda: self.now)
        self.collector.begin(self.now)
        self.actors = {stage: float(count) for stage, count in counts.items()}
        self.wanted = dict(counts)
        self.images = dict.fromkeys(busy_s, 0.0)
        self.busy = dict.fromkeys(busy_s, 0.0)
        self.pools = {
            stage: PoolView(start=count, min=count, max=count) for stage, count in counts.items()
        }
        self.rates: list[float] = []
        self.consume_s, self.tells = consume_s, tells
        self._tell()

    def run(self, seconds: float, *, step: float = 0.5) -> None:
        for _ in range(round(seconds / step)):
            for stage, wanted in self.wanted.items():
                if self.actors[stage] < wanted:
                    self.actors[stage] = min(self.actors[stage] + step / self.start_s, wanted)
                else:
                    self.actors[stage] = wanted
            rate = min(math.floor(self.actors[stage]) / busy for stage, busy in self.busy_s.items())
            rate = min(rate, 1 / self.consume_s) if self.consume_s else rate
            self.rates.append(rate)
            for stage, busy in self.busy_s.items():
                self.images[stage] += rate * step
                self.busy[stage] += rate * step * busy
                view = self.pools[stage]
                running = math.floor(self.actors[stage])
                pending = max(self.wanted[stage] - running, 0)
                actor_s = view.actor_s + running * step
                self.pools[stage] = replace(
                    view, running=running, pending=pending, end=running, queued=9, actor_s=actor_s
                )
            self.now += step
            self._tell()

    def _tell(self) -> None:
        for stage in self.busy_s:
            images = math.floor(self.images[stage] + 1e-6)
            totals = {
                "calls": images,
                "images": images,
                "bytes_in": 0,
                "bytes_out": 0,
                "busy_s": self.busy[stage],
                "under_way_s": 0.0,
            }
            rest = {
                "core_wait_s": 0.0,
                "cpu_s": images * 1e-4,
                "rss_bytes": 10,
                "rss_peak_bytes": 10,
            }
            node = {"node": "here", "node_cpu_busy_s": self.now, "node_cpu_total_s": self.now}
            self.collector.record(
                Sample(stage=stage, actor=stage, at=self.now, **totals, **rest, **node)
            )
        done = math.floor(min(self.images[stage] for stage in self.busy_s))
        busy_s, total_s = done * self.consume_s, self.now - 1000.0
        consumed = Consumed(images=done, busy_s=busy_s, waiting_s=max(total_s - busy_s, 0.0))
        self.collector.progress(
            self.now, done, 0, consumed if self.consume_s and self.tells else None
        )
        self.wanted = dict(self.collector.observe(self.pools).counts)

    @property
    def events(self) -> tuple[ScaleEvent, ...]:
        return self.collector.live().scale_events


FACTS = Facts(images=10**6, cores=2, at_most=20, auto=("preprocess", "write"))


def test_auto_goes_to_the_best_allocation_and_stays_there():
    played = Pipeline(
        busy_s={"preprocess": 0.17, "write": 0.21},
        counts={"preprocess": 2, "write": 2},
        facts=FACTS,
    )
    played.run(60)
    assert played.wanted == {"preprocess": 9, "write": 11}
    settled = len(played.events)
    played.run(120)
    assert len(played.events) == settled  # no oscillation
    assert all(event.by == "auto" for event in played.events)


def test_auto_follows_a_change_within_20_s_without_oscillating():
    played = Pipeline(
        busy_s={"preprocess": 0.05, "write": 0.15},
        counts={"preprocess": 5, "write": 15},
        facts=FACTS,
    )
    played.run(30)
    assert not played.events  # it began at its best
    played.busy_s = {"preprocess": 0.30, "write": 0.10}
    played.run(20)
    played.run(20)
    optimum = min(15 / 0.30, 5 / 0.10)
    assert min(played.rates[-40:]) >= 0.9 * optimum
    played.run(60)
    assert len(played.events) <= 4


def test_noise_of_a_few_percent_changes_nothing():
    played = Pipeline(
        busy_s={"preprocess": 0.17, "write": 0.21},
        counts={"preprocess": 9, "write": 11},
        facts=FACTS,
    )
    for round_ in range(20):
        played.busy_s = {
            "preprocess": 0.17 * (1 + 0.04 * math.sin(round_)),
            "write": 0.21 * (1 - 0.04 * math.sin(round_)),
        }
        played.run(5)
    assert not played.events


def test_a_count_set_by_hand_is_left_alone_and_the_other_stage_follows_it():
    played = Pipeline(
        busy_s={"preprocess": 0.1, "write": 0.2}, counts={"preprocess": 2, "write": 4}, facts=FACTS
    )
    played.run(10)
    assert played.collector.scale({"preprocess": 3}) == played.wanted | {"preprocess": 3}
    played.run(60)
    assert played.wanted["preprocess"] == 3
    assert played.wanted["write"] >= 6  # what three preprocess actors can fill


def test_with_counts_given_nothing_is_changed():
    fixed = replace(FACTS, auto=())
    played = Pipeline(
        busy_s={"preprocess": 0.17, "write": 0.21},
        counts={"preprocess": 2, "write": 2},
        facts=fixed,
    )
    played.run(60)
    assert played.wanted == {"preprocess": 2, "write": 2} and not played.events


def test_shortly_before_the_end_no_actors_are_started():
    played = Pipeline(
        busy_s={"preprocess": 0.1, "write": 0.1},
        counts={"preprocess": 2, "write": 2},
        facts=replace(FACTS, images=200),
    )
    played.run(9)
    assert not played.events


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        (
            {"preprocess": 19, "write": 2},
            "19 preprocess + 2 write are 21 actors, but there is room for 20",
        ),
        ({"write": 0}, "needs at least 1 actor"),
        ({"read": 1}, "no stage 'read'; its stages are preprocess, write"),
    ],
)
def test_what_cannot_be_changes_nothing(counts, reason):
    played = Pipeline(
        busy_s={"preprocess": 0.1, "write": 0.1}, counts={"preprocess": 2, "write": 2}, facts=FACTS
    )
    assert reason in played.collector.scale(counts)
    played.run(1)
    assert played.wanted == {"preprocess": 2, "write": 2} and not played.events
    assert played.collector.live().auto


@pytest.mark.parametrize("named", ["preprocess", "preprocess+write"])
def test_a_stage_of_two_steps_is_scaled_by_the_name_of_its_first_too(named):
    played = Pipeline(busy_s={"preprocess+write": 0.1}, counts={"preprocess+write": 2}, facts=FACTS)
    assert played.collector.scale({named: 3}) == {"preprocess+write": 3}
    for counts, why in (
        ({"write": 2}, "it is fixed for a run: write has no actors of its own. Scale preprocess"),
        ({named: 4, "preprocess": 5, "preprocess+write": 5}, "given twice"),
        ({named: 0}, "needs at least 1 actor"),
    ):
        assert why in played.collector.scale(counts)
    played.run(5.0)
    assert played.wanted == {"preprocess+write": 3}
    assert [(event.stage, event.after) for event in played.events] == [("preprocess+write", 3)]


def test_actors_that_may_not_fit_into_memory_are_refused_and_not_chosen():
    holds = {"preprocess": 2 * 10**9, "write": 250 * 10**6}
    facts = replace(FACTS, holds=holds, memory=14.5e9)
    played = Pipeline(
        busy_s={"preprocess": 0.1, "write": 0.1}, counts={"preprocess": 2, "write": 2}, facts=facts
    )
    assert "8 preprocess + 2 write may take 16 GB of memory" in played.collector.scale(
        {"preprocess": 8}
    )
    assert played.collector.scale({"write": 12}) == {"preprocess": 2, "write": 12}
    auto = Pipeline(
        busy_s={"preprocess": 0.17, "write": 0.21},
        counts={"preprocess": 2, "write": 2},
        facts=facts,
    )
    auto.run(40.0)
    assert auto.wanted == {"preprocess": 6, "write": 8}  # without the bound 9 and 11


def test_actors_on_gpus_are_counted_by_gpus_not_by_cpus():
    facts = replace(FACTS, on_gpu=("write",), gpus=2, at_most=4)
    played = Pipeline(
        busy_s={"preprocess": 0.1, "write": 0.1}, counts={"preprocess": 4, "write": 1}, facts=facts
    )
    assert "3 write take a GPU each, but there are 2" in played.collector.scale({"write": 3})
    assert "5 preprocess are 5 actors" in played.collector.scale({"preprocess": 5})
    assert played.collector.scale({"write": 2}) == {"preprocess": 4, "write": 2}


def test_auto_gives_a_stage_on_gpus_no_more_than_there_are():
    facts = replace(FACTS, auto=("preprocess", "predict"), on_gpu=("predict",), gpus=3)
    played = Pipeline(
        busy_s={"preprocess": 0.1, "predict": 0.2},
        counts={"preprocess": 2, "predict": 1},
        facts=facts,
    )
    played.run(60)
    assert played.wanted["predict"] == 3 and played.wanted["preprocess"] == 2


def test_before_the_first_look_at_the_pools_nothing_can_be_scaled():
    assert "has not begun" in Collector("early", FACTS).scale({"preprocess": 2})


def test_the_live_record_says_how_it_goes_of_late():
    played = Pipeline(
        busy_s={"preprocess": 0.1, "write": 0.2},
        counts={"preprocess": 2, "write": 2},
        facts=replace(FACTS, auto=()),
    )
    played.run(20)
    record = played.collector.live()
    assert record.images_per_s == pytest.approx(10, rel=0.1)
    assert record.eta_s == pytest.approx((10**6 - record.done) / record.images_per_s)
    preprocess, write = record.stages
    assert (preprocess.busy, preprocess.starved) == (
        pytest.approx(0.5, abs=0.05),
        pytest.approx(0.0),
    )
    assert preprocess.blocked == pytest.approx(0.5, abs=0.05)
    assert write.busy == pytest.approx(1.0, abs=0.05)
    assert record.verdict.stage == "write"
    assert record.verdict.advice[0].change == "write actors 2 -> 3"


def test_a_node_whose_clock_is_behind_is_no_node_whose_actors_are_gone():
    played = Pipeline(
        busy_s={"preprocess": 0.1, "write": 0.2},
        counts={"preprocess": 2, "write": 2},
        facts=replace(FACTS, auto=()),
    )
    played.run(20)
    sample = next(sample for sample in played.collector._latest.values() if sample.stage == "write")
    played.collector.record(replace(sample, actor="elsewhere", at=played.now - 60, rss_bytes=90))
    (_, write) = played.collector.live().stages
    assert write.rss_bytes == 100
    assert played.collector.snapshot().rss_peak_by_stage["write"] == 100


def test_a_stage_that_is_done_limits_nothing_any_more():
    played = Pipeline(
        busy_s={"preprocess": 0.3, "write": 0.2},
        counts={"preprocess": 2, "write": 2},
        facts=replace(FACTS, auto=()),
    )
    played.run(20)
    played.pools["preprocess"] = replace(
        played.pools["preprocess"], running=0, pending=0, queued=0, done=True
    )
    played.busy_s = {"write": 0.2}
    played.run(20)
    verdict = played.collector.live().verdict
    assert verdict.stage == "write" and "preprocess" not in verdict.reason


def reported(played: Pipeline, names: list[str]) -> list[dict]:
    """The stages as the table of the report has them."""
    done = played.collector.live().done
    seconds = played.now - 1000.0
    return build(
        run_id="test",
        settings={},
        versions={},
        hardware={"cores": 2},
        counts=Counts(images_in=done, images_out=done, rejects_by_reason={}),
        clock=Clock(wall_s=seconds, setup_s=0.0, ready_s=0.0, outputs=[(seconds, done)]),
        cpu_percent=50.0,
        stage_names=names,
        snapshot=played.collector.snapshot(),
        consumer=played.collector._consumed and played.collector._consumed[1],
    )["stages"]


@pytest.mark.parametrize(
    ("busy_s", "consume_s"),
    [
        ({"preprocess": 0.1, "write": 0.2}, 0.0),
        ({"preprocess": 0.2, "write": 0.1}, 0.0),  # the last stage idles while blocks are queued
        ({"preprocess": 0.1}, 0.2),
        ({"preprocess": 0.1}, 0.02),
    ],
)
def test_table_timeline_and_live_view_divide_the_time_of_the_same_run_alike(busy_s, consume_s):
    counts = dict.fromkeys(busy_s, 2)
    facts = replace(FACTS, auto=())
    played = Pipeline(busy_s=busy_s, counts=counts, facts=facts, consume_s=consume_s)
    played.run(60)
    live = {stage.name: stage for stage in played.collector.live().stages}
    table = {stage["name"]: stage for stage in reported(played, list(busy_s))}
    timeline: dict[str, list[Moment]] = {}
    for moment in played.collector.snapshot().timeline:
        if moment.busy is not None and moment.t_s >= 10:
            timeline.setdefault(moment.stage, []).append(moment)
    assert list(live) == list(table) == [*busy_s, *(["consume"] if consume_s else [])]
    assert set(timeline) == set(table)
    for name, stage in table.items():
        for state in STATES:
            over_time = [getattr(moment, state) for moment in timeline[name]]
            assert sum(over_time) / len(over_time) == pytest.approx(stage[state], abs=0.05)
            assert getattr(live[name], state) == pytest.approx(stage[state], abs=0.05)
    last = list(table)[-1]
    assert live[last].blocked == table[last]["blocked"] == 0
    assert all(moment.blocked == 0 for moment in timeline[last])


def test_a_consumer_is_the_last_stage_and_cannot_be_scaled():
    facts = replace(FACTS, auto=("preprocess",))
    played = Pipeline(
        busy_s={"preprocess": 0.1}, counts={"preprocess": 4}, facts=facts, consume_s=0.5
    )
    played.run(30)
    live = played.collector.live()
    assert [stage.name for stage in live.stages] == ["preprocess", "consume"]
    assert live.verdict.stage == "consume"
    assert live.stages[1].images_per_s == pytest.approx(2, rel=0.2)
    assert "no stage 'consume'" in played.collector.scale({"consume": 2})
    assert not [event for event in played.events if event.stage == "consume"]


def test_a_rate_that_no_stage_explains_is_outside_in_the_live_view_too():
    facts = replace(FACTS, auto=())
    played = Pipeline(
        busy_s={"preprocess": 0.01},
        counts={"preprocess": 2},
        facts=facts,
        consume_s=0.1,
        tells=False,
    )
    played.run(8)
    assert "Too short a run" in played.collector.live().verdict.reason
    played.run(30)
    verdict = played.collector.live().verdict
    assert "Something outside the stages limits" in verdict.reason and verdict.stage is None


def test_the_live_view_shows_the_machine_and_what_no_stage_used():
    played = Pipeline(
        busy_s={"preprocess": 0.1}, counts={"preprocess": 2}, facts=replace(FACTS, auto=())
    )
    played.run(20)
    live = played.collector.live()
    assert live.cpu_percent == pytest.approx(100.0)  # as the node of the play says
    assert live.stages_cpu_percent == pytest.approx(live.stages[0].cpu_percent)
    assert live.other_cpu_percent == pytest.approx(100.0 - live.stages_cpu_percent)


def test_memory_is_private_by_stage_and_the_store_counts_once():
    played = Pipeline(
        busy_s={"preprocess": 0.1}, counts={"preprocess": 2}, facts=replace(FACTS, auto=())
    )
    played.run(2)
    first = played.collector._latest["preprocess"]
    for actor in ("preprocess", "another"):
        told = {"rss_bytes": 1000, "private_bytes": 300, "node_store_bytes": 700}
        played.collector.record(replace(first, actor=actor, at=played.now, **told))
    played.run(0.5)
    (stage,) = played.collector.live().stages
    assert played.collector.snapshot().rss_peak_by_stage == {"preprocess": 2000}
    assert played.collector.snapshot().private_peak_by_stage == {"preprocess": 600}
    assert played.collector.snapshot().store_peak_bytes == 700
    assert played.collector.live().object_store_bytes == 700
    assert stage.private_bytes is None  # one of its actors no longer tells
