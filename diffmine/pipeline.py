"""config -> the run's URI: which stages there are, what each reads, which are fresh and which must run."""

import hashlib
import importlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from shlex import quote
from typing import Any

from diffmine import progress
from diffmine.config import Config
from diffmine.configfile import settings, to_yaml
from diffmine.errors import DiffmineError, InputError, StageError, StaleRunError
from diffmine.preflight import preflight, reachable
from diffmine.reopen import finish_reopening, reopen
from diffmine.report.text import summary
from diffmine.run import FAILING_STAGES, MARKER, SCHEMA_VERSION, Run


@dataclass(frozen=True)
class Stage:
    """A step of the run; its work is the function of the same name in `diffmine.stages.<name>`."""

    name: str
    keys: tuple[str, ...]  # what it reads of the config: a section, or a key of one
    inputs: tuple[str, ...]  # stages whose tables it reads
    folders: tuple[str, ...]  # what it writes; the first holds its marker
    unneeded: tuple[str, ...] = ()  # those of them that go when it is committed
    on_ray: bool = True
    version: int = 1  # raised when the same settings give another result than before


STAGES = (
    Stage(
        "manifest",
        ("seed", "dataset.source", "dataset.layout", "dataset.boxes", "dataset.split", "dataset.limit_per_label"),
        (),
        ("manifest", "toytown"),
        on_ray=False,
    ),
    Stage(
        "latents",
        (
            "dataset.image",
            "model.base",
            "model.dtype",
            "finetune.posterior",
            "compute.max_image_pixels",
            "compute.max_image_bytes",
        ),
        ("manifest",),
        ("latents",),
    ),
    Stage(
        "finetune",
        ("seed", "prompt", "model", "finetune", "dataset.finetune_split", "dataset.group_column"),
        ("latents",),
        ("model", "samples", "held_out", "checkpoints", "tensorboard"),
        ("checkpoints",),
    ),
    Stage(
        "typicality",
        ("seed", "prompt", "model", "typicality", "patches.size"),
        ("latents", "finetune"),
        ("typicality", "rounds"),
        version=2,  # pairs are mirrored in t, too
    ),
    Stage(
        "patches",
        ("seed", "patches"),
        ("typicality",),
        ("patches",),
        version=2,  # the contrast is scored again, too
    ),
    Stage("features", ("seed", "prompt", "model", "features"), ("patches", "finetune"), ("features",)),
    Stage(
        "clusters",
        ("seed", "clusters"),
        ("features",),
        ("clusters", "members"),
        version=2,  # ranked by contrast, where it chose the patches
    ),
    Stage("localisation", ("dataset.boxes", "patches.size"), ("typicality",), ("localisation",)),
    Stage(
        "report",
        ("report", "dataset.group_column"),
        ("clusters", "localisation"),
        ("report",),
        on_ray=False,
        version=2,  # hits are of annotated images
    ),
)
_BOXES = "dataset.boxes"  # kept in the manifest, where only localisation and what follows it look at them
# Settings of speed, not of results: never part of a fingerprint.
FREE_KEYS = {
    "finetune.workers", "finetune.checkpoint_every", "finetune.micro_batch", "finetune.gradient_checkpointing",
    "finetune.sharding", "finetune.compile", "finetune.trackers", "typicality.batch_size", "typicality.compile",
    "features.batch_size",
}  # fmt: skip


_OURS = re.compile(r"^diffmine\.errors\.(\w+): (.+)", re.MULTILINE)  # in the text of a traceback
_OF_TRAINING = ("finetune.", "dataset.finetune_split", "dataset.group_column")


def settings_of(stage: Stage, config: Config) -> dict[str, Any]:
    """What the stage reads of the config, as flat `section.key` -> value."""
    flat = _flatten(config.model_dump(mode="json"))
    read = {k: v for k, v in flat.items() if any(k == key or k.startswith(key + ".") for key in stage.keys)}
    if stage.name == "typicality" and config.typicality.racing:  # who leaves depends on how many are wanted
        read["patches.per_label"] = config.patches.per_label
    if stage.name == "finetune" and not config.dataset.finetune_split:
        read["dataset.group_column"] = None  # only the report reads it
    if not config.finetune.enabled:
        read = {k: v for k, v in read.items() if not k.startswith(_OF_TRAINING) or k == "finetune.enabled"}
    return {k: v for k, v in read.items() if k not in FREE_KEYS}


