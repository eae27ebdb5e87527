"""Start a job (preprocess, train, predict, sweep), watch and scale runs, and read their reports."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.resources import files
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from raypipe import UsageError
from raypipe.data import reports
from raypipe.errors import foreign, printable
from raypipe.images import catalog
from raypipe.images.recipe_json import to_json
from raypipe.insight.merged import summary
from raypipe.insight.screen import listing
from raypipe.insight.terminal import outlook, terminal
from raypipe.manifest import Manifest, text

# raypipe.run imports Ray, which takes 2 s. So only commands that need it import it, when called.

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Address = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="HOST:PORT",
        help="Head of the Ray cluster, for its nodes; from anywhere its job server, "
        "http://HOST:8265, or ray://HOST:10001. By default the runs of this machine and of "
        "RAY_ADDRESS.",
    ),
]


@dataclass(frozen=True)
class Recipes:
    """List the recipes that jobs take by name, or print one as JSON, as a start for your own."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Recipe to print as JSON."""


@dataclass(frozen=True)
class Report:
    """Print the report of a run again; of several runs, or of a run in parts, what they sum to."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Output directories of runs, or the folders given as --report."""


@dataclass(frozen=True)
class Plan:
    """Predict other machines from a finished run's costs.

    Prints the best allocation, its throughput, and what one more of each would bring.
    """

    run: Annotated[str, tyro.conf.Positional]
    """Output directory of the run, or the folder given as --report."""
    cpus: int | None = None
    """Cores, and at most as many actors; by default those of the run's machine."""
    gpus: int | None = None
    """GPUs for training; by default as many as the run had."""


@dataclass(frozen=True)
class Runs:
    """List the runs in progress."""

    address: Address = None
    json: Flag = False
    """Print a line of JSON for each run."""


@dataclass(frozen=True)
class Watch:
    """Watch a run: actors, images/s, CPU, memory and waiting of each stage, and which one limits.

    In a terminal, the arrow keys select a stage, and + and - scale it by one. q leaves; the run
    goes on. Elsewhere each update is a line.
    """

    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    """Run to watch (see `raypipe runs`); by default the only one, or the next that starts."""
    address: Address = None
    json: Flag = False
    """Print a line of JSON for each update."""
    once: Flag = False
    """Print one update only."""
    interval: float = 1.0
    """Seconds between updates."""


@dataclass(frozen=True)
class Scale:
    """Change the actor counts of a run in progress: `raypipe scale preprocess=8 write=4`."""

    what: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN] STAGE=N ...")
    ]
    """Run (by default the only one), then the new actor count of each stage."""
    address: Address = None


@dataclass(frozen=True)
class Dashboard:
    """Write the Grafana dashboard of raypipe's metrics, to import into Grafana."""

    file: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]")] = None
    """File to write; by default it is printed."""


def recipes(command: Recipes, console: Console) -> None:
    """Print all recipes as a table, or one as JSON."""
    if command.name is not None:
        console.print_json(json.dumps(to_json(catalog.get(command.name))))
        return
    table = Table(
        "recipe", "size", "what it is, and where from", header_style="bold", pad_edge=False
    )
    table.columns[0].no_wrap = True
    for name, recipe in catalog.RECIPES.items():
        size = "varies" if recipe.fixed_size is None else "{}x{}".format(*recipe.fixed_size)
        table.add_row(name, size, recipe.description)
    console.print(table)


def report(command: Report, console: Console) -> None:
    """Print the report of a finished run, or of several.

    Raises:
        UsageError: there is none.
    """
    if not command.runs:
        raise UsageError("No run is named. Give its output directory: raypipe report out")
    found, missing = reports.of_all(command.runs)
    with foreign(f"the reports {', '.join(found)}", remedy=reports.REMEDY):
        if len(found) == 1 and not missing:
            console.print(terminal(*found.values()))
        else:
            console.print(summary(found, missing))


def plan(command: Plan, console: Console) -> None:
    """Print what the costs of a finished run predict for other allocations and machines.

    Raises:
        UsageError: there is none, or it has no costs.
    """
    for name, count in (("cpus", command.cpus), ("gpus", command.gpus)):
        if count is not None and count < 1:
            raise UsageError(f"--{name} is {count}; it must be at least 1.")
    found, place = reports.of(command.run)
    remedy = "It does not say what stages cost. Give the report of a run that finished a shard."
    with foreign(f"the report {place}", remedy=remedy):
        console.print(outlook(found, cpus=command.cpus, gpus=command.gpus))


