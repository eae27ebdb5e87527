"""Measure here what the talk measured, and judge its claims: time and CPU over actors and writers.

    python jobs/sweep.py --input demo:1000 --output out-sweep                          # the talk's
    grid: 1 to 20 actors python jobs/sweep.py --input photos/ --output out-sweep --actors 1 2 4 8
    --store-ms 10   # as to a slow store: about half an hour on 2 cores python jobs/sweep.py
    --input photos/ --output out-threads --writers none --threads 1 8   # what OpenCV's thread pool
    does python jobs/sweep.py --input coco/train2017 --annotations
    coco/annotations/instances_train2017.json
    --train --output out-train

Run it again with the same --output to go on after Ctrl-C, or to add points to the grid. The
results are in --output: sweep.html with a figure for each claim, results.parquet and results.csv.
Exit status: 0 when all points were measured that there is memory for, 1 when one failed or lost
images, 2 for bad arguments.
"""

import sys

import tyro
from rich.console import Console

from raypipe.run.console import attempt, ended, goes_on, say
from raypipe.sweep.command import run
from raypipe.sweep.grid import Settings
from raypipe.sweep.page import terminal


def main(arguments: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    console = Console(stderr=True)
    settings = tyro.cli(
        Settings, args=arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    kept = f"What is measured is in {settings.output}."
    swept = attempt(
        lambda: run(settings, console=console),
        kept=kept,
        again=goes_on(resume=settings.resume),
        console=console,
    )
    if isinstance(swept, int):
        return swept
    if swept.findings:
        Console().print(terminal(swept.findings))
        if swept.warning:
            console.print(swept.warning, style="yellow", markup=False, highlight=False)
        say(console, f"page: {settings.output}/sweep.html")
    return ended(
        swept.failure and f"{swept.failure}\n{kept} {goes_on(resume=settings.resume)}",
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
