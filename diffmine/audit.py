"""A run folder -> how far it is, and whether it is whole. Only reads, and needs no Ray."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from shlex import quote
from typing import Any

from diffmine.config import Config
from diffmine.configfile import load
from diffmine.errors import InputError, StoreError
from diffmine.pipeline import STAGES, Stage, wanted
from diffmine.preflight import reachable
from diffmine.progress import duration
from diffmine.run import FAILING_STAGES, Run
from diffmine.store import at_once

_LISTED = 10  # failures that are listed one by one
_LONGEST = 160  # characters of a listed failure
_ROWS = {  # stage -> what a row of its table is
    "manifest": "images",
    "latents": "images",
    "typicality": "maps",
    "patches": "patches",
    "features": "patches",
    "clusters": "clusters",
    "localisation": "maps",
    "report": "files",
}


def open_run(uri: str) -> tuple[Run, Config]:
    """A run folder and its config.

    Raises:
        InputError: there is no run, or its store refuses to say.
    """
    run = reachable(uri)
    if not run.exists("run.yaml"):
        raise InputError(f"{uri}: no run here; looked for run.yaml, which is written after the manifest")
    return run, load(f"{run.uri}/run.yaml", [f"--output={run.uri}"])


# ------------------------------------------------------------------------------------------------------------- status


def status(run: Run, config: Config, price: float | None = None) -> Iterator[str]:
    """Lines: each stage with what is done, its speed and time; failures by reason, and the first; time and cost.

    The time is that of what is there, so a stage that was continued counts since its last start. Of a stage that is not
    finished, the time from its first part to its last counts, with any pause between them.

    Args:
        price: of the machines of the run for an hour.
    """
    manifest = run.committed("manifest") or {"rows": 0, "shard_images": 1}  # none while it is made anew
    seconds = 0.0
    yield run.uri
    for stage in wanted(config):
        marker = run.committed(stage.folders[0])
        done, spent = (_done(stage, marker), marker["wall_s"]) if marker else _so_far(run, config, stage, manifest)
        seconds += spent
        yield f"  {stage.name:<13}{done}"
    yield from _failures(run)
    cost = f"; cost {seconds / 3600 * price:.2f} at {price:g} an hour" if price else ""
    yield f"time of what is there, without attempts that were cut off: {duration(seconds)}{cost}"


def _failures(run: Run) -> Iterator[str]:
    """How many images failed, by reason, and the first of them. Of a million failures a few parts are read."""
    reasons = sum((_reasons(run, stage) for stage in FAILING_STAGES), Counter[str]())
    if not reasons:
        return
    yield f"failures: {', '.join(f'{reason} {count:,}' for reason, count in reasons.most_common())}"
    listed = [*islice(((stage, row) for stage in FAILING_STAGES for row in _failed(run, stage)), _LISTED)]
    for stage, row in listed:
        yield _plain(f"  {row['image_id']}: {row['reason']} in {stage}, {row['detail']}")
    if more := reasons.total() - len(listed):
        yield f"  and {more:,} more; failures/*/*.parquet has all"
    yield f"  once they are mended: diffmine retry-failed {quote(run.uri)}"


def _reasons(run: Run, stage: str) -> Counter[str]:
    """Reason -> images of a stage that failed: of a finished one its marker tells, else its parts are read."""
    marker = run.committed(stage) or {}
    if "reasons" in marker:
        return Counter(marker["reasons"])
    return Counter(run.table(f"failures/{stage}", ["reason"])["reason"].to_pylist())


def _failed(run: Run, stage: str) -> Iterator[dict[str, str]]:
    """Failures of a stage, read part by part as they are asked for."""
    for part in run.parts(f"failures/{stage}"):
        yield from run.read_part(f"failures/{stage}", part).to_pylist()


def _plain(text: str) -> str:
    """One line of a terminal, whatever the names of images hold."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _done(stage: Stage, marker: dict[str, Any]) -> str:
    """A finished stage. Its speed is that of what was done since its last start, as `mine` gave it."""
    unit, seconds = _ROWS.get(stage.name, "steps"), marker["wall_s"]
    failed = f", {marker['failures']:,} failed" if marker.get("failures") else ""
    newly, of = marker["newly_done"], "images" if stage.name == "typicality" else unit
    speed = f", {newly / seconds:.3g} {of}/s" if newly and seconds >= 1 else ""
    return f"done      {marker.get('rows', marker.get('steps', 0)):>11,} {unit}{failed} in {duration(seconds)}{speed}"


