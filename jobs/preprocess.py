"""Preprocess images on Ray, and report what each stage cost and which one limits.

    python jobs/preprocess.py --input demo                                  # 500 generated photos, nothing written
    python jobs/preprocess.py --input photos/ --output out/                 # your own: JPEGs of 300x300, names kept
    python jobs/preprocess.py --input coco/val2017 --annotations coco/annotations/instances_val2017.json \\
        --recipe coco-1200 --format png --output coco-1200/                 # MLPerf's upscale_coco, in parallel
    python jobs/preprocess.py --input 'shards/{000..009}.tar' --recipe ssd-300-train --format parquet --output train/
    python jobs/preprocess.py --input s3://bucket/photos --output s3://bucket/photos-300 --actors 16 --writers 4
    ray job submit --working-dir . -- python jobs/preprocess.py --input demo

Run it again with the same --output to go on after Ctrl-C, a crash or a lost node.
Exit status: 0 when every image is accounted for and rejects stay within --max-reject-fraction, 1 when not, 2 for bad arguments.
"""

import sys

import tyro
from rich.console import Console

from raypipe.insight.report import terminal
from raypipe.run.command import attempt, ended, goes_on, say
from raypipe.run.pipeline import run
from raypipe.run.result import verdict_on
from raypipe.run.settings import Settings


def main(arguments: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    console = Console(stderr=True)
    settings = tyro.cli(Settings, args=arguments, description=__doc__)
    kept = f"What is finished is in {settings.output}." if settings.output else "Nothing was kept."
    again = goes_on(resume=settings.resume) if settings.output else "The same command starts again."
    outcome = attempt(
        lambda: run(settings, console=console), kept=kept, again=again, console=console
    )
    if isinstance(outcome, int):
        return outcome
    if outcome.report is not None:
        Console().print(terminal(outcome.report))
        places = [f"{settings.output}/_raypipe" if settings.output else None, settings.report]
        for place in filter(None, places):
            say(console, f"report: {place}/report.html")
    return ended(verdict_on(outcome, settings), console=console)


if __name__ == "__main__":
    sys.exit(main())
