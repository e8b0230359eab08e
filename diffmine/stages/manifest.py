"""A source of labelled images -> the manifest: one row per image, sorted, in row groups of one shard each.

Row group g of part p holds shard p * SHARDS_PER_PART + g, so that a task reads its shard's rows and nothing else. The
number of images of a shard is kept in the marker: a continued run keeps the shards it began with.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffmine.config import Config, Dataset, ImageSize
from diffmine.curate import page_labels
from diffmine.data import toytown
from diffmine.data.labels import label_sizes, labels_to_score, labels_without_others
from diffmine.data.manifest import Manifest as Scanned
from diffmine.data.manifest import scan, skipped_files, some
from diffmine.data.split import held_out
from diffmine.diffusion.model import cell_size, inspect, open_tokenizer, prompt_lengths, token_ids, unet_stride
from diffmine.errors import InputError
from diffmine.pipeline import made_with
from diffmine.preflight import misfits
from diffmine.prompts import joined, prompts
from diffmine.run import Run, fetch_model, fetch_text_encoder, from_elsewhere, part_name, to_parquet
from diffmine.stages.session import Context, Result

SHARDS_PER_PART = 256


def manifest(context: Context) -> Result:
    """Write the tables' first: which images there are, and their labels. No image is opened."""
    run, config, progress = context.run, context.config, context.progress
    progress.start("manifest")
    listed = None if config.dataset.layout == "toytown" else scan(config.dataset, seed=config.seed)
    if from_elsewhere(config.model.base):  # only now: a wrong path is told before gigabytes have come
        progress.say(f"manifest: model {config.model.base} is fetched, unless it is in the cache")
    tokenizer = check_model(config)
    scanned = listed or scan(_drawn(run, config), seed=config.seed)
    labels, notes = [*label_sizes(scanned.table)], _notes(scanned)
    for note in [*notes, *foreseen(scanned.table, config), *_nothing_beside(config, labels)]:
        progress.say(f"manifest: {note}")
    check_dataset(scanned.table, config, tokenizer, config.finetune.enabled)
    run.begin("manifest", made_with("manifest", config))
    files = {name: run.put(name, data, over=True) for name, data in _parts(scanned.table, config.compute.shard_images)}
    for left in set(run.files("manifest")) - set(files):  # by an attempt that was cut off and had seen more images
        run.remove(left)
    if config.dataset.layout == "toytown":
        files.update(run.digests(["toytown"]))
    progress.finish(_summary(scanned, len(labels)))
    return Result(
        files,
        {
            "rows": len(scanned.table),
            "shard_images": config.compute.shard_images,
            "labels": len(labels),
            "skipped_files": scanned.skipped,
            "notes": notes,
        },
    )


def annotate(context: Context, scanned: Scanned) -> None:
    """Give the manifest, which has the same images and labels, other boxes. Its shards stay as they are."""
    run, progress, made = context.run, context.progress, made_with("manifest", context.config)
    marker = run.committed("manifest")
    assert marker is not None, "the manifest is not committed"
    notes = _notes(scanned)
    progress.start("manifest")
    for note in [note for note in notes if note not in marker["notes"]]:
        progress.say(f"manifest: {note}")
    parts = _parts(scanned.table, marker["shard_images"])
    files = {name: run.put(name, data, over=True) for name, data in parts}
    run.begin("manifest", made)
    run.commit("manifest", {**marker, **made, "notes": notes}, files)
    boxed = int(pc.sum(pc.greater(pc.list_value_length(scanned.table["boxes"]), 0)).as_py() or 0)
    progress.finish(f"the same images, {boxed:,} of them with boxes now")


def _notes(scanned: Scanned) -> list[str]:
    alone = [label for label, count in label_sizes(scanned.table).items() if count == 1]
    told = f"labels of one image, so that all that is found is of that image: {some(alone)}"
    return [*scanned.notes, *([told] if alone else [])]


