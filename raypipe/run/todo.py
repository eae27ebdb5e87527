"""The rows that a run has to do: all of its source, less what the journal has.

Looking changes nothing. What a run changes in its output before it begins is in its claim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data import outputs, parts, sizes
from raypipe.data.listing import Listed, look
from raypipe.data.location import Location
from raypipe.data.work import (
    extend,
    make_work,
    named_as_before,
    remaining,
    renewed,
    requeued,
    wanted_by,
)
from raypipe.errors import UsageError
from raypipe.images.recipe import Recipe
from raypipe.run.cluster.machine import versions
from raypipe.run.result import check_report
from raypipe.run.settings import Decoding, Running, Source, check_free


def listed_for(recipe: Recipe, source: Source, *, limit: int | None) -> Listed:
    """List the images of a source that a recipe can use.

    Raises:
        UsageError: the source cannot be listed, or no image has the boxes that the recipe needs.
    """
    listed = look(
        source.input,
        annotations=source.annotations,
        labels=source.labels,
        limit=limit,
        seed=source.seed,
    )
    rows = wanted_by(listed.rows, needs_boxes=recipe.needs_boxes, drops_crowds=recipe.drops_crowds)
    if not rows.num_rows:
        raise UsageError(
            f"No image of {source.input!r} has boxes, which recipe {recipe.name} needs. "
            f"Give --annotations."
        )
    return replace(listed, rows=rows)


@dataclass(frozen=True, kw_only=True)
class Todo:
    """What a run has to do.

    work: all rows (schema WORK).
    left: rows that are not in the journal.
    image_ids: the ids in `work` of the images of the source, in the source's order.
    endings: files of the output that are written when all shards are done.
    claim: what the run changes in the output before it begins; None: nothing is written.
    shard_bytes: memory that an actor takes for the largest shard, as far as known.
    skipped: number of files that the listing left out, by suffix.
    cut: how rows are cut into shards, as `requeued` takes it.
    classes: the name of each label from 0 on; empty: not known.
    part: of the work; None: all of it.
    whole: rows of all parts (schema WORK); None: `work` has them.
    """

    recipe: Recipe
    work: pa.Table
    left: pa.Table
    image_ids: pa.ChunkedArray
    endings: tuple[str, ...] = ()
    claim: outputs.Claim | None = None
    shard_bytes: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    cut: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    part: parts.Part | None = None
    whole: pa.Table | None = None


@dataclass(frozen=True, kw_only=True)
class Results:
    """The results of a job.

    root: the output; None: nothing is written.
    decides: what decides the results, as JSON types. An output with other settings is refused.
    names: names of the results (`outputs.Made`).
    endings: files of the output that are written when all shards are done.
    part: of the work; `root` has its state.
    """

    root: Location | None
    decides: dict[str, Any]
    names: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    part: parts.Part | None = None


def left_to_do(
    recipe: Recipe,
    source: pa.Table,
    results: Results,
    *,
    decoding: Decoding,
    running: Running,
    skipped: Mapping[str, int] | None = None,
    classes: tuple[str, ...] = (),
) -> Todo:
    """Cut the images of `source` (schema SOURCE) into shards, less what earlier runs have done.

    Changes nothing.

    Args:
        skipped: number of files that the listing left out, by suffix.
        classes: the name of each label from 0 on; empty: not known.

    Raises:
        UsageError: the output is of another run, or cannot be used.
    """
    check_report(running.report)
    shape = sizes.cut(
        recipe,
        images=source.num_rows,
        rows=running.shard_rows,
        backend=decoding.backend,
        memory=decoding.memory,
        max_pixels=decoding.max_pixels,
    )
    cut: dict[str, Any] = {**shape.arguments, "taper": running.shard_rows is None}
    claim = whole = None
    if results.root is None:
        work = left = make_work(source, **cut)
    elif results.part is not None:
        whole = make_work(source, **cut)
        work, left, claim = _part_of(
            source, whole, results, results.root, results.part, cut=cut, resume=running.resume
        )
    else:
        source, work, left, claim = _resumed(
            source, results, results.root, cut=cut, resume=running.resume
        )
    return Todo(
        recipe=recipe,
        work=work,
        left=left,
        image_ids=source.column("image_id"),
        endings=results.endings,
        claim=claim,
        shard_bytes=shape.need,
        skipped=skipped or {},
        cut=cut,
        classes=classes,
        part=results.part,
        whole=whole,
    )


def _part_of(
    source: pa.Table,
    whole: pa.Table,
    results: Results,
    root: Location,
    part: parts.Part,
    *,
    cut: dict[str, Any],
    resume: bool,
) -> tuple[pa.Table, pa.Table, outputs.Claim]:
    """Compare a part of the table `whole` with what is in the output `root`.

    Arguments and result are those of `_resumed`. The table stays as it was when the first part
    began: a change of it is refused.
    """
    table = parts.Table.of_work(whole, parts=part.of, settings=results.decides)
    found = outputs.look(root, results.decides, resume=resume)
    parts.check(root, part, table)
    mine = part.rows(whole)
    if not mine.num_rows:
        raise UsageError(
            f"The input has {len(pc.unique(whole.column('shard')))} shards, so there is nothing "
            f"for --part {part}. Give fewer parts, or smaller shards (--shard-rows)."
        )
    work = mine
    if found.work is not None:
        waiting = requeued(found.work, found.waiting, tight=found.tight, every=part.of, **cut)
        work = renewed(waiting, source, found.done)
    else:
        ours = set(outputs.owned(root)[0]) if found.clearing else set()
        # The last of the parts writes the endings, so they may be there if others are.
        endings = () if parts.there(root) else results.endings
        check_free(root, [*endings, *outputs.named(results.names, mine)], ours=ours)
    return work, remaining(work, found.done), _claim(root, results, found, work, table=table)


def _claim(
    root: Location,
    results: Results,
    found: outputs.Found,
    work: pa.Table,
    *,
    table: parts.Table | None = None,
) -> outputs.Claim:
    """What a run that has to do `work` changes in the output where it `found` that."""
    return outputs.Claim(
        root=root,
        clears=found.clearing,
        made=outputs.Made(
            settings=results.decides,
            versions=versions(),
            results=results.names,
            endings=results.endings,
        ),
        work=None if found.work is not None and work.equals(found.work) else work,
        seen=found.seen,
        table=table,
    )


def _resumed(
    source: pa.Table, results: Results, root: Location, *, cut: dict[str, Any], resume: bool
) -> tuple[pa.Table, pa.Table, pa.Table, outputs.Claim]:
    """Compare the images of `source` (schema SOURCE) with what is in the output `root`.

    Args:
        cut: arguments of `make_work`.
        resume: False: what is there will be deleted.

    Returns:
        `source` with the ids of earlier runs, all its rows and the rows that are left (schema
        WORK), and what the run changes in the output.
    """
    parts.check(root, None, None)
    found = outputs.look(root, results.decides, resume=resume)
    stored, done = found.work, found.done
    if stored is None:
        work = here = make_work(source, **cut)
        wanted = [*results.endings, *outputs.named(results.names, work)]
    else:
        source = named_as_before(source, stored)
        stored = requeued(stored, found.waiting, tight=found.tight, **cut)
        work = extend(renewed(stored, source, done), source, **cut)
        here = work.filter(among(work, source))
        fresh = work.filter(pc.invert(among(work, stored)))
        wanted = [*outputs.named(results.names, fresh)]
    check_free(root, wanted, ours=set(outputs.owned(root)[0]) if found.clearing else set())
    return source, here, remaining(here, done), _claim(root, results, found, work)


def among(rows: pa.Table, others: pa.Table) -> pa.ChunkedArray:
    """Whether each of `rows` is of an image that is in `others`."""
    return pc.is_in(rows.column("image_id"), others.column("image_id").combine_chunks())
