"""The terminal side of `raypipe watch`: real pseudo-terminals and pipes, a played run.

With a real run: run/test_watching.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from raypipe import UsageError
from raypipe.cli import main, scalings
from raypipe.insight.states import LiveRun
from raypipe.watch import keys_in, watch
from tests.insight.test_screen import record
from tests.support.terminals import Terminal

ROOT = Path(__file__).parent.parent


class Playback:
    """A run of 5000 images that lasts so many updates, with room for 8 actors; breaks if told."""

    run_id = "20261124-114200-ab12"

    def __init__(self, updates: int, breaks: bool):
        self._left, self._breaks = updates, breaks
        self._wanted = {"preprocess": 4, "write": 4}
        self._done = 0

    def look(self) -> LiveRun:
        if not self._left:
            if self._breaks:
                raise RuntimeError("broken")
            raise UsageError(f"Run {self.run_id} has ended.")
        self._left -= 1
        self._done += 100
        now = record(done=self._done, at_s=self._done / 100)
        stages = [replace(stage, wanted=self._wanted[stage.name]) for stage in now.stages]
        return replace(now, stages=tuple(stages))

    def scale(self, counts: dict[str, int]) -> dict[str, int]:
        if sum((self._wanted | counts).values()) > 8 or min(counts.values()) < 1:
            raise UsageError(
                f"{counts} cannot be: there is room for 8 actors, and a stage needs one."
            )
        self._wanted |= counts
        return counts


def play(updates: str, *flags: str) -> None:
    """What a test's process runs."""
    run = Playback(int(updates), "breaks" in flags)
    try:
        watch(run, Console(), interval=0.1, as_json="json" in flags, once="once" in flags)
    except KeyboardInterrupt:
        sys.exit(130)


def command(updates: int, *flags: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        f"from tests.test_watch import play; play({str(updates)!r}, *{flags!r})",
    ]


def test_keys_scale_the_selected_stage_and_q_leaves_the_terminal_as_it_was():
    with Terminal(command(10_000), env=os.environ, cwd=ROOT) as terminal:
        # Rich draws a box where a part has nothing to show.
        assert "─" not in terminal.shows(r"▶ +preprocess +4 .*quit")
        terminal.press("+")
        terminal.shows(r"there is room for 8 actors, and a stage needs one.*quit")
        terminal.press("--")
        terminal.shows(r"▶ +preprocess +4 → 2 .*preprocess: 2 wanted")
        terminal.press("\x1b[B+\x1bOB")  # select write, one more of it, and on to the first again
        terminal.shows(r"▶ +preprocess +4 → 2 .*write +4 → 5 ")
        terminal.press("\t=")
        terminal.shows(r"▶ +write +4 → 6 .*write: 6 wanted")
        assert not terminal.restored and not terminal.stops_at_ctrl_z
        terminal.press("q")
        assert terminal.ends() == 0
        assert terminal.restored and terminal.stops_at_ctrl_z


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("\x03", 130),
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        ("breaks", 1),
    ],
)
def test_the_terminal_is_restored_however_it_ends(how, status):
    flags, updates = (("breaks",), 5) if how == "breaks" else ((), 10_000)
    with Terminal(command(updates, *flags), env=os.environ, cwd=ROOT) as terminal:
        terminal.shows("quit")
        if isinstance(how, signal.Signals):
            terminal.process.send_signal(how)
        elif how != "breaks":
            terminal.press(how)
        assert terminal.ends() == status
        assert terminal.restored
        assert ("Traceback" in terminal.output) == (how == "breaks")


def test_the_end_of_the_run_is_shown_and_no_failure():
    with Terminal(command(8), env=os.environ, cwd=ROOT) as terminal:
        assert terminal.ends() == 0
        assert terminal.restored
        left = terminal.output.rsplit("\x1b[?1049l", 1)[1]
        assert "800 of 5,000" in left and "last minute" in left and "▶" not in left
        assert "has ended. Last seen at 800 of 5000 images, 3 rejected." in left.replace(
            "\r\n", " "
        )
        assert "/data/out/_raypipe" in left