def foreseen(table: pa.Table, config: Config) -> list[str]:
    """What settings will not do with these images; the report tells what came of it."""
    notes = []
    if config.typicality.against == "others":
        scored = labels_to_score(config.typicality.labels, [*label_sizes(table)])
        if alone := labels_without_others(table, scored):
            notes.append(
                "typicality.against others compares with labels that an image does not have; images of these labels "
                f"have all that are scored, so they will have no patch: {some(alone)} (typicality.labels can name more)"
            )
    return notes


def _nothing_beside(config: Config, labels: list[str]) -> list[str]:
    """Said before the work, and again by the report."""
    beside = config.report.beside if config.report.enabled else None
    if beside is None or not set(labels).isdisjoint(page_labels(Run(beside))):
        return []
    return [f"report.beside: {beside} has none of these labels: nothing will stand side by side"]


def _drawn(run: Run, config: Config) -> Dataset:
    """Toytown, drawn into the run, to be read from there like any folder."""
    count = config.dataset.limit_per_label or toytown.IMAGES_PER_LABEL
    run.begin("manifest", made_with("manifest", config))
    for name, data in toytown.files(config.seed, count):
        run.put(f"toytown/{name}", data, over=True)
    folder = f"{run.uri}/toytown"
    return config.dataset.model_copy(
        update={"layout": "folder", "source": folder, "boxes": f"{folder}/boxes.csv", "limit_per_label": None}
    )


def _parts(table: pa.Table, shard_images: int) -> list[tuple[str, bytes]]:
    size = shard_images * SHARDS_PER_PART
    pieces = [table.slice(start, size) for start in range(0, len(table), size)]
    return [
        (part_name("manifest", i), to_parquet(piece, row_group_size=shard_images)) for i, piece in enumerate(pieces)
    ]


def _summary(scanned: Scanned, labels: int) -> str:
    skipped = f", {skipped_files(scanned.skipped)}" if scanned.skipped else ""
    return f"{len(scanned.table)} images, {labels} labels{skipped}"


def check_model(config: Config) -> object:
    """Refuse a model that is none, or what does not fit it; the tokenizer of its text encoder.

    Raises:
        InputError
    """
    base = fetch_model(config.model.base)
    inspect(base)
    text_encoder = fetch_text_encoder(config.model.text_encoder)
    if wrong := [*misfits(config, base, text_encoder)]:
        raise InputError("\n".join(wrong))
    check_cells(config.dataset.image, cell_size(base), unet_stride(base))
    return open_tokenizer(text_encoder or base)


def check_dataset(table: pa.Table, config: Config, tokenizer: object, training: bool) -> None:
    """Refuse what could not be done with the images of a manifest.

    Raises:
        InputError: a label that is to be scored is not there; prompts are cut or alike; what `check_training` says.
    """
    labels = [*label_sizes(table)]
    labels_to_score(config.typicality.labels, labels)
    check_prompts(labels, config, tokenizer)
    if training:
        check_training(table, config, tokenizer)


def check_cells(image: ImageSize, cell: int, stride: int) -> None:
    """Prepared images must be whole latent cells, and at least one cell of the UNet's deepest level.

    Raises:
        InputError
    """
    if image.multiple_of % cell:
        raise InputError(
            f"dataset.image.multiple_of is {image.multiple_of}; latent cells have {cell} pixels: use a multiple"
        )
    if image.short_side // image.multiple_of * image.multiple_of < cell * stride:
        raise InputError(
            f"dataset.image.short_side is {image.short_side}; one cell of the UNet's deepest level covers "
            f"{cell * stride} pixels: use at least that"
        )


