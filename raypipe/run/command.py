"""The commands of the preprocess and the predict job: arguments in, exit status out."""

from rich.console import Console

from raypipe.insight.terminal import terminal
from raypipe.run import preprocess as preprocessing
from raypipe.run.console import attempt, ended, goes_on, say
from raypipe.run.settings import parse


def preprocess(
    arguments: list[str] | None = None,
    *,
    description: str | None = None,
    prog: str | None = None,
) -> int:
    """Preprocess images on Ray, and report what each stage cost and which one limits."""
    console = Console(stderr=True)
    settings = parse(
        preprocessing.Settings,
        arguments,
        description=description or preprocess.__doc__,
        prog=prog,
    )
    output, running = settings.writing.output, settings.running
    outcome = attempt(
        lambda: preprocessing.run(settings, console=console),
        kept=f"What is finished is in {output}." if output else "Nothing was kept.",
        again=goes_on(resume=running.resume) if output else "The same command starts again.",
        console=console,
    )
    if isinstance(outcome, int):
        return outcome
    if outcome.report is not None:
        Console().print(terminal(outcome.report))
        root = settings.writing.root
        state = output and root and f"{output}/{root.state}"
        for place in filter(None, (state, running.report)):
            say(console, f"report: {place}/report.html")
    return ended(preprocessing.verdict_on(outcome, settings), console=console)


def predict(
    arguments: list[str] | None = None,
    *,
    description: str | None = None,
    prog: str | None = None,
) -> int:
    """Find objects in images with a trained model, on Ray, and judge it if boxes are known."""
    # Preprocessing needs no torch, whose import takes 5 s of CPU.
    from raypipe.run import predict as predicting

    console = Console(stderr=True)
    settings = parse(
        predicting.Settings, arguments, description=description or predict.__doc__, prog=prog
    )
    output = settings.predicting.output
    outcome = attempt(
        lambda: predicting.run(settings, console=console),
        kept=f"What is finished is in {output}.",
        again=goes_on(resume=settings.running.resume),
        console=console,
    )
    if isinstance(outcome, int):
        return outcome
    if outcome.report is not None:
        Console().print(terminal(outcome.report))
        found = outcome.report["predict"]
        judged = ""
        if found["map"] is not None:
            judged = f"; mAP {found['map']:.3f} (at .50 {found['map50']:.3f}) by the known boxes"
        Console().print(f"{found['boxes']} boxes{judged}", highlight=False)
        say(
            console,
            f"predictions: {output}/{predicting.RESULTS}\nreport: {output}/_raypipe/report.html",
        )
    return ended(predicting.verdict_on(outcome, settings), console=console)
