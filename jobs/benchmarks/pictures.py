"""Make the pictures of README.md from a real run: its report page, and `raypipe watch` on it.

    # writes .github/report.png and .github/watch.svg, in a minute
    python jobs/benchmarks/pictures.py

The run reads 4,000 demo photos from a store that takes 5 ms longer for each, and writes to one
that takes 20 ms longer. So on any machine writing limits at first, and preprocessing once there
are three writers. The run begins with one actor a stage, and is scaled twice.

The page needs Chromium, which raypipe itself does not: `apt install chromium`, or give --browser.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image
from rich.console import Console

import raypipe
from raypipe.insight.screen import Looking, remember, screen
from raypipe.insight.states import LiveRun
from raypipe.run.live import control

RUN = "photos-300"

SCALINGS = ((8.0, {"write": 3}), (16.0, {"preprocess": 2}))
"""So many seconds after the first images, so many actors."""

COLUMNS, ROWS = 96, 20
"""Size of the terminal that `raypipe watch` is shown in."""

PAGE = (1080, 1190)
"""CSS pixels of the report page that are shown, from its top."""

COLOURS = 128
"""Of the PNG: text and figures need no more, and the file is a third as large."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Which run to show, and where."""

    input: str = "demo:4000"
    """Images of the run."""
    look_s: float = 26.0
    """Draw `raypipe watch` so many seconds after the first images."""
    browser: str = "chromium"
    """Chromium or Chrome, as a command."""
    output: Path = Path(".github")
    """Folder for report.png and watch.svg."""


def watched(look_s: float) -> str:
    """Scale the run as SCALINGS says, and draw what `raypipe watch` shows of it: an SVG."""
    run = control.attach(RUN)
    looking, first_s, left = Looking(selected=1), None, list(SCALINGS)
    while True:
        record = run.look()
        looking = Looking(selected=1, history=remember(looking.history, record))
        if first_s is None and record.done:
            first_s = record.at_s
        since_s = record.at_s - first_s if first_s is not None else 0.0
        if left and since_s >= left[0][0]:
            run.scale(left.pop(0)[1])
        if since_s >= look_s:
            return drawn(record, looking)
        time.sleep(0.5)


def drawn(record: LiveRun, looking: Looking) -> str:
    """The screen of `raypipe watch` as an SVG."""
    with open(os.devnull, "w") as nowhere:
        console = Console(
            record=True, width=COLUMNS, height=ROWS, force_terminal=True, file=nowhere
        )
        console.print(screen(record, looking, width=COLUMNS))
        return console.export_svg(title="raypipe watch", unique_id="watch")


def photographed(page: Path, picture: Path, browser: str) -> None:
    """The top of an HTML page as a PNG, in light colours."""
    width, height = PAGE
    subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",  # root may not use the sandbox; the page is our own
            "--hide-scrollbars",
            f"--window-size={width},{height}",
            f"--screenshot={picture}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
    )
    Image.open(picture).convert("RGB").quantize(COLOURS).save(picture, optimize=True)


def main() -> int:
    """Make both pictures."""
    wanted = tyro.cli(Pictures, description=__doc__)
    wanted.output.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = raypipe.start(
            input=wanted.input,
            output=f"{folder}/out",
            run_id=RUN,
            recipe="photos-300",
            actors=1,
            writers=1,
            read_ms=5.0,
            store_ms=20.0,
            shard_rows=16,
        )
        run.live()  # when it has begun
        watch = watched(wanted.look_s)
        (wanted.output / "watch.svg").write_text(watch.replace(folder + "/", ""))
        run.wait()
        page = Path(folder, "out", "_raypipe", "report.html")
        photographed(page, wanted.output / "report.png", wanted.browser)
    return 0


if __name__ == "__main__":
    sys.exit(main())
