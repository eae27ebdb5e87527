"""What the talk claims, as rows, and what became of each in a sweep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from raypipe.sweep import rules, training_rules
from raypipe.sweep.curves import FIXED_TIMES, Record, Where, decides, enough_images
from raypipe.sweep.rules import CLOSED, FALLS, FLAT, FULL, HELD_UP, POINTS, Holds, Part, Sweep


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the talk: its number, when it is said, and the rule by which it is judged.

    `rule` says in words what `judge` does.
    """

    number: int
    at: str
    statement: str
    rule: str
    judge: Callable[[Sweep], Mapping[str, Part]]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of a claim here."""

    claim: int
    at: str
    statement: str
    holds: Holds
    measured: str
    why: str


_FALLS = f"Falls: slope of log time at most {FALLS:g}, up to where the cores are full"
_FLAT = f"Flat: slope within {FLAT:g} of 0"

CLAIMS = (
    Claim(
        number=5,
        at="11:10",
        statement="Preprocessing only: time falls as processes rise, with both libraries.",
        rule=_FALLS,
        judge=rules.falls_alone,
    ),
    Claim(
        number=6,
        at="11:31",
        statement="Preprocessing only: OpenCV's CPU use is far above torchvision's, and reaches "
        "about 100%.",
        rule=f"Far above: by more than {POINTS:g} points of CPU, mean of the counts up to the "
        f"cores. About 100%: {FULL:g}% or more",
        judge=rules.far_above,
    ),
    Claim(
        number=7,
        at="11:57",
        statement="With one result queue that writes files: time stays flat as processes rise.",
        rule=f"{_FLAT}, of the counts at which the writer limits",
        judge=rules.flat_with_one,
    ),
    Claim(
        number=8,
        at="12:21",
        statement="... and CPU use stays at about 80% (OpenCV): the CPU cannot be made the most "
        "of.",
        rule=f"Stays: within {POINTS:g} points, and more than that below preprocessing only; "
        "the level itself is the machine's",
        judge=rules.cpu_stays_with_one,
    ),
    Claim(
        number=9,
        at="12:55",
        statement="The cause: output is slower than preprocessing, the one result queue fills up.",
        rule=f"The verdict names the write stage, and preprocess actors are held up {HELD_UP:.0%} "
        "of the time or more: blocked, or done before the writer",
        judge=rules.held_up_by_one,
    ),
    Claim(
        number=10,
        at="13:36",
        statement="With as many queues as processes: time falls, with both libraries.",
        rule=_FALLS,
        judge=rules.falls_with_writers,
    ),
    Claim(
        number=11,
        at="14:20",
        statement="10 processes: with 10 queues time comes close to preprocessing only; with one "
        "it does not.",
        rule=f"Close: {CLOSED:.0%} of the time that one writer adds is gone with as many writers "
        "as actors",
        judge=rules.gap_closed,
    ),
    Claim(
        number=12,
        at="14:50",
        statement="CPU use over queues = processes: torchvision's rises, OpenCV's stays at about "
        "100%.",
        rule=f"Rises: by more than {POINTS:g} points. About 100%: {FULL:g}% or more wherever "
        "actors and writers together are as many as the cores",
        judge=rules.rises_or_full,
    ),
    Claim(
        number=13,
        at="15:33",
        statement="With as many queues as processes, CPU use comes close to that of preprocessing "
        "only.",
        rule=f"Close: within {POINTS:g} points, with the most actors",
        judge=rules.close_to_alone,
    ),
    Claim(
        number=14,
        at="15:50",
        statement="OpenCV saturates the CPU at 10 processes: use torchvision where many processes "
        "are available, OpenCV where few are.",
        rule="By the times measured without writing, with the fewest and with the most actors; "
        "more than a tenth counts",
        judge=rules.few_or_many,
    ),
    Claim(
        number=17,
        at="17:52",
        statement="Training on 1 GPU: total time stays flat as processes rise.",
        rule=_FLAT,
        judge=training_rules.training_flat,
    ),
    Claim(
        number=18,
        at="18:27",
        statement="GPU use for training is far above CPU use for preprocessing: training takes "
        "the time.",
        rule=f"Far above: by more than {POINTS:g} points, and the verdict names the train stage",
        judge=training_rules.training_limits,
    ),
    Claim(
        number=19,
        at="18:55",
        statement="1 process, more GPUs for training: total time falls.",
        rule=_FALLS,
        judge=training_rules.training_falls,
    ),
    Claim(
        number=20,
        at="19:30",
        statement="Add GPUs for training; do not spend GPU on preprocessing.",
        rule="By the planner: what one more GPU brings to training, against preprocessing that "
        "costs nothing at all",
        judge=training_rules.gpu_for_training,
    ),
    Claim(
        number=21,
        at="20:25",
        statement="Preprocess and train in one go where data is new each time; preprocess once "
        "and store it where the same data is trained on often.",
        rule="From how many epochs on storing has won, by CPU time and by the clock with a "
        "training as fast as data comes",
        judge=training_rules.storing_pays,
    ),
)
"""Each claim that a sweep can judge, in the talk's order."""


def findings(records: Sequence[Record], where: Where) -> list[Finding]:
    """What became of each claim. Cells that are too short (`curves.decides`) decide none."""
    long = [record for record in records if decides(record)]
    short = too_short(records)
    found = []
    for claim in CLAIMS:
        finding = _finding(claim, Sweep(records=long, where=where))
        if short and finding.holds == "cannot":
            before = _finding(claim, Sweep(records=records, where=where))
            if before.holds != "cannot":
                finding = _undecided(before, short)
        found.append(finding)
    return found


def _finding(claim: Claim, sweep: Sweep) -> Finding:
    """The parts of a claim as one: it holds if each does, and does not if one does not."""
    parts = claim.judge(sweep)
    verdicts = {part.holds for part in parts.values()}
    holds: Holds = "no" if "no" in verdicts else "cannot" if "cannot" in verdicts else "yes"
    measured = "; ".join(
        f"{name}: {part.measured}" if name else part.measured
        for name, part in parts.items()
        if part.measured
    )
    whys = [
        f"{name}: {part.why}" if len(parts) > 1 else part.why
        for name, part in parts.items()
        if part.why
    ]
    if len({part.why for part in parts.values()}) == 1 and whys:
        whys = [next(iter(parts.values())).why]
    return Finding(
        claim=claim.number,
        at=claim.at,
        statement=claim.statement,
        holds=holds,
        measured=measured,
        why=". ".join([*whys, claim.rule]),
    )


def _undecided(judged: Finding, why: str) -> Finding:
    """A claim that only cells which are too short would decide."""
    return Finding(
        claim=judged.claim,
        at=judged.at,
        statement=judged.statement,
        holds="cannot",
        measured=judged.measured,
        why=f"{why} {judged.why}",
    )


def too_short(records: Sequence[Record]) -> str:
    """That some cells decide no claim, and which --limit would; empty where all are long enough."""
    short = [record for record in records if not decides(record)]
    if not short:
        return ""
    return (
        f"{len(short)} of {len(records)} cells decide no claim: shorter than {FIXED_TIMES:g} times "
        "what a run of that shape spends before its first image and after its last. "
        f"--limit {enough_images(short)} would be enough."
    )
