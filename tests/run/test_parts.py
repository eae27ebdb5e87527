"""One input, done by several drivers: `--part K/N`."""

import json
import shutil

import pytest

from raypipe import UsageError
from raypipe.cli import main
from raypipe.data import journal, lease
from raypipe.data.location import Location
from raypipe.data.parts import Part, Table, there
from raypipe.data.work import make_work, requeued, shards
from raypipe.run.preprocess import plan, run, verdict_on
from tests.conftest import files
from tests.data.test_work import names, source
from tests.support.labelled import make_labelled
from tests.support.runs import quiet, settings


@pytest.mark.parametrize("text", ["0/8", "9/8", "3", "3/", "/8", "-1/8", "a/b", "3/8/2", "1/0"])
def test_a_part_that_there_is_none_of_is_refused(text):
    with pytest.raises(UsageError, match="such as 3/8"):
        Part.parse(text)


def test_parts_divide_the_shards_and_new_shards_stay_apart():
    work = make_work(source(*names(100)), rows_per_shard=3)
    parts = [Part(4, number) for number in (1, 2, 3, 4)]
    held = [set(part.rows(work).column("shard").to_pylist()) for part in parts]
    assert sorted(shard for shards_ in held for shard in shards_) == list(range(34))
    mine = parts[2].rows(work)
    again = {10: {"n030.jpg", "n031.jpg"}, 2: {"n008.jpg"}}
    moved = requeued(mine, again, rows_per_shard=1, every=4)
    assert sorted(moved.column("image_id").to_pylist()) == sorted(
        mine.column("image_id").to_pylist()
    )
    assert all(shard % 4 == 2 for shard in moved.column("shard").to_pylist())
    new = set(moved.column("shard").to_pylist()) - held[2]
    assert len(new) == 3 and min(new) > 33 and sum(1 for _ in shards(moved)) >= 3


@pytest.fixture(scope="module")
def divided(session, tmp_path_factory):
    """45 labelled photos, one of them corrupt: done whole, and in three parts. Never change it."""
    root = make_labelled(tmp_path_factory.mktemp("parts"))
    given = {
        "input": root / "photos",
        "annotations": root / "boxes.json",
        "max_reject_fraction": 0.2,
        "shard_rows": 4,
    }
    run(settings(**given, output=root / "whole"), console=quiet())
    first_two = root / "first-two"
    for number in (1, 2):
        wanted = settings(**given, output=first_two, part=f"{number}/3")
        assert verdict_on(run(wanted, console=quiet()), wanted) is None
    assert not (first_two / "annotations").exists()
    shutil.copytree(first_two, root / "out")
    last = settings(**given, output=root / "out", part="3/3")
    run(last, console=quiet())
    return root, given


@pytest.mark.xdist_group("parts")
def test_the_results_of_all_parts_are_those_of_one_run(divided, capsys):
    root, given = divided
    assert files(root / "out") == files(root / "whole") and len(files(root / "whole")) == 45
    out = Location.of(str(root / "out"))
    assert there(out) == [Part(3, 1), Part(3, 2), Part(3, 3)]
    reports = [
        json.loads((root / f"out/_raypipe/part-{n}-of-3/report.json").read_text())
        for n in (1, 2, 3)
    ]
    assert sum(report["images_in"] for report in reports) == 45
    assert sum(report["images_rejected"] for report in reports) == 1
    assert [report["settings"]["part"] for report in reports] == ["1/3", "2/3", "3/3"]
    console = quiet()
    again = settings(**given, output=root / "out", part="2/3")
    assert run(again, console=console).report is None
    assert "Nothing to do: all" in console.file.getvalue()
    assert main(["report", str(root / "out")]) == 0
    told = capsys.readouterr().out
    assert "45" in told and "44" in told and "part-3-of-3 " in told
    assert main(["report", str(root / "out"), str(root / "whole")]) == 0
    assert "90" in capsys.readouterr().out  # both, as asked for
    assert main(["report", str(root / "first-two")]) == 0
    capsys.readouterr()


@pytest.mark.xdist_group("parts")
def test_what_would_mix_with_parts_is_refused_and_changes_nothing(divided, tmp_path):
    root, given = divided
    out = tmp_path / "out"
    shutil.copytree(root / "first-two", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def refused(match: str, **other) -> None:
        with pytest.raises(UsageError, match=match):
            plan(settings(**(given | {"output": out} | other)))

    refused("is being made in 3 parts, and a run of all")
    refused("is being made in 3 parts, and --part is 1/2", part="1/2")
    refused("another table of shards .*: 30 images, 45 then", part="3/3", limit=30)
    refused("another table of shards .*: 45 images, 45 then", part="3/3", shard_rows=5)
    refused("made with other settings", part="2/3", quality=80)
    refused("has begun with other settings", part="3/3", quality=80)
    refused("run without --part", part="2/3", output=root / "whole")
    refused("--part 2/3 is for runs that write", part="2/3", output=None)
    refused("so there is nothing for --part 30/40", part="30/40", output=tmp_path / "new")
    # A part whose lease somebody has.
    place = Part(3, 2).state(Location.of(str(out)))
    with lease.hold(place, run_id="other", option="--output"):
        refused("another driver", part="2/3")
        assert plan(settings(**given, output=out, part="3/3")).left.num_rows > 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.xdist_group("parts")
def test_a_part_starts_again_alone(divided, tmp_path):
    root, given = divided
    out = tmp_path / "out"
    shutil.copytree(root / "out", out)
    wanted = settings(**given, output=out, part="2/3", resume=False)
    others = [Part(3, n).state(Location.of(str(out))) for n in (1, 3)]
    before = [journal.done_shards(other) for other in others]
    assert run(wanted, console=quiet()).report is not None
    assert [journal.done_shards(other) for other in others] == before
    assert files(out) == files(root / "whole")


def test_the_table_of_parts_is_that_of_their_images_and_shards():
    def table(of: list[str], rows: int) -> Table:
        work = make_work(source(*of), rows_per_shard=rows)
        return Table.of_work(work, parts=2, settings={})

    same = table(names(20), 3)
    assert same == table(names(20), 3)
    for other in (table(names(19), 3), table(names(20), 4), table(names(20)[::-1], 3)):
        assert other.digest != same.digest
