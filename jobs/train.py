"""Train a detection model on Ray while preprocess actors make the next batches.

    python jobs/train.py --input demo --storage out-train                  # a tiny SSD on 450 generated photos, on CPUs
    python jobs/train.py --input coco/train2017 --annotations coco/annotations/instances_train2017.json \\
        --holdout-input coco/val2017 --holdout-annotations coco/annotations/instances_val2017.json \\
        --model ssd300_vgg16 --epochs 65 --batch-size 128 --optimizer sgd --lr 0.01 --schedule step \\
        --gpu --workers 4 --actors 48 --checkpoint-every 500 --storage s3://bucket/ssd
    python jobs/train.py --input 'train/*.parquet' --recipe ssd-300-val --storage out-train      # preprocessed before
    python jobs/train.py --input demo --model mymodels:make --model-arguments '{"width": 64}' --storage out-own
    ray job submit --working-dir . -- python jobs/train.py --input demo --storage /shared/out-train

Run it again with the same --storage to go on after Ctrl-C, a crash or a lost node, also with other numbers of workers and actors.
Exit status: 0 when every row is accounted for and rejects stay within --max-reject-fraction, 1 when not, 2 for bad arguments.
"""

import sys

import tyro
from rich.console import Console

from raypipe.insight.report import terminal
from raypipe.run.command import attempt, ended, goes_on, say
from raypipe.run.training import Settings, run, verdict_on


def main(arguments: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    console = Console(stderr=True)
    settings = tyro.cli(
        Settings, args=arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    kept = f"Checkpoints are in {settings.storage}."
    outcome = attempt(
        lambda: run(settings, console=console),
        kept=kept,
        again=goes_on(resume=settings.resume),
        console=console,
    )
    if isinstance(outcome, int):
        return outcome
    if outcome.report is not None:
        Console().print(terminal(outcome.report))
        trained = outcome.report["train"]
        judged = (
            "" if trained["map"] is None else f"mAP {trained['map']:.3f} on the held-out images; "
        )
        Console().print(
            f"{judged}workers computed {100 * trained['accelerator_utilisation']:.0f}% and waited for data "
            f"{100 * trained['wait_share']:.0f}% of their time",
            highlight=False,
        )
        Console().print(
            f"Preprocess once, or while training? {trained['break_even']['reason']}",
            highlight=False,
        )
        say(
            console, f"model: {outcome.checkpoint}\nreport: {settings.storage}/_raypipe/report.html"
        )
    return ended(verdict_on(outcome, settings), console=console)


if __name__ == "__main__":
    sys.exit(main())
