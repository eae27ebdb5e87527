"""What `raypipe watch` shows, as a terminal without colour would print it."""

import io
import json
import re

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from raypipe.insight.markup import DASH
from raypipe.insight.planner import Change
from raypipe.insight.screen import (
    HISTORY_S,
    LEVELS,
    Looking,
    bar,
    line,
    listing,
    remember,
    screen,
    sparkline,
    view,
)
from raypipe.insight.states import LiveRun, LiveStage, ScaleEvent, Verdict

HOSTILE = "x\x1b[31m[bold red]\r\n\t\x07\u202e\udc80[/]%s{}" + "w" * 300


def stage(name: str, **figures) -> LiveStage:
    known = {
        "actors": 4,
        "pending": 0,
        "wanted": 4,
        "draining": 0,
        "images": 1234,
        "images_per_s": 345.2,
        "cpu_percent": 75.3,
    }
    known |= {
        "rss_bytes": 1_234_000_000,
        "gpu_percent": None,
        "busy": 0.75,
        "starved": 0.05,
        "blocked": 0.2,
        "queued": 3,
    }
    return LiveStage(**{"name": name, **known, **figures})


def event(t_s: float, stage: str, before: int, after: int, by: str) -> ScaleEvent:
    return ScaleEvent(t_s=t_s, stage=stage, before=before, after=after, by=by)


def record(**changes) -> LiveRun:
    reason = (
        "preprocess limits: its 4 actors were busy 75% of the time; "
        "write was starved 70% of its time."
    )
    advice = (
        Change(change="cores 2 -> 3", predicted_images_per_s=400.0),
        Change(change="preprocess actors 4 -> 5", predicted_images_per_s=431.5),
    )
    known = {
        "run_id": "20261124-114200-ab12",
        "at_s": 83.4,
        "input": "demo:5000",
        "output": "/data/out",
        "recipe": "coco-1200",
        "backend": "opencv",
        "images": 5000,
        "done": 1234,
        "rejected": 3,
        "images_per_s": 345.2,
        "eta_s": 10.9,
        "cores": 2.0,
        "cpu_percent": 97.6,
        "actors_at_most": 8,
        "auto": True,
        "stages": (
            stage("preprocess", wanted=8, pending=4),
            stage("write", busy=0.3, starved=0.7, blocked=0.0, queued=12),
        ),
        "verdict": Verdict(stage="preprocess", reason=reason, advice=advice),
        "scale_events": (
            event(12.3, "preprocess", 2, 4, "user"),
            event(80.3, "preprocess", 4, 8, "auto"),
        ),
    }
    return LiveRun(**known | changes)


def unknown() -> LiveRun:
    """A run that has only begun: nothing is known that could be unknown."""
    nothing = dict.fromkeys(
        ("images_per_s", "cpu_percent", "rss_bytes", "gpu_percent", "busy", "starved", "blocked")
    )
    stages = (stage("preprocess", actors=0, images=0, queued=0, **nothing),)
    verdict = Verdict(stage=None, reason="No stage has finished a shard.")
    blank = {
        "output": None,
        "done": 0,
        "rejected": 0,
        "images_per_s": None,
        "eta_s": None,
        "cpu_percent": None,
        "at_s": 0.0,
    }
    return record(stages=stages, verdict=verdict, scale_events=(), auto=False, **blank)


HOSTILES = [
    record(**{field: HOSTILE}) for field in ("run_id", "input", "output", "recipe", "backend")
]
HOSTILES += [
    record(stages=(stage(HOSTILE),)),
    record(verdict=Verdict(stage=HOSTILE, reason=HOSTILE)),
]
HOSTILES += [record(scale_events=(event(1.0, HOSTILE, 1, 2, HOSTILE),))]


class Ascii(io.StringIO):
    encoding = "ascii"


def printed(
    renderable: RenderableType,
    width: int,
    height: int | None = None,
    file: io.StringIO | None = None,
) -> list[str]:
    console = Console(
        file=file or io.StringIO(),
        width=width,
        height=height or 50,
        force_terminal=True,
        color_system=None,
    )
    console.print(renderable, height=height)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize(
    "what",
    [
        record(),
        unknown(),
        record(run_id=HOSTILE, input=HOSTILE, output=HOSTILE, recipe=HOSTILE),
        *HOSTILES,
    ],
)
def test_no_line_is_wider_than_the_terminal_and_nothing_of_it_is_a_control_character(what, width):
    lines = printed(view(what, Looking(selected=0), width=width), width)
    assert max(map(cell_len, lines)) <= width
    assert all(part.isprintable() for part in lines)
    assert re.match(r"run [2x]", lines[0])


