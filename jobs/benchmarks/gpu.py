"""Check raypipe on a machine with one CUDA GPU, without a network, in at most 8 minutes.

    python jobs/benchmarks/gpu.py --output out-gpu
    # a part of it
    python jobs/benchmarks/gpu.py --output out-gpu --parts loader

Parts:
- train: a detector learns while actors preprocess (overlap), and from images that were
  preprocessed before (stored);
- predict: that detector on the GPU;
- loader: raypipe.loader with finish="device" beside PyTorch's DataLoader, to the same small
  network.

It writes gpu.json and gpu.md: images/s, how busy the GPU was by the report and by nvidia-smi of the
same seconds, the share of time that waits for data. Without a GPU it says so and exits with 2.
"""

import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from loader import dataloader
from peers import BATCH
from rich.console import Console
from throughput import local_files
from torch import nn

import raypipe
from raypipe.run import predict, preprocess
from raypipe.run.cluster.machine import cores_here, versions
from raypipe.run.cluster.session import ray_here
from raypipe.train import attempts
from raypipe.train.settings import Settings

RECIPE = """{"name": "small", "needs_boxes": true,
 "ops": [{"op": "HorizontalFlip"}, {"op": "Resize", "height": 300, "width": 300}],
 "finish": {"scale": 0.00392156862745098, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}"""

_EVERY_MS = 200


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to measure."""

    output: str
    """Folder for gpu.json and gpu.md."""
    parts: tuple[str, ...] = ("train", "predict", "loader")
    """Only these."""
    images: int = 3000
    """Generated photos of each part."""
    actors: int = max(1, cores_here() - 2)
    """Preprocess actors, and workers of the DataLoader."""


@dataclass(kw_only=True)
class Check:
    """A machine, and what was measured on it. `device`: "cuda" or, to try the script, "cpu"."""

    benchmark: Benchmark
    device: str
    folder: Path
    smi: list[tuple[float, float]] = field(default_factory=list)  # when, and percent busy
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def add(self, part: str, images_per_s: float | None, **figures: Any) -> None:
        """Add a row of the table."""
        self.rows.append({"part": part, "images_per_s": images_per_s, **figures})
        print(json.dumps(self.rows[-1]), flush=True)

    def add_report(self, part: str, report: dict[str, Any], stage: str, **figures: Any) -> None:
        """Add a run's row: its report, and nvidia-smi in the seconds that this saw the GPU."""
        begun = time.time() - report["wall_s"]
        seen = [
            (begun + moment["t_s"], moment["gpu_percent"])
            for moment in report["timeline"]
            if moment["stage"] == stage and moment["gpu_percent"] is not None
        ]
        beside = self.busy(seen[0][0], seen[-1][0] + 1) if seen else None
        self.add(
            part,
            report["steady_images_per_s"],
            gpu_percent=statistics.mean(percent for _, percent in seen) if seen else None,
            nvidia_smi_percent=beside,
            **figures,
        )

    def busy(self, since: float, until: float) -> float | None:
        """How busy the GPU was by nvidia-smi, in percent."""
        found = [percent for at, percent in self.smi if since <= at <= until]
        return statistics.mean(found) if found else None


