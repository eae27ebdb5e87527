"""Fused or separate writing: what a run of one form says of the other."""

import io

import pytest
from rich.console import Console

from raypipe.insight import forms
from raypipe.insight.html import page
from raypipe.insight.planner import StageCost
from raypipe.insight.report import Clock, Counts, build
from raypipe.insight.screen import Looking, line, view
from raypipe.insight.states import LiveStep, PoolView, Sample, Snapshot, StepTotals
from raypipe.insight.terminal import outlook, terminal
from tests.insight.test_screen import printed, record, stage

PIXELS = 4_320_000  # of a picture of 1200x1200
IMAGES = 1000


def seen(name: str, ms: dict[str, tuple[float, float]], *, rays_ms: float) -> Sample:
    """A stage's totals. `ms`: of each step, busy and CPU an image; `rays_ms`: CPU between calls."""
    steps = tuple(
        StepTotals(
            name=step,
            busy_s=busy * IMAGES / 1000,
            cpu_s=cpu * IMAGES / 1000,
            bytes_out=PIXELS * IMAGES if step == "preprocess" else IMAGES,
        )
        for step, (busy, cpu) in ms.items()
    )
    return Sample(
        stage=name,
        actor=name,
        node="here",
        at=100.0,
        calls=10,
        images=IMAGES,
        bytes_in=1,
        bytes_out=steps[-1].bytes_out,
        busy_s=sum(step.busy_s for step in steps) + rays_ms,
        under_way_s=0.0,
        core_wait_s=0.0,
        cpu_s=sum(step.cpu_s for step in steps) + rays_ms,
        rss_bytes=1,
        rss_peak_bytes=1,
        node_cpu_busy_s=0.0,
        node_cpu_total_s=0.0,
        steps=steps,
    )


def report(*samples: tuple[Sample, int], cores: float = 2) -> dict:
    """The report of a run of 1000 images whose stages had so many actors."""
    pools = {
        sample.stage: PoolView(
            start=n, min=n, max=n, end=n, actor_s=max(1.01 * sample.busy_s, 10.0)
        )
        for sample, n in samples
    }
    took_s = max(sample.busy_s / max(n, 1) for sample, n in samples)
    return build(
        run_id="forms",
        settings={},
        versions={},
        hardware={"cores": cores},
        counts=Counts(images_in=IMAGES, images_out=IMAGES, rejects_by_reason={}),
        clock=Clock(wall_s=took_s, setup_s=0.0, ready_s=0.0, outputs=[(took_s, IMAGES)]),
        cpu_percent=100.0,
        stage_names=[sample.stage for sample, _ in samples],
        snapshot=Snapshot(actors=tuple(sample for sample, _ in samples), pools=pools),
    )


def fused(write: tuple[float, float] = (6.0, 6.0), *, actors: int = 2, cores: float = 2) -> dict:
    steps = {"preprocess": (4.0, 4.0), "write": write}
    return report((seen("preprocess+write", steps, rays_ms=0.5), actors), cores=cores)


def test_busy_and_cpu_stand_for_each_step_and_their_shares_sum_to_the_stages():
    (one,) = fused()["stages"]
    first, second = one["steps"]
    assert (first["name"], second["name"]) == ("preprocess", "write")
    assert first["busy_s_per_image"] == pytest.approx(0.004)
    assert second["cpu_s_per_image"] == pytest.approx(0.006)
    assert one["cpu_s_per_image"] == pytest.approx(0.0105)  # what Ray does in the actor too
    assert first["busy"] + second["busy"] == pytest.approx(one["busy"])
    assert first["busy"] / second["busy"] == pytest.approx(4 / 6)


def test_separate_writers_take_the_copies_through_the_object_store_besides():
    form, stages = forms.other(fused())
    assert form == "separate" and [cost.name for cost in stages] == ["preprocess", "write"]
    put_s, get_s = (forms.PUT_S + forms.SLOWED_S) * PIXELS, forms.GET_S * PIXELS
    assert stages[0].cpu_s == pytest.approx(0.004 + 0.0005 + put_s)
    assert stages[1].cpu_s == pytest.approx(0.006 + 0.0005 + get_s)
    told = fused()["writing"]
    assert (told["form"], told["other"]["form"]) == ("fused", "separate")
    # On two cores, all of it is work of the CPU.
    assert told["other"]["ratio"] == pytest.approx(
        0.0105 / sum(cost.cpu_s for cost in stages), rel=0.05
    )


