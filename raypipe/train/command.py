"""The command of the train job: arguments in, exit status out."""

from rich.console import Console

from raypipe.insight.terminal import terminal
from raypipe.run.console import attempt, ended, goes_on, say
from raypipe.run.settings import parse
from raypipe.train.attempts import run
from raypipe.train.result import verdict_on
from raypipe.train.settings import Settings


def train(
    arguments: list[str] | None = None,
    *,
    description: str | None = None,
    prog: str | None = None,
) -> int:
    """Train a detection model on Ray while preprocess actors make the next batches."""
    console = Console(stderr=True)
    settings = parse(Settings, arguments, description=description or train.__doc__, prog=prog)
    storage = settings.training.storage
    outcome = attempt(
        lambda: run(settings, console=console),
        kept=f"Checkpoints are in {storage}.",
        again=goes_on(resume=settings.running.resume),
        console=console,
    )
    if isinstance(outcome, int):
        return outcome
    if outcome.report is not None:
        out = Console()
        out.print(terminal(outcome.report))
        trained = outcome.report["train"]
        judged = ""
        if trained["map"] is not None:
            judged = f"mAP {trained['map']:.3f} on the held-out images; "
        if trained["wait_share"] is not None:
            out.print(
                f"{judged}workers computed {100 * trained['accelerator_utilisation']:.0f}% and "
                f"waited for data {100 * trained['wait_share']:.0f}% of their time",
                highlight=False,
            )
            out.print(
                f"Preprocess once, or while training? {trained['break_even']['reason']}",
                highlight=False,
            )
        say(console, f"model: {outcome.checkpoint}\nreport: {storage}/_raypipe/report.html")
    return ended(verdict_on(outcome, settings), console=console)
