import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe import UsageError
from raypipe.data import journal
from raypipe.data.journal import Entry, Rejected, Written
from raypipe.data.location import Location


def entry(shard: int) -> Entry:
    return Entry(
        epoch=0,
        shard=shard,
        written=[
            Written(
                image_id="a",
                file="a.jpg",
                height=3,
                width=4,
                boxes=[[0.0, 0.0, 1.5, 2.0]],
                annotation_ids=[9],
            )
        ],
        rejected=[Rejected(image_id="b", uri="/b\n.jpg", reason="empty", detail="0 bytes")],
        files=["a.jpg"],
        bytes=17,
    )


def test_what_is_put_is_read_again_and_counts_as_done(tmp_path):
    root = Location.of(str(tmp_path))
    assert journal.done_shards(root) == set()
    journal.put_entry(root, entry(12))
    journal.put_entry(root, entry(3))
    journal.put_entry(root, entry(3))
    assert journal.done_shards(root) == {3, 12}
    assert list(journal.read_entries(root, [12, 3])) == [entry(12), entry(3)]
    assert entry(3).images == 2


def test_a_damaged_entry_is_named_with_the_remedy(tmp_path):
    journal.put_entry(Location.of(str(tmp_path)), entry(3))
    path = tmp_path / "_raypipe/journal/000000003.json"
    path.write_text(path.read_text()[:-5])
    with pytest.raises(
        UsageError, match=r"cannot read the journal entry .*000000003\.json: .* Delete that file"
    ):
        list(journal.read_entries(Location.of(str(tmp_path)), [3]))


def test_rejects_are_a_parquet_file_even_when_there_are_none():
    none, some = (
        pq.read_table(pa.BufferReader(journal.rejects_parquet(rows)))
        for rows in ([], entry(1).rejected)
    )
    assert none.schema.names == ["image_id", "uri", "reason", "detail"] and not none.num_rows
    assert some.to_pylist() == [
        {"image_id": "b", "uri": "/b\n.jpg", "reason": "empty", "detail": "0 bytes"}
    ]


def test_entries_are_plain_json(tmp_path):
    journal.put_entry(Location.of(str(tmp_path)), entry(3))
    assert (
        json.loads((tmp_path / "_raypipe/journal/000000003.json").read_text())["written"][0]["file"]
        == "a.jpg"
    )