def test_what_a_run_of_one_form_says_of_the_other_comes_back():
    """Separate stages that cost what the model says predict the fused one that it was made of."""
    _, (preprocess, write) = forms.other(fused())
    rays_s = 0.0005
    slowed_s = 0.004 + forms.SLOWED_S * PIXELS
    split = report(
        *(
            (
                seen(
                    cost.name,
                    {cost.name: (1000 * own_s, 1000 * own_s)},
                    rays_ms=1000 * (cost.cpu_s - own_s),
                ),
                count,
            )
            for cost, own_s, count in ((preprocess, slowed_s, 2), (write, write.cpu_s - rays_s, 1))
        )
    )
    form, (one,) = forms.other(split)
    assert form == "fused" and one.name == "preprocess+write"
    assert one.cpu_s == pytest.approx(0.0105)
    assert split["writing"]["other"]["actors"] == {"preprocess+write": 2}


def test_fused_actors_that_wait_for_a_store_are_as_many_as_separate_ones():
    waiting = fused((46.0, 6.0), actors=12)["writing"]["other"]
    assert sum(waiting["actors"].values()) <= 12
    assert 0.6 < waiting["ratio"] < 1


def test_nothing_is_said_where_nothing_is_written_or_a_step_was_not_measured():
    alone = seen("preprocess", {"preprocess": (4.0, 4.0)}, rays_ms=0.5)
    assert report((alone, 1))["writing"] is None
    old = fused()
    del old["stages"][0]["steps"]
    assert forms.other(old) is None and forms.said(None) == "" and forms.said({}) == ""


def text_of(renderable, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_the_terminal_the_page_and_the_plan_say_both_forms_and_show_both_steps():
    found = fused()
    said = forms.said(found["writing"])
    assert said.startswith("Fused writing ran; separate writers would give about ")
    text = text_of(terminal(found))
    assert " ".join(said.split()) in " ".join(text.split())
    assert "of it preprocess" in text and "of it write" in text
    assert max(len(line) for line in text.splitlines()) <= 80
    (cpu,) = (line.split() for line in text.splitlines() if "CPU ms" in line)
    assert cpu[-3:] == ["10.50", "4.00", "6.00"]
    (actors,) = (line.split() for line in text.splitlines() if line.strip().startswith("actors"))
    assert actors == ["actors", "2"]  # steps have none of their own
    shown = page(found)
    assert said.split(";")[0] in shown and "of it write" in shown
    assert "separate writers instead: about" in text_of(outlook(found, cpus=8))


@pytest.mark.parametrize("width", [80, 120])
def test_watching_shows_the_steps_of_a_stage_and_no_line_is_too_wide(width):
    steps = (
        LiveStep(name="preprocess", cpu_percent=41.0, busy=0.45),
        LiveStep(name="write", cpu_percent=29.0, busy=0.3),
    )
    watched = record(stages=(stage("preprocess+write", steps=steps),))
    lines = printed(view(watched, Looking(selected=0), width=width), width)
    assert max(map(len, lines)) <= width
    (whole,) = (row for row in lines if "preprocess+write" in row)
    (write,) = (row for row in lines if row.strip().startswith("write"))
    assert "75%" in whole and "29%" in write
    assert "busy 75%" in line(watched) and "(busy with preprocess 45%, write 30%)" in line(watched)


def test_stages_cost_what_their_steps_do_and_a_step_that_is_not_known_costs_nobody():
    steps = [
        StageCost(name=name, actors=3, busy_s=ms / 1000, cpu_s=0.001, out_bytes=1e6, holds=5)
        for name, ms in (("preprocess", 2), ("write", 30))
    ]
    (one,) = forms.staged(steps, ["preprocess+write"])
    assert (one.busy_s, one.cpu_s, one.holds) == (pytest.approx(0.032), pytest.approx(0.002), 10)
    first, last = forms.staged(steps, ["preprocess", "write"])
    assert first.cpu_s == pytest.approx(0.001 + 1e6 * (forms.PUT_S + forms.SLOWED_S))
    assert last.cpu_s == pytest.approx(0.001 + 1e6 * forms.GET_S)
    assert forms.staged(steps[:1], ["preprocess", "predict"]) == [first]
    assert forms.staged(steps[:1], ["preprocess+write"]) == []


def test_where_the_number_of_actors_is_not_known_the_other_form_is_not_told():
    """As on a Ray whose pools raypipe cannot see: the run and its report are there all the same."""
    both = seen("preprocess+write", {"preprocess": (2.0, 2.0), "write": (1.0, 1.0)}, rays_ms=0.1)
    found = report((both, 0))
    assert found["images_out"] == IMAGES and found["writing"] is None
