"""A curator's words on clusters -> the run, and its report; nothing else is touched, and no image is opened."""

import hashlib
import json

from diffmine.errors import InputError
from diffmine.report.curation import Curation, check, parse, to_script
from diffmine.report.joined import cluster_ranks
from diffmine.run import Run
from diffmine.store import read_uri

KEPT = "curation.json"  # in the run's folder


def curate(run: Run, path: str) -> int:
    """Take the words of a file that the report exported into the run; on how many clusters there are words now.

    Raises:
        InputError: the run has no report, or the file does not fit it.
    """
    report = run.committed("report")
    if report is None:
        raise InputError(f"{run.uri} has no report yet; diffmine mine makes it")
    try:
        words = parse(read_uri(path), path)
    except OSError as error:
        raise InputError(f"--curation {path}: cannot be read: {error}") from error
    table = run.table("clusters")
    check(words, table, clusters_of(run), path)
    words = words.over(kept(run))
    run.replace(KEPT, words.dump())
    data = to_script(words, page_labels(run), cluster_ranks(table))
    run.replace("report/curation.js", data)
    run.commit("report", report, {**report["files"], "report/curation.js": hashlib.sha256(data).hexdigest()})
    return len(words.clusters)


def page_labels(run: Run) -> list[str | None]:
    """Labels of the report's pages, in their order; None for the page of clusters that hold all labels."""
    joint = None in run.table("clusters", ["label"])["label"].to_pylist()
    return [*([None] if joint else []), *sorted(set(run.table("patches", ["label"])["label"].to_pylist()))]


def clusters_of(run: Run) -> str:
    """Names the clusters that the run has now, by what their tables hold; "" where there are none.

    With the same settings there are others once images that could not be read are mended.
    """
    files = (run.committed("clusters") or {}).get("files", {})
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest() if files else ""


def kept(run: Run) -> Curation | None:
    """The words on the clusters that the run has now."""
    if not run.exists(KEPT):
        return None
    words = parse(run.read(KEPT), f"{run.uri}/{KEPT}")
    return words if words.clusters_of == clusters_of(run) else None