@contextlib.contextmanager
def watched(check: Check) -> Iterator[None]:
    """Have nvidia-smi say five times a second how busy the GPU is."""
    if not check.on_gpu:
        yield
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    process = subprocess.Popen(
        [*command, "-i", "0", "-lms", str(_EVERY_MS)], stdout=subprocess.PIPE, text=True
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                check.smi.append((time.time(), float(line)))

    threading.Thread(target=read, daemon=True).start()
    try:
        yield
    finally:
        process.kill()
        process.wait()


def train(check: Check) -> None:
    """Train with overlap, and from images preprocessed before."""
    recipe = check.folder / "small.json"
    recipe.write_text(RECIPE)
    quiet, given = Console(quiet=True), check.benchmark
    demo = {"input": f"demo:{given.images}", "recipe": str(recipe), "actors": given.actors}

    def trained(part: str, **settings: Any) -> None:
        learning = {"model": "ssd300_vgg16" if check.on_gpu else "ssd_tiny", "batch_size": 32}
        more = {"epochs": 2, "holdout": 0.0, "gpu": check.on_gpu, "cpu": not check.on_gpu}
        where = {"storage": str(check.folder / part)}
        settings = {**learning, **more, **where, **settings}
        begun = time.perf_counter()
        report = attempts.run(Settings.of(**settings), console=quiet).report
        assert report is not None
        waits = report["train"]["wait_share"]
        seconds = time.perf_counter() - begun
        check.add_report(f"train, {part}", report, "train", waiting_for_data=waits, seconds=seconds)

    trained("overlap", **demo)
    begun = time.perf_counter()
    wanted = preprocess.Settings.of(
        **demo,
        output=str(check.folder / "set"),
        format="parquet",
        writers=max(1, cores_here() // 4),
    )
    report = preprocess.run(wanted, console=quiet).report
    assert report is not None
    check.add("preprocess once", report["steady_images_per_s"], seconds=time.perf_counter() - begun)
    stored = {"input": str(check.folder / "set" / "*.parquet"), "actors": min(2, given.actors)}
    trained("stored", recipe=str(recipe), **stored)


def predictions(check: Check) -> None:
    """Predict with the model of the part `train`."""
    if not (check.folder / "overlap").exists():
        train(check)
    report = predict.run(
        predict.Settings.of(
            checkpoint=str(check.folder / "overlap"),
            input=f"demo:{max(1, check.benchmark.images // 2)}",
            output=str(check.folder / "found"),
            actors=check.benchmark.actors,
            predictors=1,
            gpu=check.on_gpu,
            cpu=not check.on_gpu,
        ),
        console=Console(quiet=True),
    ).report
    assert report is not None
    stage = next(stage for stage in report["stages"] if stage["name"] == "predict")
    check.add_report("predict", report, "predict", waiting_for_data=stage["starved"])


def loaders(check: Check) -> None:
    """Feed a small network by both loaders."""
    images = check.benchmark.images
    paths = local_files(f"demo:{images}")
    epochs = 3

    def raypipes() -> Iterator[torch.Tensor]:
        with raypipe.loader(
            paths[0].rpartition("/")[0],
            recipe="coco-300-pt",
            batch_size=BATCH,
            epochs=epochs,
            limit=images,
            finish="device",
            device=check.device,
            actors=check.benchmark.actors,
            console=Console(quiet=True),
        ) as loader:
            for _ in range(epochs):
                yield from (batch.images for batch in loader)

    def theirs() -> Iterator[torch.Tensor]:
        yield from dataloader(
            paths, epochs, True, workers=check.benchmark.actors, device=torch.device(check.device)
        )

    rates = {
        name: _fed(check, of()) for name, of in (("DataLoader", theirs), ("raypipe", raypipes))
    }
    for name, (rate, figures) in rates.items():
        check.add(f"loader, {name}", rate, ratio=rate / rates["DataLoader"][0], **figures)


def _fed(check: Check, batches: Iterator[torch.Tensor]) -> tuple[float, dict[str, Any]]:
    """Images/s of a small network over the last three quarters of the batches."""
    layers = [nn.Conv2d(3, 32, 7, 4), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers).to(check.device)
    moments: list[tuple[float, int, float]] = []
    asked = time.time()
    waiting = 0.0
    for batch in batches:
        got = time.time()
        waiting += got - asked if len(moments) else 0.0
        model(batch).mean().backward()
        if check.on_gpu:
            torch.cuda.synchronize()
        asked = time.time()
        moments.append((asked, len(batch), waiting))
    begin = moments[len(moments) // 4]
    took = moments[-1][0] - begin[0]
    images = sum(count for at, count, _ in moments if at > begin[0])
    figures = {
        "waiting_for_data": (moments[-1][2] - begin[2]) / took,
        "nvidia_smi_percent": check.busy(begin[0], moments[-1][0]),
    }
    return images / took, figures


PARTS: dict[str, Callable[[Check], None]] = {
    "train": train,
    "predict": predictions,
    "loader": loaders,
}


def write(check: Check) -> None:
    """Write gpu.json and gpu.md."""
    output = Path(check.benchmark.output)
    output.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name() if check.on_gpu else "none"
    machine = {
        "gpu": gpu,
        "cores": cores_here(),
        "system": platform.platform(),
        "versions": versions(),
    }
    (output / "gpu.json").write_text(json.dumps({"machine": machine, "rows": check.rows}, indent=1))
    names = ("images_per_s", "gpu_percent", "nvidia_smi_percent", "waiting_for_data", "ratio")
    lines = [f"{gpu}, {cores_here()} cores, torch {torch.__version__}", ""]
    lines += [f"| part | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in check.rows:
        cells = ["-" if row.get(name) is None else f"{row[name]:.2f}" for name in names]
        lines.append(f"| {row['part']} | {' | '.join(cells)} |")
    (output / "gpu.md").write_text("\n".join(lines) + "\n")


def main(benchmark: Benchmark) -> int:
    """Run the parts. Returns the exit status."""
    if not torch.cuda.is_available():
        print("No CUDA GPU is here (torch.cuda.is_available() is false): nothing was measured.")
        return 2
    ray_here(num_cpus=cores_here() + 2, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        check = Check(benchmark=benchmark, device="cuda", folder=Path(folder))
        with watched(check):
            for part in benchmark.parts:
                PARTS[part](check)
                write(check)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Benchmark, description=__doc__)))