def fingerprints(config: Config) -> dict[str, str]:
    """Stage -> digest of the settings it reads, its inputs' fingerprints, its version and that of the tables."""
    prints: dict[str, str] = {}
    seen: dict[str, str] = {}  # by later stages
    for stage in STAGES:
        settings = settings_of(stage, config)
        inputs = [seen[i] for i in stage.inputs if i != "localisation" or _has_boxes(config)]
        prints[stage.name] = seen[stage.name] = _fingerprint(stage, settings, inputs)
        if stage.name == "manifest":
            seen["manifest"] = _fingerprint(stage, {**settings, _BOXES: None}, inputs)
    return prints


def _fingerprint(stage: Stage, settings: Mapping[str, Any], inputs: Sequence[str]) -> str:
    body = json.dumps([SCHEMA_VERSION, stage.version, settings, inputs], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def made_with(stage: str, config: Config) -> dict[str, Any]:
    """What the files of a stage depend on."""
    [one] = [one for one in STAGES if one.name == stage]
    return {"fingerprint": fingerprints(config)[stage], "settings": settings_of(one, config)}


def _has_boxes(config: Config) -> bool:
    return config.dataset.boxes is not None or config.dataset.layout == "toytown"


def wanted(config: Config) -> tuple[Stage, ...]:
    """The stages this config asks for."""
    asked = {
        "finetune": config.finetune.enabled,
        "localisation": _has_boxes(config),
        "report": config.report.enabled,
    }
    left_out = {name for name, on in asked.items() if not on}
    return tuple(stage for stage in STAGES if stage.name not in left_out)


def stale_stages(run: Run, config: Config) -> list[Stage]:
    """Stages of which there is something, finished or not, that other settings made.

    Raises:
        InputError: a folder has a stage's name, and is of no run.
    """
    prints, asked, stale = fingerprints(config), wanted(config), []
    for stage in STAGES:
        there = [folder for folder in stage.folders if run.exists(folder)]
        if not there:
            continue
        done = run.committed(stage.folders[0])
        was = done or run.begun(stage.name)
        if was is None and not run.exists("run.json"):
            raise InputError(f"output: {run.uri}/{there[0]} is there, and no run made it; choose another output")
        if (was is None or was["fingerprint"] != prints[stage.name]) and (done or stage in asked):
            stale.append(stage)
    return stale


def _written(value: Any) -> str:
    """As in a config, in its own letters."""
    return json.dumps(value, ensure_ascii=False)


def refuse(run: Run, config: Config, stale: list[Stage]) -> None:
    """
    Raises:
        StaleRunError: if any stage is stale; lists the changed keys and the stages they touch.
    """
    if not stale:
        return
    changes: dict[str, tuple[Any, Any]] = {}
    for stage in stale:
        now = settings_of(stage, config)
        was = (run.committed(stage.folders[0]) or run.begun(stage.name) or {"settings": now})["settings"]
        changes |= {k: (was.get(k), now.get(k)) for k in {*was, *now} if was.get(k) != now.get(k)}
    listed = "\n".join(
        f"  {key}: was {_written(old)}, is {_written(new)}" for key, (old, new) in sorted(changes.items())
    )
    raise StaleRunError(
        f"{run.uri} holds a run of another config.\n{listed or '  (its tables are of another version)'}\n"
        f"stages touched: {', '.join(stage.name for stage in stale)}\n"
        "Choose another output, restore the values above, or add --rerun to remove these stages and run them again."
    )


def remove(run: Run, stale: list[Stage]) -> None:
    """Remove stages. All markers go first, and what a stage was begun with last: a removal that is cut off is known."""
    for stage in stale:
        run.remove(f"{stage.folders[0]}/{MARKER}")
    for stage in stale:
        for folder in stage.folders:
            run.remove(folder)
            run.remove(f"failures/{folder}")
        run.remove(f"begun/{stage.name}.json")


def mine(config: Config, rerun: bool = False) -> str:
    """Run what is missing; the run's absolute URI or path.

    Raises:
        InputError: before a stage is begun; of a cluster's resources after the manifest, as the cluster is joined then.
        StageError, StoreError, NonFiniteError: a stage failed; what is committed stays, the same command continues.
    """
    # These import ray, which takes seconds: not before the config is known to be good.
    from diffmine.stages import session
    from diffmine.stages.manifest import annotate
    from diffmine.stages.room import require_own_device, require_training

    run = reachable(config.output)
    finish_reopening(run)
    stale, boxed = stale_stages(run, config), None
    if not rerun:
        refuse(run, config, stale)
    else:
        stale, boxed = _seen_in_dataset(run, config, stale)
    missing = [stage for stage in wanted(config) if stage in stale or run.committed(stage.folders[0]) is None]
    names, on_ray = {stage.name for stage in missing}, [stage for stage in missing if stage.on_ray]
    preflight(run, config, frozenset(names))
    if on_ray:
        require_own_device(config)
    _check_images(run, config, missing, stale)
    remove(run, stale)
    for stage in STAGES:
        if run.committed(stage.folders[0]) is not None:  # by a driver that may have ended with that
            _remove_unneeded(run, stage)
    context = session.Context(run, config, progress.Progress())
    if boxed is not None:
        annotate(context, boxed)
    if run.committed("manifest") is not None:
        _write_config(context)  # settings of speed may differ, and after `rerun` all that later stages read
    with ExitStack() as stack:
        for stage in missing:
            if stage.on_ray:
                stack.enter_context(session.connected(context))
            if stage in on_ray[:1] and "finetune" in names:
                require_training(config)  # before hours of latents
            if not _made_by_another(context, stage):
                _run_stage(context, stage)
    _say_what_was_found(context)
    return run.uri


def _made_by_another(context: Any, stage: Stage) -> bool:
    """Whether another job has made a stage since this one began, which may be hours ago.

    Raises:
        StaleRunError: it has made or begun it with other settings: their parts would mix.
    """
    run, done = context.run, context.run.committed(stage.folders[0])
    was = done or (run.begun(stage.name) if any(run.exists(folder) for folder in stage.folders) else None)
    if was is not None and was["fingerprint"] != made_with(stage.name, context.config)["fingerprint"]:
        raise StaleRunError(f"{run.uri}: another job has begun {stage.name} with other settings; end one of the two")
    if done is not None:
        context.progress.say(f"{stage.name}: another job has made it")
    return done is not None


def _seen_in_dataset(run: Run, config: Config, stale: list[Stage]) -> tuple[list[Stage], Any]:
    """What `rerun` makes again after a look at the dataset; and the dataset, if its images have other boxes only.

    Other images or labels: all that is there. Other boxes: what looks at boxes; the manifest stays, and is given them.
    Looking through a large dataset takes its time, so it is not done without `rerun`. One that is gone has not changed:
    what is made of latents does not need it.

    Raises:
        InputError: other boxes are asked for, and they or the images they belong to cannot be read.
    """
    was = run.committed("manifest")
    if was is None or config.dataset.layout == "toytown":
        return stale, None
    before, now = was["settings"].get(_BOXES), settings_of(STAGES[0], config)
    if was["fingerprint"] != _fingerprint(STAGES[0], {**now, _BOXES: before}, []):
        return stale, None
    from diffmine.data.manifest import scan

    there = [stage for stage in STAGES if any(run.exists(folder) for folder in stage.folders)]
    try:
        found = scan(config.dataset, seed=config.seed)
    except InputError:
        if before != now[_BOXES]:
            raise
        return stale, None
    old = run.table("manifest")
    if not found.table.drop_columns(["boxes"]).equals(old.drop_columns(["boxes"])):
        return there, None
    if before == now[_BOXES] and found.table.equals(old):
        return stale, None
    looking = [stage for stage in there if "localisation" in (stage.name, *stage.inputs) or stage in stale]
    return [stage for stage in looking if stage is not STAGES[0]], found


def _check_images(run: Run, config: Config, missing: list[Stage], stale: list[Stage]) -> None:
    """Refuse settings that do not fit the images, before stages are removed. A first manifest is checked as it is made.

    Raises:
        InputError
    """
    begins = {stage.name for stage in missing if stage in stale or run.begun(stage.name) is None}
    first = "manifest" in {stage.name for stage in missing}
    if not begins & {"manifest", "latents", "finetune", "typicality", "features"} or (first and not stale):
        return
    from diffmine.data.manifest import scan
    from diffmine.stages.manifest import check_dataset, check_model

    if not first:
        check_dataset(run.table("manifest"), config, check_model(config), "finetune" in begins)
    elif config.dataset.layout == "toytown":
        check_model(config)
    else:
        images = scan(config.dataset, seed=config.seed).table
        check_dataset(images, config, check_model(config), config.finetune.enabled)


def retry_failed(run: Run, config: Config, every: bool = False) -> str:
    """Try the images that failed again; the run's URI. A run of which no image can be used now is left as it is.

    Which of them can be read is found out before anything is removed. Whether numbers are finite now only the model
    can tell, and with the same settings they seldom are.

    Args:
        every: all shards with failures are opened again, without a look at the images.

    Raises:
        As `mine`.
    """
    from diffmine.stages import session

    finish_reopening(run)
    refuse(run, config, stale_stages(run, config))
    context = session.Context(run, config, progress.Progress())
    failed = {stage: run.parts(f"failures/{stage}") for stage in FAILING_STAGES}
    with ExitStack() as stack:
        unread: Mapping[int, int] | None = None if every else {}
        if failed["latents"] and not every:
            stack.enter_context(session.connected(context))
            unread = _readable_now(context)
        if unread or (every and any(failed.values())):
            preflight(run, config, frozenset(stage.name for stage in wanted(config)) - {"manifest", "finetune"})
            reopen(run, unread)
        elif all(run.committed(stage.folders[0]) for stage in wanted(config)):
            found = "no image that failed can be read now (--all also tries those that could)"
            context.progress.say(f"{found if any(failed.values()) else 'no image failed'}; the run is unchanged")
            return run.uri
        return mine(config)


def _readable_now(context: Any) -> dict[int, int]:
    from diffmine.stages.latents import readable_now

    try:
        found = readable_now(context)
    except Exception as error:
        raise _as_ours(error, "retry-failed") from error
    context.progress.finish(f"{sum(found.values()):,} of the images that could not be read can be read now")
    return found


def remake_report(run: Run, config: Config) -> None:
    """Make the report of a mined run again, with this version of diffmine.

    Raises:
        InputError: the run is not mined to its end.
    """
    [report] = [stage for stage in STAGES if stage.name == "report"]
    for stage in wanted(config):
        if stage.name in report.inputs and run.committed(stage.folders[0]) is None:
            raise InputError(f"{run.uri} has no {stage.name} yet; diffmine mine {quote(run.uri)}/run.yaml goes on")
    from diffmine.stages import session

    _run_stage(session.Context(run, config, progress.Progress()), report)


def _say_what_was_found(context: Any) -> None:
    from diffmine.stages.report import hits

    run = context.run
    report = f"{run.uri}/report/index.html" if run.exists("report/index.html") else None
    failed = sum((run.committed(stage) or {}).get("failures", 0) for stage in FAILING_STAGES)
    if failed:
        context.progress.say(
            f"{failed:,} image{'s' * (failed > 1)} could not be used: diffmine status {run.uri} says why"
        )
    made = run.committed("report") or {}  # of a large run, hits take a minute and more
    for line in summary(run.table("clusters"), made["hits"] if "hits" in made else hits(run), report):
        context.progress.say(line)


def _run_stage(context: Any, stage: Stage) -> None:
    """Do a stage's work and commit it."""
    from diffmine.stages import metrics, session

    run, start = context.run, time.monotonic()
    work = getattr(importlib.import_module(f"diffmine.stages.{stage.name}"), stage.name)
    if stage.inputs:  # the manifest is begun by its own stage, when the dataset was found to be good
        run.begin(stage.name, made_with(stage.name, context.config))
    try:
        result = work(context)
    except Exception as error:
        raise _as_ours(error, stage.name) from error
    marker = {
        "stage": stage.name,
        **made_with(stage.name, context.config),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wall_s": round(time.monotonic() - start, 2),
        "newly_done": result.newly,  # in that time
        **result.marker,
    }
    run.commit(stage.folders[0], marker, result.files)
    _remove_unneeded(run, stage)
    if stage.on_ray:
        metrics.count("diffmine_stage_seconds", stage.name, marker["wall_s"])
    if stage.name == "manifest":  # the first commit: from here on the folder is a run of this config
        _write_config(context)
        run.replace("run.json", json.dumps(session.describe(context), indent=1).encode())


def _remove_unneeded(run: Run, stage: Stage) -> None:
    """What a committed stage was made from, and nobody reads any more."""
    for folder in stage.unneeded:
        run.remove(folder)


def _write_config(context: Any) -> None:
    """The config that other commands find in the run folder; left alone where it is this one."""
    text = to_yaml(context.config).encode()
    if not context.run.exists("run.yaml") or context.run.read("run.yaml") != text:
        context.run.replace("run.yaml", text)


def _as_ours(error: BaseException, stage: str) -> DiffmineError:
    """The error of ours that Ray wrapped, or wrote down where an actor could not start, or a StageError that says what
    happened."""
    chain: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DiffmineError):
            return seen
        chain.append(seen)
        seen = getattr(seen, "cause", None) or seen.__cause__
    if written := [found for one in chain for found in _OURS.findall(str(one))]:
        kind, said = written[-1]
        return InputError(said) if kind == "InputError" else StageError(said)
    innermost = next((one for one in reversed(chain) if str(one)), error)  # Ray Data ends some with one without words
    text = f"{type(innermost).__name__}: {innermost}".strip().splitlines()
    named = [line for line in text if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]  # Ray adds lines of its own
    return StageError(f"{stage} failed: {(named or text)[-1]}; the same command continues the run")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update({prefix + key: value} if prefix + key in settings() else _flatten(value, f"{prefix}{key}."))
    return flat