def test_every_figure_of_a_run_is_there():
    text = "\n".join(
        printed(view(record(), Looking(selected=1, history=((83.0, 300.0),)), width=100), 100)
    )
    for part in (
        "20261124-114200-ab12",
        "demo:5000 → /data/out",
        "coco-1200, opencv",
        "1,234 of 5,000, 25%",
        "about 10 s left",
        "3 rejected",
    ):
        assert part in text
    for part in (
        "345 images/s",
        "98% of 2 cores, room for 8 actors, sized automatically",
        "last minute",
        "preprocess limits",
        "83 s",
    ):
        assert part in text
    assert re.search(r"preprocess +4 → 8 +345 +75% +1\.23 GB +3 ", text)
    assert re.search(r"▶ +write +4 +345", text)
    assert "preprocess actors 4 -> 5: about 432 images/s expected" in text  # the better of two
    assert text.index("preprocess 4 → 8  at 80 s by auto") < text.index(
        "preprocess 2 → 4  at 12 s by user"
    )


def test_advice_is_what_keys_can_do_first_then_what_would_bring_clearly_more():
    def advice(**predicted: float) -> list[str]:
        changes = {
            "write": "write actors 1 -> 2",
            "cores": "cores 2 -> 3",
            "nothing": "preprocess actors 4 -> 5",
        }
        given = tuple(
            Change(change=changes[name], predicted_images_per_s=rate)
            for name, rate in predicted.items()
        )
        what = record(verdict=Verdict(stage="write", reason="Because.", advice=given))
        return [
            text.split(":")[0].strip()
            for text in printed(view(what, Looking(), width=80), 80)
            if "expected" in text
        ]

    assert advice(cores=500.0, write=400.0, nothing=345.0) == [
        "write actors 1 -> 2",
        "cores 2 -> 3",
    ]
    assert advice(cores=404.0, write=400.0) == ["write actors 1 -> 2"]
    assert advice(cores=500.0, nothing=345.0) == ["cores 2 -> 3"]
    assert advice(nothing=345.0) == advice() == []


def test_what_is_not_known_is_a_dash_and_never_a_zero():
    text = "\n".join(printed(view(unknown(), Looking(), width=80), 80))
    assert f"{DASH} images/s" in text
    assert f"{DASH} of 2 cores, room for 8 actors, sized by hand" in text
    assert "nothing written" in text
    assert re.search(
        rf"preprocess +0 → 4 +{DASH} +{DASH} +{DASH} +0 +{DASH} *$", text, re.MULTILINE
    )
    assert "▶" not in text  # without keys nothing is selected
    assert (
        "CPU - of 2 cores; preprocess: actors 0 -> 4, - images/s, CPU -, memory -, busy -"
        in line(unknown())
    )


def test_a_stage_that_has_done_everything_is_done_whatever_its_actors_are_about():
    left = {"actors": 2, "wanted": 1, "queued": 0, "images_per_s": 0.0}
    text = "\n".join(
        printed(
            view(record(stages=(stage("preprocess", images=5000, **left),)), Looking(), width=80),
            80,
        )
    )
    assert re.search(r"preprocess +done +0 ", text)
    for not_yet in (
        {"images": 4999},
        {"images": 5000, "queued": 1},
        {"images": 5000, "images_per_s": 3.0},
    ):
        text = "\n".join(
            printed(
                view(record(stages=(stage("preprocess", **left | not_yet),)), Looking(), width=80),
                80,
            )
        )
        assert re.search(r"preprocess +2 → 1 ", text)


def test_gpu_has_a_column_where_a_stage_has_one():
    assert "GPU" not in "\n".join(printed(view(record(), Looking(), width=80), 80))
    lines = printed(
        view(
            record(
                stages=(
                    stage("train", gpu_percent=88.0),
                    stage("preprocess"),
                )
            ),
            Looking(),
            width=80,
        ),
        80,
    )
    head, train, preprocess = (
        next(text for text in lines if word in text) for word in ("GPU", "train", "preprocess  ")
    )
    assert "88%" in train and "GPU" in head
    assert cell_len(train) <= 80 and cell_len(preprocess) <= 80