def check_prompts(labels: list[str], config: Config, tokenizer: object) -> None:
    """Refuse labels whose prompts the text encoder would not tell apart or would cut.

    Raises:
        InputError: names every such label.
    """
    texts = prompts(labels, config.prompt.template, config.prompt.null_prompt)
    ids = token_ids(tokenizer, texts)  # type: ignore[arg-type]
    limit = ids.shape[1]
    names = ["the null prompt", *(repr(label) for label in labels)]
    wrong = [
        f"{name}: its prompt {text!r} has {length} tokens, the text encoder reads {limit}; use shorter labels"
        for name, text, length in zip(names, texts, prompt_lengths(tokenizer, texts), strict=True)  # type: ignore[arg-type]
        if length > limit
    ]
    _, first, inverse = np.unique(ids, axis=0, return_index=True, return_inverse=True)
    wrong += [
        f"{name} and {names[first[group]]}: their prompts give the same tokens (case and blanks do not count)"
        for i, (name, group) in enumerate(zip(names, inverse.ravel(), strict=True))
        if first[group] != i
    ]
    if wrong:
        raise InputError(
            "labels that the model cannot tell apart or read; rename them, or make them one in a table:\n"
            + "\n".join(f"  {line}" for line in wrong)
        )


def check_columns(table: pa.Table, config: Config) -> None:
    """Refuse columns that finetuning could not use.

    Raises:
        InputError: one is missing, or holds neither text nor whole numbers.
    """
    names = [("finetune.prompt_columns", name) for name in config.finetune.prompt_columns]
    for key, name in [("dataset.group_column", config.dataset.group_column), *names]:
        kind = table.schema.field(name).type if name in table.column_names else None
        if name is not None and not (kind and (pa.types.is_string(kind) or pa.types.is_integer(kind))):
            there = ", ".join(table.column_names)
            raise InputError(f"{key}: {name!r} is no column of text or whole numbers; the manifest has: {there}")


def check_training(table: pa.Table, config: Config, tokenizer: object) -> None:
    """Refuse what finetuning could not do with the images of a manifest.

    Raises:
        InputError: what `check_columns` says; a prompt would be cut; no label has images enough to hold out; the
            training is too short for its schedule.
    """
    wanted, dataset = config.finetune, config.dataset
    check_columns(table, config)
    if wanted.multi_label == "joined" or wanted.prompt_columns:
        longest = _longest_prompts(table, config)
        lengths = prompt_lengths(tokenizer, longest)  # type: ignore[arg-type]
        limit = tokenizer.model_max_length  # type: ignore[attr-defined]
        if cut := [text for text, length in zip(longest, lengths, strict=True) if length > limit]:
            raise InputError(
                f"the text encoder reads {limit} tokens, {len(cut)} prompts of finetuning have more, as {cut[0]!r}; "
                "use finetune.multi_label one, fewer finetune.prompt_columns or shorter labels"
            )
    held = 0
    if dataset.finetune_split:
        groups = table[dataset.group_column] if dataset.group_column else None
        held = int(held_out(table["labels"].combine_chunks(), groups, dataset.finetune_split, config.seed).sum())
        if not held:
            raise InputError(
                f"dataset.finetune_split: {dataset.finetune_split:g} of no label's images is a whole image or group; "
                "use a larger share, or 0"
            )
    if why := wanted.too_short(len(table) - held):
        raise InputError(f"finetune: {why}")


def _longest_prompts(table: pa.Table, config: Config) -> list[str]:
    """The distinct prompts of images with all that may be in them."""
    columns = [table[name].cast(pa.string()).to_pylist() for name in config.finetune.prompt_columns]
    found = set()
    for i, labels in enumerate(table["labels"].to_pylist()):
        more = tuple(values[i] for values in columns if values[i])
        if config.finetune.multi_label == "joined":
            found.add((*labels, *more))
        else:
            found.update((label, *more) for label in labels)
    return sorted(joined(words, config.prompt.template) for words in found)


def read_shard(run: Run, shard: int) -> pa.Table:
    """Rows of the manifest that make up a shard."""
    part, group = divmod(shard, SHARDS_PER_PART)
    return run.pieces("manifest", part, lambda file: file.read_row_group(group, use_threads=False))


def shard_count(run: Run) -> tuple[int, int]:
    """Number of shards and of images in the manifest."""
    marker = run.committed("manifest")
    assert marker is not None, "the manifest is not committed"
    return -(-marker["rows"] // marker["shard_images"]), marker["rows"]