def runs(command: Runs, console: Console) -> None:
    """Print the runs of a cluster, newest first.

    Raises:
        UsageError: there is no cluster.
    """
    from raypipe.run.live import control

    found = control.runs(command.address)
    if command.json:
        for record in found:
            print(json.dumps(record.json()))
    else:
        console.print(listing(found) if found else "No run is going on here.")


def watch(command: Watch, console: Console) -> None:
    """Show a run in progress.

    Raises:
        UsageError: there is no cluster or no such run.
    """
    if not 0.1 <= command.interval <= 3600:
        raise UsageError(f"--interval is {command.interval:g}; give seconds from 0.1 to 3600.")
    from raypipe.run.live import control
    from raypipe.watch import watch

    def waiting() -> None:
        console.print(
            "No run is in progress. Waiting for one ... (Ctrl-C ends this)", highlight=False
        )

    run = control.attach(
        command.run,
        address=command.address,
        waiting=None if command.once or command.run else waiting,
    )
    watch(run, console, interval=command.interval, as_json=command.json, once=command.once)


def scalings(words: tuple[str, ...]) -> tuple[str | None, dict[str, int]]:
    """Parse `[RUN] STAGE=N ...` into the run and the new actor count of each stage.

    Raises:
        UsageError: it is not of that form.
    """
    form = (
        "Nothing was changed. Give [RUN] STAGE=N ..., such as: raypipe scale preprocess=8 write=4"
    )
    run, pairs = (words[0], words[1:]) if words and "=" not in words[0] else (None, words)
    if not pairs:
        cause = "" if run is None else f"{run!r} is taken for a run. "
        raise UsageError(f"{cause}No stage is named. {form}")
    counts: dict[str, int] = {}
    for pair in pairs:
        stage, _, count = pair.partition("=")
        if not stage or not (count.isascii() and count.isdigit()):
            raise UsageError(f"{pair!r} is not STAGE=N with N a whole number of actors. {form}")
        if stage in counts:
            raise UsageError(f"{stage} is given twice, as {counts[stage]} and as {count}. {form}")
        counts[stage] = int(count)
    return run, counts


def scale(command: Scale, console: Console) -> None:
    """Change a run's actor counts.

    Raises:
        UsageError: there is no cluster or no such run, or the run refuses.
    """
    name, counts = scalings(command.what)
    from raypipe.run.live import control

    run = control.attach(name, address=command.address)
    run.scale(counts)
    wanted = ", ".join(f"{stage}={count}" for stage, count in counts.items())
    console.print(
        f"Run {run.run_id}: {wanted} wanted. `raypipe watch {run.run_id}` shows the change.",
        markup=False,
        highlight=False,
    )


def dashboard(command: Dashboard, console: Console) -> None:
    """Write the Grafana dashboard to a file or to standard output.

    Raises:
        UsageError: the file exists, or cannot be written.
    """
    text = files("raypipe.insight").joinpath("grafana.json").read_text()
    if command.file is None:
        print(text, end="")
    else:
        try:
            with open(command.file, "x") as file:
                file.write(text)
        except OSError as error:
            raise UsageError(
                f"{command.file!r} cannot be written: {error.strerror}. Give another file, or "
                f"remove it first."
            ) from error
    how = "In Grafana: Dashboards, New, Import, {}; then choose the Prometheus that scrapes Ray."
    Console(stderr=True).print(
        how.format(command.file or "and paste it"), markup=False, highlight=False
    )


@dataclass(frozen=True)
class Cutouts:
    """Make a labelled data set for detection: cut-outs pasted on photos, and a COCO JSON.

    Cut-outs are images with a transparent background.
    """

    cutouts: str
    """Folder of images with a transparent background, in a folder for each class."""
    photos: str
    """Folder of photos to paste on."""
    output: str
    """Folder for images/ and annotations.json."""
    count: int = 600
    """Pictures to make."""
    classes: int = 6
    """Number of classes: the folders with the most cut-outs are taken."""
    seed: int = 0
    """Seed of the choice and the positions."""