def _so_far(run: Run, config: Config, stage: Stage, manifest: dict[str, Any]) -> tuple[str, float]:
    """What there is of a stage that is not finished, and the seconds that it took."""
    if stage.name == "finetune":
        steps = [int(n[5:]) for n in run.names("checkpoints") if n.startswith("step-")]
        begun = "begun, no checkpoint yet" if run.begun("finetune") is not None else ""
        reached = f"checkpoint at step {max(steps):,} of {config.finetune.asked}" if steps else begun
        return f"not done  {reached}".rstrip(), _span(run, "checkpoints")
    folder = stage.folders[0]
    parts, size = len(run.parts(folder)), manifest["shard_images"]
    if not parts:
        return "not done", 0.0
    seconds, shards = _span(run, folder), -(-manifest["rows"] // size)
    images = (parts - 1) * size  # the first was there when the clock began
    speed = f", about {images / seconds:.3g} images/s" if seconds >= 1 and images else ""
    return f"not done  {parts:,} of {shards:,} shards{speed}", seconds


def _span(run: Run, folder: str) -> float:
    """Seconds between the oldest and the newest file of a folder."""
    times = run.times(folder).values()
    return max(times) - min(times) if times else 0.0


# ------------------------------------------------------------------------------------------------------------- verify


def verify(run: Run) -> list[str]:
    """What is wrong with the committed stages; nothing for a whole run.

    Every file that a marker names is read again: its digest, and for tables that their rows add up to the marker's.
    Every image must be one result or one failure of each stage that walks images.
    """
    problems: list[str] = []
    markers = {stage.name: m for stage in STAGES if (m := run.committed(stage.folders[0])) is not None}
    for name, marker in markers.items():
        found = at_once(lambda item: _check(run, *item), sorted(marker["files"].items()))
        problems += [f"{name}: {problem}" for problem in found if problem]
    if not problems:
        problems += _count(run, markers)
    return problems


def not_done(run: Run, config: Config) -> list[str]:
    """Stages that are wanted and not finished."""
    return [stage.name for stage in wanted(config) if run.committed(stage.folders[0]) is None]


def _check(run: Run, name: str, digest: str) -> str | None:
    """What is wrong with a file."""
    if not run.exists(name):
        return f"{name} is missing"
    try:
        return None if run.digest(name) == digest else f"{name} holds other bytes than were committed"
    except StoreError as error:
        return str(error)


def _count(run: Run, markers: dict[str, dict[str, object]]) -> Iterator[str]:
    """Rows that do not add up."""
    for name in ("manifest", "latents", "typicality", "patches", "clusters", "localisation"):
        if name in markers and (rows := sum(_rows(run, name))) != markers[name]["rows"]:
            yield f"{name}: {rows:,} rows, where {markers[name]['rows']:,} were committed"
    for name, before in (("latents", "manifest"), ("typicality", "latents")):
        if name in markers and before in markers:
            given, results = _ids(run, before), _ids(run, name)
            failed = set(run.table(f"failures/{name}", ["image_id"])["image_id"].to_pylist())
            if lost := given - results - failed:
                yield f"{name}: {len(lost):,} images are neither a result nor a failure, such as {min(lost)}"
            if both := results & failed:
                yield f"{name}: {len(both):,} images are a result and a failure, such as {min(both)}"


def _rows(run: Run, table: str) -> list[int]:
    return at_once(lambda part: run.part_rows(table, part), run.parts(table))


def _ids(run: Run, table: str) -> set[str]:
    """As its parts tell, and not an index of them."""
    read = at_once(lambda part: run.read_part(table, part, ["image_id"]), run.parts(table))
    return {image_id for part in read for image_id in part["image_id"].to_pylist()}
