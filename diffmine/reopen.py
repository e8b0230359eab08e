"""Failures of a run -> their shards opened again, so that the next `mine` tries them once more."""

import json
from collections.abc import Collection

from diffmine.run import FAILING_STAGES, INDEXED, MARKER, Run, index_name, part_name
from diffmine.store import at_once

_INTENT = "_reopened.json"  # what is about to be removed; gone when that is done
_REMADE = ("patches", "features", "clusters", "localisation", "report")  # stages that look at all images


def reopen(run: Run, unread: Collection[int] | None = None) -> None:
    """Remove shards that hold failures, and what was made from all images.

    The finetuned model stays: it was trained on the images that could be read then. What is to be removed is written
    down first, so that `finish_reopening` can end a removal that was cut off.

    Args:
        unread: the shards with images that could not be read, of which some can be read now; None: all with failures.
    """
    finish_reopening(run)
    run.replace(_INTENT, json.dumps(_to_remove(run, unread)).encode())
    finish_reopening(run)


def _to_remove(run: Run, unread: Collection[int] | None) -> tuple[list[str], list[str]]:
    """What goes first, in order, and what goes then.

    Markers are first, the last stage's before all: no stage looks done while its inputs are taken away.
    """
    shards: dict[str, Collection[int]] = {stage: run.parts(f"failures/{stage}") for stage in FAILING_STAGES}
    if unread is not None:
        shards = {"latents": sorted(unread), "typicality": []}
    again = {*shards["latents"], *shards["typicality"]}  # typicality reads latents
    shards["typicality"] = sorted({*again, *run.parts("typicality")} if run.exists("rounds") else again)  # all raced
    markers = [f"{stage}/{MARKER}" for stage in (*_REMADE[::-1], *FAILING_STAGES[::-1])]
    names: list[str] = []
    for stage in FAILING_STAGES:
        names += [part_name(table, shard) for shard in shards[stage] for table in (stage, f"failures/{stage}")]
    if run.committed("model") is None:  # other images to train on
        names += ["held_out", "checkpoints"]
    names += [*_REMADE, "members", "rounds", "failures/rounds"]
    return [*markers, *map(index_name, INDEXED)], names


def finish_reopening(run: Run) -> None:
    """Remove what a call of `reopen` wrote down and did not come to remove."""
    if run.exists(_INTENT):
        firsts, others = json.loads(run.read(_INTENT))
        for name in firsts:
            run.remove(name)
        at_once(run.remove, others)
        run.remove(_INTENT)