def cutouts(command: Cutouts, console: Console) -> None:
    """Make a set of pictures with boxes.

    Raises:
        UsageError: there are no images to make them of, or the output exists.
    """
    from raypipe.data.cutouts import paste

    made = paste(**vars(command))
    console.print(
        f"{command.count} pictures, {len(made.cutouts)} cut-outs of {len(made.classes)} classes "
        f"({', '.join(made.classes)}) on {len(made.photos)} photos. To train on them: "
        f"--input {command.output}/images --annotations {command.output}/annotations.json",
        markup=False,
        highlight=False,
        soft_wrap=True,  # so that the flags can be copied from one line
    )


def manifest(command: Manifest, console: Console, job: Sequence[str] = ()) -> None:
    """Print a manifest for Kubernetes.

    Raises:
        UsageError: no Kubernetes could take it.
    """
    print(text(command.kind, job, jobs=JOBS), end="")


COMMANDS: dict[str, tuple[type, Callable[[Any, Console], None]]] = {
    "recipes": (Recipes, recipes),
    "report": (Report, report),
    "plan": (Plan, plan),
    "runs": (Runs, runs),
    "watch": (Watch, watch),
    "scale": (Scale, scale),
    "dashboard": (Dashboard, dashboard),
    "cutouts": (Cutouts, cutouts),
    "manifest": (Manifest, manifest),
}

JOBS = {
    "preprocess": ("raypipe.run.command", "Preprocess images, and report which stage limits."),
    "train": ("raypipe.train.command", "Train a detection model while images are preprocessed."),
    "predict": ("raypipe.run.command", "Say what is in images with a model that `train` made."),
    "sweep": ("raypipe.sweep.command", "Measure what the talk measured, and judge its claims."),
}
"""The jobs by name: the module whose function of that name does it, and what it does."""


def main(arguments: list[str] | None = None) -> int:
    """Run the `raypipe` command. Returns 0, 2 for bad arguments, or 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in JOBS:
        module, _ = JOBS[arguments[0]]
        return getattr(import_module(module), arguments[0])(
            arguments[1:], prog=f"raypipe {arguments[0]}"
        )
    job: list[str] = []
    if arguments[:1] == ["manifest"] and "--" in arguments:
        at = arguments.index("--")
        arguments, job = arguments[:at], arguments[at + 1 :]
    commands: dict[str, Callable[..., Any]] = {
        **{name: _listed(about) for name, (_, about) in JOBS.items()},
        **{name: kind for name, (kind, _) in COMMANDS.items()},
    }
    command: Any = tyro.extras.subcommand_cli_from_dict(
        commands, prog="raypipe", description=__doc__, args=arguments
    )
    try:
        if (server := _job_server(command)) is not None:
            from raypipe.run.live import jobserver

            return jobserver.do(server, _without_address(arguments))
        do = next(do for kind, do in COMMANDS.values() if isinstance(command, kind))
        (partial(do, job=job) if do is manifest else do)(command, Console())
        sys.stdout.flush()
    except UsageError as error:
        _fail(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `raypipe watch | head`: the reader has gone
        # Python flushes at exit, where nothing would catch the error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a store that does not answer, a folder that may not be read
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return 1
    return 0


def _job_server(command: Any) -> str | None:
    """The job server by way of which a command looks at runs; None: not by one."""
    if not isinstance(command, Runs | Watch | Scale):
        return None
    from raypipe.run.cluster.joining import is_job_server  # it imports Ray, as these commands do

    address = command.address or os.environ.get("RAY_ADDRESS")
    return address if is_job_server(address) else None


def _without_address(arguments: list[str]) -> list[str]:
    kept: list[str] = []
    for word in arguments:
        if kept and kept[-1] == "--address":
            kept.pop()
        elif not word.startswith("--address="):
            kept.append(word)
    return kept


def _fail(text: str) -> None:
    """Print an error in one line, which can be copied."""
    line = f"error: {printable(text, 4000)}"
    Console(stderr=True).print(line, style="red", markup=False, highlight=False, soft_wrap=True)


def _listed(about: str) -> Callable[[], None]:
    """What the list of commands shows of a job. Only its own module knows its flags."""

    def job() -> None: ...

    job.__doc__ = f"{about} `--help` after it lists its flags."
    return job


if __name__ == "__main__":
    sys.exit(main())