def test_it_follows_the_size_of_the_terminal():
    with Terminal(command(10_000), env=os.environ, cwd=ROOT) as terminal:
        assert "  starved  " not in terminal.shows("quit")
        terminal.resize(130, 30)
        terminal.shows(r"  busy  starved  blocked  what its actors do.*quit")
        assert max(map(len, terminal.screen.splitlines())) == 130


def test_without_a_terminal_each_update_is_a_line_and_the_end_another():
    done = subprocess.run(
        command(3), cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert [line.split(" images, ")[0] for line in lines[:3]] == [
        "1 s: 100/5000",
        "2 s: 200/5000",
        "3 s: 300/5000",
    ]
    assert lines[3].startswith("Run 20261124-114200-ab12 has ended.")


def test_a_reader_that_has_had_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    shown = subprocess.run(
        [sys.executable, "-m", "raypipe.cli", "dashboard"],
        cwd=ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writing)
    assert shown.returncode == 0
    assert "Traceback" not in shown.stderr and "BrokenPipe" not in shown.stderr


def test_json_is_a_record_a_line_and_nothing_else():
    done = subprocess.run(
        command(3, "json"),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert [json.loads(line)["done"] for line in done.stdout.splitlines()] == [100, 200, 300]
    assert "has ended" in done.stderr
    once = subprocess.run(
        command(3, "json", "once"), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert [json.loads(line)["done"] for line in once.stdout.splitlines()] == [100]
    assert once.stderr == ""


def test_once_in_a_terminal_is_the_view_without_keys():
    with Terminal(command(3, "once"), env=os.environ, cwd=ROOT) as terminal:
        assert terminal.ends() == 0
        assert "preprocess limits" in terminal.output and "verdict" in terminal.output
        assert "quit" not in terminal.output and "\x1b[?1049h" not in terminal.output


def test_keys_are_told_apart_however_many_arrive_at_once():
    assert keys_in(b"+\x1b[A\x1bOBq\t\x1b[Z\x1b[5~\x1b") == [
        "+",
        "up",
        "down",
        "q",
        "\t",
        "\x1b[Z",
        "\x1b[5~",
        "\x1b",
    ]
    assert keys_in("ö".encode() + b"\xff") == ["ö", "\N{REPLACEMENT CHARACTER}"]


def test_what_to_scale_is_read_with_and_without_a_run():
    assert scalings(("preprocess=8", "write=4")) == (None, {"preprocess": 8, "write": 4})
    assert scalings(("r1", "write=0")) == ("r1", {"write": 0})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "No stage is named"),
        (("r1",), "'r1' is taken for a run. No stage is named"),
        (("write",), "'write' is taken for a run"),
        (("r1", "write"), "'write' is not STAGE=N"),
        (("write=",), "'write=' is not STAGE=N"),
        (("=4",), "'=4' is not STAGE=N"),
        (("write=four",), "'write=four' is not STAGE=N"),
        (("write=-1",), "'write=-1' is not STAGE=N"),
        (("write=1.5",), "'write=1.5' is not STAGE=N"),
        (("write=\u0664",), "is not STAGE=N"),
        (("write=4", "r1"), "'r1' is not STAGE=N"),
        (("write=4", "write=5"), "write is given twice, as 4 and as 5"),
    ],
)
def test_a_malformed_scaling_is_refused_with_what_is_wrong_and_the_right_form(words, says, capsys):
    started = time.monotonic()
    assert main(["scale", "--address", "127.0.0.1:1", "--", *words]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert says in error and "Nothing was changed. Give [RUN] STAGE=N ..." in error
    assert time.monotonic() - started < 1  # without a look for a cluster


def test_an_impossible_interval_is_refused(capsys):
    for interval in ("0", "-1", "nan", "1e9"):
        assert main(["watch", "--interval", interval]) == 2
        assert "give seconds from 0.1 to 3600" in capsys.readouterr().err
