"""Measure what preprocessing while training costs, beside the alternatives, on your machine.

    # both at once, beside the longer of the two alone: training-bound, balanced, preprocess-bound
    python jobs/benchmarks/training.py overlap
    # continuous, or preprocessed once: from 1 epoch on, beside the report's break-even
    python jobs/benchmarks/training.py designs
    # the recipe's ops in the actors, or on the training device
    python jobs/benchmarks/training.py ops

In `overlap` and `designs`, reading an image and a training step wait for set times. So any machine
shows two stages that do not take each other's cores. Their images are 64x64, made before. `ops`
trains ssd_tiny for real, on a GPU if there is one.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import ray
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from raypipe.run import preprocess
from raypipe.run.cluster.machine import cores_here
from raypipe.run.cluster.session import ray_here
from raypipe.train import attempts
from raypipe.train.settings import Settings

RECIPE = """{"name": "small", "ops": [{"op": "Resize", "height": 64, "width": 64}],
 "finish": {"scale": 0.00392156862745098}}"""


class Waiting(nn.Module):
    """A model with torchvision's contract whose step waits `ms` milliseconds."""

    def __init__(self, *, num_classes: int, ms: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self._s = ms / 1000

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Return the loss of a step, or that no image has a box."""
        if self.training:
            time.sleep(self._s)
            return {"nothing": (self.weight - 1) ** 2}
        nothing = {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "scores": torch.zeros(0),
        }
        return [nothing for _ in images]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to measure."""

    what: Annotated[Literal["overlap", "designs", "ops"], tyro.conf.Positional]
    images: int = 480
    """Images an epoch."""
    epochs: int | None = None
    """Epochs of a training; by default 16 (overlap), 2 (ops), and 1 to 4 (designs)."""
    rounds: int = 1
    """Rounds (overlap, ops): each is a row."""


def trained(folder: Path, **given: Any) -> dict[str, Any]:
    """Train into a temporary folder; return the report."""
    settings = Settings.of(
        **{
            "storage": tempfile.mkdtemp(dir=folder),
            "holdout": 0.0,
            "batch_size": 16,
            "shard_rows": 32,
            **given,
        }
    )
    report = attempts.run(settings, console=Console(quiet=True)).report
    assert report is not None
    return report


def waiting(folder: Path, step_ms: float, **given: Any) -> dict[str, Any]:
    """Train on CPU with steps that wait; return the report."""
    model = {
        "model": "training:Waiting",
        "model_arguments": f'{{"ms": {step_ms}}}',
        "cpu": True,
    }
    return trained(folder, **model, recipe=str(folder / "small.json"), **given)


def preprocessed(folder: Path, **given: Any) -> dict[str, Any]:
    """Preprocess, without an output unless one is given; return the report."""
    settings = preprocess.Settings.of(recipe=str(folder / "small.json"), shard_rows=32, **given)
    report = preprocess.run(settings, console=Console(quiet=True)).report
    assert report is not None
    return report


def small_images(folder: Path, count: int) -> str:
    """Make a folder of images with boxes that take little CPU to read."""
    made = str(folder / "small")
    preprocessed(folder, input=f"demo:{count}", output=made, format="parquet")
    return made


def overlap(wanted: Benchmark, folder: Path, console: Console) -> None:
    """Compare seconds from the first step to the end: both at once, and each alone."""
    table = Table(
        "setting",
        "preprocess alone",
        "train alone",
        "both at once",
        "of the longer",
        title="seconds without start-up",
    )
    epochs = wanted.epochs or 16
    how: dict[str, Any] = {"actors": 4, "input": small_images(folder, wanted.images)}
    # 4 actors that wait 20 ms an image make 200 images/s: 80 ms for the 16 images of a step.
    for name, step_ms in (
        ("training-bound", 160.0),
        ("balanced", 80.0),
        ("preprocess-bound", 40.0),
    ):
        ratios = []
        for _ in range(wanted.rounds):
            first = (
                wanted.images
                * epochs
                / preprocessed(folder, **how, read_ms=20.0)["steady_images_per_s"]
            )
            alone, both = (
                waiting(folder, step_ms, **how, epochs=epochs, read_ms=read_ms)
                for read_ms in (0.0, 20.0)
            )
            seconds = [first, *(report["wall_s"] - report["ready_s"] for report in (alone, both))]
            ratios.append(seconds[2] / max(seconds[:2]))
            table.add_row(name, *(f"{s:.1f}" for s in seconds), f"{ratios[-1]:.3f}")
    console.print(table)


def designs(wanted: Benchmark, folder: Path, console: Console) -> None:
    """Compare seconds of both designs over epochs, start-up left out."""
    source: dict[str, Any] = {"actors": 2, "input": small_images(folder, wanted.images)}
    stored = folder / "stored"
    once = preprocessed(
        folder, **source, read_ms=20.0, writers=1, output=str(stored), format="parquet"
    )
    once_s = once["images_in"] / once["steady_images_per_s"]
    said = None
    table = Table(
        "epochs",
        "continuous, s",
        "once and from the store, s",
        title=f"preprocessing once: {once_s:.1f} s",
    )
    for epochs in range(1, 1 + (wanted.epochs or 4)):
        continuous = waiting(folder, 80.0, **source, read_ms=20.0, epochs=epochs)
        separate = waiting(folder, 80.0, input=str(stored), actors=2, epochs=epochs)
        took = [report["wall_s"] - report["ready_s"] for report in (continuous, separate)]
        table.add_row(str(epochs), f"{took[0]:.1f}", f"{once_s + took[1]:.1f}")
        said = said or continuous["train"]["break_even"]
    console.print(table)
    console.print(f"the report of 1 epoch said: {said}", highlight=False)


def ops(wanted: Benchmark, folder: Path, console: Console) -> None:
    """Compare images/s of a real training, with the ops in the actors and on the device."""
    table = Table(
        "ops on",
        "images/s",
        "preprocess busy",
        "train waiting",
        "GPU %",
        title="ssd_tiny, ssd-300-train",
    )
    for round_ in range(wanted.rounds):
        for where in ("actors", "device") if round_ % 2 == 0 else ("device", "actors"):
            report = trained(
                folder,
                input=f"demo:{wanted.images}",
                epochs=wanted.epochs or 2,
                ops_on=where,
                shard_rows=None,
            )
            preprocess, train = report["stages"]
            gpu = "-" if train["gpu_percent"] is None else f"{train['gpu_percent']:.0f}"
            shares = (
                f"{100 * share:.0f}%"
                for share in (preprocess["busy"], report["train"]["wait_share"])
            )
            table.add_row(where, f"{report['steady_images_per_s']:.1f}", *shares, gpu)
    console.print(table)


def main() -> int:
    """Measure and print."""
    wanted = tyro.cli(Benchmark, description=__doc__)
    with tempfile.TemporaryDirectory(prefix="raypipe-benchmark-") as name:
        folder = Path(name)
        (folder / "small.json").write_text(RECIPE)
        ray_here(
            num_cpus=max(8, cores_here()),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        {"overlap": overlap, "designs": designs, "ops": ops}[wanted.what](wanted, folder, Console())
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