def test_shares_are_told_apart_without_colour_and_sum_to_the_whole_bar():
    drawn = bar([(0.5, "#", "green"), (0.25, ".", "blue"), (0.25, "x", "yellow")], 40).plain
    assert drawn == "#" * 20 + "." * 10 + "x" * 10
    for busy in (0.0, 0.333, 0.999, 1.0):
        starved = (1 - busy) / 3
        assert (
            len(bar([(busy, "#", ""), (starved, ".", ""), (1 - busy - starved, "x", "")], 17).plain)
            == 17
        )
    assert bar([(0.5, "#", ""), (None, ".", "")], 10).plain == DASH


def test_shares_stand_beside_the_bar_where_there_is_room():
    wide = printed(view(record(), Looking(), width=120), 120)
    row = next(text for text in wide if text.strip().startswith("preprocess"))
    assert re.search(r" 75% +5% +20%  █", row)


def test_the_sparkline_shows_the_last_minute_from_zero_to_the_highest():
    history = tuple((float(second), 100.0 if second < 30 else 50.0) for second in range(60))
    drawn = sparkline(history, 59.5, 30)
    assert (drawn[0], drawn[-1], len(drawn)) == (LEVELS[-1], LEVELS[4], 30)
    assert sparkline(((59.0, 10.0),), 59.5, 10) == " " * 9 + LEVELS[-1]
    assert sparkline(((59.0, 0.0),), 59.5, 10) == " " * 9 + LEVELS[0]
    assert sparkline(((59.0, None), (-5.0, 7.0)), 59.5, 10) == " " * 10


def test_the_memory_of_it_is_a_minute_long():
    history = ()
    for second in range(200):
        now = record(at_s=float(second), images_per_s=None if second % 2 else 1.0)
        history = remember(history, now)
    assert len(history) == HISTORY_S
    assert history[0][0] == 140.0


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (80, 14)])
def test_a_whole_screen_ends_with_the_keys_whatever_has_to_go(size):
    events = tuple(event(float(i), "write", i, i + 1, "auto") for i in range(50))
    lines = printed(
        screen(
            record(scale_events=events),
            Looking(selected=0, message="refused: " + "m" * 200),
            width=size[0],
        ),
        *size,
    )
    assert len(lines) == size[1]
    assert "quit (the run goes on)" in lines[-1]
    assert any("refused: " in text for text in lines[-5:])
    assert any("▶  preprocess" in text for text in lines)


def test_a_terminal_that_knows_ascii_only_gets_no_more_and_the_same_columns():
    rich = printed(screen(record(), Looking(selected=0), width=80), 80, 24)
    plain = printed(screen(record(), Looking(selected=0), width=80), 80, 24, Ascii())
    assert all(text.isascii() for text in plain)
    assert [len(text) for text in rich] == [len(text) for text in plain]
    assert any(re.search(r"> +preprocess +4 > 8.*#+\.x+", text) for text in plain)


def test_markup_in_a_name_is_text():
    lines = printed(
        view(record(run_id="[bold]r[/bold]", input="[link=file:///x]y"), Looking(), width=80), 80
    )
    assert "run [bold]r[/bold]" in lines[0]
    assert "[link=file:///x]y" in lines[1]


def test_a_plain_line_is_one_line_with_everything_a_log_needs():
    text = line(
        record(
            stages=(
                stage(HOSTILE),
                stage("write"),
            )
        )
    )
    assert text.isprintable()
    plain = line(record())
    assert plain.startswith(
        "83 s: 1234/5000 images, 3 rejected, 345 images/s, 10 s left, CPU 98% of 2 cores; "
        "preprocess: actors 4 -> 8, "
    )
    assert plain.endswith("; limit: preprocess")
    assert plain.isascii()
    json.loads(json.dumps(record().json()))


def test_runs_are_listed_a_row_each():
    lines = printed(
        listing([record(), record(run_id="older", output=None, images_per_s=None)]), 100
    )
    assert len(lines) == 3
    assert re.search(
        r"20261124-114200-ab12 +83 s +1,234 of 5,000 +345 +4 → 8 \+ 4 +demo:5000 → /data/out",
        lines[1],
    )
    assert re.search(rf"older +83 s +1,234 of 5,000 +{DASH} .*nothing written", lines[2])
