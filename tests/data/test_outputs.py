import pytest

from raypipe import UsageError
from raypipe.data import journal, outputs
from raypipe.data.journal import Entry, Unread
from raypipe.data.listing import list_images
from raypipe.data.location import Location
from raypipe.data.outputs import Made
from raypipe.data.work import make_work


def test_other_settings_are_refused_with_each_difference_shown(tmp_path):
    root = Location.of(str(tmp_path))
    assert outputs.check_settings(root, {"recipe": "coco-300"}) is False
    outputs.put_made(root, Made(settings={"recipe": "coco-300", "seed": 1}, versions={"ray": "2"}))
    assert outputs.check_settings(root, {"recipe": "coco-300", "seed": 1}) is True
    with pytest.raises(UsageError) as caught:
        outputs.check_settings(root, {"recipe": "coco-1200", "seed": 1})
    assert "recipe: 'coco-300' there, 'coco-1200' now" in str(caught.value)
    assert "seed" not in str(caught.value)
    assert "--no-resume" in str(caught.value)


def test_clear_deletes_what_the_journal_names_and_nothing_else(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"result")
    (tmp_path / "mine.jpg").write_bytes(b"the user's own")
    (tmp_path / "all.json").write_bytes(b"result")
    outputs.put_made(Location.of(str(tmp_path)), Made(settings={}, endings=("all.json",)))
    journal.put_entry(
        Location.of(str(tmp_path)),
        Entry(epoch=0, shard=3, written=[], rejected=[], files=["a.jpg"], bytes=6),
    )
    outputs.clear(Location.of(str(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jpg"]


def test_a_look_finds_what_is_there_by_one_read_of_run_json(tmp_path, monkeypatch):
    root = Location.of(str(tmp_path))
    work = make_work(list_images("demo:4"), rows_per_shard=2)
    outputs.put_made(root, Made(settings={"recipe": "coco-300"}))
    journal.put_work(root, work)
    lost = Unread(image_id=work["image_id"][0].as_py(), uri="", detail="HTTP 503")
    journal.put_entry(
        root,
        Entry(epoch=0, shard=0, written=[], rejected=[], files=[], bytes=0, unread=[lost]),
    )
    opened = []
    real = open

    def counted(file, *args, **kwargs):
        opened.append(str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", counted)
    found = outputs.look(root, {"recipe": "coco-300"})
    monkeypatch.undo()
    assert found.done == {0} and found.waiting == {0: {lost.image_id}} and found.work == work
    assert found.made == Made(settings={"recipe": "coco-300"})
    assert sum(path.endswith("run.json") for path in opened) == 1
    assert outputs.look(root, {"recipe": "coco-1200"}, resume=False).clearing
