"""Sweeps played by the planner's model, of machines that nobody has here."""

from dataclasses import dataclass, replace

from raypipe.insight.forms import staged
from raypipe.insight.planner import Machine, StageCost, bound

IMAGES = 1000


@dataclass(frozen=True, kw_only=True)
class Library:
    """What an image costs a library, in seconds: to preprocess, encode, and preprocess again."""

    cpu_s: float
    encode_s: float = 0.001
    waits_s: float = 0.0  # of a writer, for its store
    stored_s: float = 0.0004


OPENCV, TORCHVISION = Library(cpu_s=0.002, encode_s=0.001), Library(cpu_s=0.004, encode_s=0.001)


def record(
    backend: str,
    library: Library,
    *,
    cores: float,
    actors: int,
    writers: int = 0,
    threads: int = 1,
    **more,
) -> dict:
    """One measurement, without noise."""
    stages = [
        StageCost(name="preprocess", actors=actors, busy_s=library.cpu_s, cpu_s=library.cpu_s)
    ]
    if writers:
        busy_s = library.encode_s + library.waits_s
        stages.append(
            StageCost(name="write", actors=writers, busy_s=busy_s, cpu_s=library.encode_s)
        )
    done_by = stages
    if more.get("kind") == "fused":
        stages.append(
            StageCost(name="write", actors=0, busy_s=library.encode_s, cpu_s=library.encode_s)
        )
        done_by = staged(stages, ["preprocess+write"])
        stages = [replace(stage, actors=actors) for stage in stages]
    rate, limit = bound(done_by, Machine(cores=cores))
    used = {stage.name: min(rate * stage.busy_s / stage.actors, 1.0) for stage in stages}
    row = {
        "kind": "preprocess",
        "backend": backend,
        "actors": actors,
        "writers": writers,
        "workers": 0,
        "device": "",
        "threads": threads,
        "repeat": 0,
        "images": IMAGES,
        "time_s": IMAGES / rate,
        "images_per_s": rate,
        "cpu_percent": 100 * rate * sum(stage.cpu_s for stage in stages) / cores,
        "gpu_percent": None,
        "limit": limit,
        "cores": cores,
        "overhead_cpu_s": 0.0,
    }
    for stage in stages:
        row |= {
            f"{stage.name}_busy_s": stage.busy_s,
            f"{stage.name}_cpu_s": stage.cpu_s,
            f"{stage.name}_core_wait_s": 0.0,
        }
        row |= {
            f"{stage.name}_busy": used[stage.name],
            f"{stage.name}_cpu_percent": 100 * rate * stage.cpu_s / cores,
        }
    return row | more


def sweep(
    *,
    cores: float,
    actors: tuple[int, ...] = (1, 2, 4, 8, 10, 16, 20),
    libraries: dict[str, Library] | None = None,
    writing: tuple[str, ...] = ("none", "one", "same"),
) -> list[dict]:
    """A sweep without training."""
    rows = []
    for backend, library in (libraries or {"opencv": OPENCV, "torchvision": TORCHVISION}).items():
        for count in actors:
            writers = {{"none": 0, "one": 1, "same": count}[way] for way in writing}
            rows += [
                record(backend, library, cores=cores, actors=count, writers=n)
                for n in sorted(writers)
            ]
        rows.append(record(backend, library, cores=cores, actors=2, writers=2, kind="store"))
        read = Library(cpu_s=library.stored_s)
        rows.append(record(backend, read, cores=cores, actors=2, kind="stored"))
    return rows


def training(
    *,
    cores: float = 16,
    device: str = "gpu",
    train_s: float = 0.02,
    actors: tuple[int, ...] = (1, 2, 4, 12),
    workers=(1, 2, 4),
) -> list[dict]:
    """Training with both libraries: over actors with one worker, over workers with one actor."""
    rows = []
    for backend, library in {"opencv": OPENCV, "torchvision": TORCHVISION}.items():
        for count, of_training in sorted({(n, 1) for n in actors} | {(1, n) for n in workers}):
            preprocess = StageCost(
                name="preprocess", actors=count, busy_s=library.cpu_s, cpu_s=library.cpu_s
            )
            cpu_s = 0.001 if device == "gpu" else train_s
            train = StageCost(
                name="train",
                actors=of_training,
                busy_s=train_s,
                cpu_s=cpu_s,
                on_gpu=device == "gpu",
            )
            rate, limit = bound([preprocess, train], Machine(cores=cores))
            row = record(
                backend,
                library,
                cores=cores,
                actors=count,
                kind="train",
                workers=of_training,
                device=device,
                limit=limit,
            )
            row |= {
                "time_s": IMAGES / rate,
                "images_per_s": rate,
                "preprocess_cpu_percent": 100 * rate * library.cpu_s / cores,
            }
            row |= {
                "train_busy_s": train_s,
                "train_cpu_s": cpu_s,
                "train_core_wait_s": 0.0,
                "train_busy": rate * train_s / of_training,
            }
            rows.append(
                row
                | {"gpu_percent": 100 * rate * train_s / of_training if device == "gpu" else None}
            )
    return rows
