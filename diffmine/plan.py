"""config and a count of the images -> UNet passes, bytes and, for a given device rate, hours and cost: before a run.

Arithmetic on a UNet's shape; no image and no weights are opened, nothing is downloaded or written.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffmine.config import Config
from diffmine.errors import InputError

SD15: dict[str, Any] = {  # unet/config.json of Stable Diffusion 1.5, as far as it matters here
    "in_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
_CELL = 8  # pixels of a latent cell's side
_TOKENS = 77  # of a CLIP prompt
_MANY_PASSES = 300  # over the images, in training


@dataclass(frozen=True)
class Counts:
    """Size of a dataset."""

    images: int
    pairs: int  # (image, label)
    labels: int
    notes: tuple[str, ...] = ()  # what a person should know of the dataset


@dataclass(frozen=True)
class Work:
    """What a stage asks of the device."""

    passes: float  # UNet forward passes, or as much work
    flop: float


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    counts: Counts
    cells: tuple[int, int]  # h, w of a typical latent
    work: dict[str, Work]  # stage -> work
    written: dict[str, int]  # table -> bytes before compression
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]  # what a person should know before the run


def plan(config: Config, counts: Counts, aspect: float) -> Plan:
    """Work and bytes of a run; `aspect` is the images' longer side over the shorter.

    Raises:
        InputError: the model has no such up-block.
    """
    unet, origin = _unet_config(config.model.base)
    h, w = _cells(config, aspect)
    blocks = len(unet["block_out_channels"])
    if config.features.up_block >= blocks:
        raise InputError(
            f"features.up_block: got {config.features.up_block}; the model's up-blocks are 0 to {blocks - 1}"
        )
    work = _work(config, counts, unet, h, w)
    written = _written(config, counts, unet, h * w)
    notes = (*counts.notes, *_too_long(config, counts))
    return Plan(counts, (h, w), work, written, _assumptions(config, origin, aspect), notes)


def _trained_images(config: Config, counts: Counts) -> int:
    return round(counts.images * (1 - config.dataset.finetune_split))


def _too_long(config: Config, counts: Counts) -> Iterator[str]:
    """A training of far more passes over the images than they need."""
    wanted, images = config.finetune, _trained_images(config, counts)
    passes = wanted.length(images) * wanted.batch_size / max(1, images)
    if wanted.enabled and passes > _MANY_PASSES:
        yield (
            f"finetuning sees every image {passes:,.0f} times, far more than is of use: give --finetune.epochs 30, or "
            "hold images out that say when to end (docs/finetuning.md)"
        )


def _work(config: Config, counts: Counts, unet: Mapping[str, Any], h: int, w: int) -> dict[str, Work]:
    finetune, typicality, features = config.finetune, config.typicality, config.features
    one = unet_flop(unet, h, w)
    crop = finetune.crop or max(h, w)
    steps = finetune.length(_trained_images(config, counts))
    trained = 3 * steps * finetune.batch_size if finetune.enabled else 0  # forward + backward = 3 passes
    looks = -(-steps // finetune.validate_every) + 1 if finetune.enabled and config.dataset.finetune_split else 0
    validated = 2 * looks * counts.labels * finetune.validation_images * finetune.validation_draws
    draws = typicality.max_draws if typicality.draws == "auto" else typicality.draws
    scored = draws * (counts.images + _scored_pairs(config, counts))  # the null once per image, the condition per label
    if typicality.sampler == "allocated":
        scored += 2 * min(counts.images, typicality.pilot_images) * typicality.pilot_draws
    again = min(2 * counts.labels * config.patches.fresh_per_label, counts.pairs)  # (image, label) at the most
    rescored = 2 * again * config.patches.fresh_draws
    if typicality.against == "others":  # each patch also under its strongest other label, which many may share
        most = min(2 * counts.labels * config.patches.fresh_per_label, again * (counts.labels - 1))
        rescored += most * config.patches.fresh_draws
    share = unet_flop(unet, h, w, up_block=features.up_block) / one
    read = min(counts.images, counts.labels * config.patches.per_label) * features.ensemble * share
    return {
        "finetune": Work(trained + validated, trained * unet_flop(unet, min(crop, h), min(crop, w)) + validated * one),
        "typicality": Work(scored, scored * one),
        "patches": Work(rescored, rescored * one),
        "features": Work(read, read * one),
    }


def _scored_pairs(config: Config, counts: Counts) -> int:
    wanted = config.typicality.labels
    if wanted == "own":
        return counts.pairs
    return counts.images * counts.labels if wanted == "all" else counts.pairs + counts.images * len(wanted)


def _written(config: Config, counts: Counts, unet: Mapping[str, Any], cells: int) -> dict[str, int]:
    patches = config.patches
    top = min(counts.labels * patches.per_label, counts.pairs * patches.per_image)
    width = list(reversed(unet["block_out_channels"]))[config.features.up_block]
    return {
        "latents": counts.images * unet["in_channels"] * cells * 2,  # float16
        "typicality": _scored_pairs(config, counts) * cells * (4 + 4),  # map and window_stderr, float32
        "features": top * width * 4,  # float32
    }


def _cells(config: Config, aspect: float) -> tuple[int, int]:
    """h, w of the latent of a landscape image."""
    size = config.dataset.image
    sides = (size.short_side, round(size.short_side * aspect))
    h, w = (side // size.multiple_of * size.multiple_of // _CELL for side in sides)
    return h, w


def _assumptions(config: Config, origin: str, aspect: float) -> tuple[str, ...]:
    crop = config.finetune.crop
    auto = "; draws: auto counts as max_draws" if config.typicality.draws == "auto" else ""
    return (
        f"work of a UNet pass: counted from {origin}; no safety margin",
        f"every image has sides of 1 : {aspect:.3g} (--aspect); a latent cell has {_CELL} pixels a side",
        f"finetuning: 3 passes per image and step, on {f'crops of {crop} x {crop} cells' if crop else 'whole latents'}",
        f"typicality: draws x (1 null + 1 per label) passes per image, and the pilot's{auto}",
        "patches: fresh draws x 2 passes for every image and label that can have a best or worst patch"
        + (", x 1 for each of these patches" if config.typicality.against == "others" else ""),
        "features: once per noise for every image that can have a top patch; the UNet is left after the up-block",
        "not counted: decoding, the VAE (once per image), the text, sampled images, start-up, failures",
        "not counted: bytes of checkpoints, the finetuned model and the report",
    )


# --------------------------------------------------------------------------------------------------- work of the UNet


def unet_flop(unet: Mapping[str, Any], h: int, w: int, up_block: int | None = None) -> float:
    """Floating-point operations (2 per multiply-add) of one forward pass for one latent of h x w cells.

    Convolutions and matrix products only. With `up_block` the pass is left after that up-block.

    Args:
        unet: `unet/config.json` of a UNet2DConditionModel with one transformer layer per attention block.
    """
    return sum(flop for block, flop in _parts(unet, h * w) if up_block is None or block <= up_block)


def _parts(unet: Mapping[str, Any], cells: int) -> Iterator[tuple[int, float]]:
    """(up-block, FLOP) of every part in order; what comes before the up-blocks counts as -1."""
    widths, context = unet["block_out_channels"], unet["cross_attention_dim"]
    layers, last = unet["layers_per_block"], len(widths) - 1
    ins = [widths[0], *widths]
    n = float(cells)
    skips = [widths[0]]
    yield -1, _conv(unet["in_channels"], widths[0], n)
    for i, (kind, (before, width)) in enumerate(zip(unet["down_block_types"], pairwise(ins), strict=True)):
        for layer in range(layers):
            yield -1, _resnet(before if layer == 0 else width, width, n, widths[0])
            yield -1, _attention(width, n, context) if "CrossAttn" in kind else 0.0
            skips.append(width)
        if i < last:
            n /= 4
            yield -1, _conv(width, width, n)
            skips.append(width)
    middle = widths[-1]
    yield -1, 2 * _resnet(middle, middle, n, widths[0]) + _attention(middle, n, context)
    before = middle
    for i, (kind, width) in enumerate(zip(unet["up_block_types"], reversed(widths), strict=True)):
        for _ in range(layers + 1):
            yield i, _resnet(before + skips.pop(), width, n, widths[0])
            yield i, _attention(width, n, context) if "CrossAttn" in kind else 0.0
            before = width
        if i < last:
            n *= 4
            yield i, _conv(width, width, n)
    yield last + 1, _conv(widths[0], unet["in_channels"], n)


def _conv(before: int, after: int, cells: float) -> float:
    return 2 * 9 * before * after * cells


def _resnet(before: int, after: int, cells: float, base: int) -> float:
    """Two convolutions, the time embedding (4 base wide), and a 1 x 1 shortcut where the width changes."""
    shortcut = 2 * before * after * cells if before != after else 0
    return _conv(before, after, cells) + _conv(after, after, cells) + 2 * 4 * base * after + shortcut


def _attention(c: int, cells: float, context: int) -> float:
    """Projections in and out, self-attention, cross-attention to the text, gated feed-forward of 4 c."""
    projections = 2 * 2 * c * c * cells
    self_attention = 4 * 2 * c * c * cells + 2 * 2 * cells * cells * c
    cross_attention = 2 * 2 * c * c * cells + 2 * 2 * context * c * _TOKENS + 2 * 2 * cells * _TOKENS * c
    feed_forward = 2 * c * 8 * c * cells + 2 * 4 * c * c * cells
    return projections + self_attention + cross_attention + feed_forward


def _unet_config(base: str) -> tuple[dict[str, Any], str]:
    """The model's own UNet where it is at hand, else that of Stable Diffusion 1.5; and a word about which."""
    from diffmine.run import TINY

    file = (TINY if base == "tiny" else Path(base)) / "unet" / "config.json"
    if file.is_file():
        unet = json.loads(file.read_text())
        if isinstance(unet["layers_per_block"], int) and isinstance(unet["cross_attention_dim"], int):
            return unet, f"the shape of {base}'s UNet"
        raise InputError(
            f"{file}: blocks of different depths or text widths cannot be planned; `diffmine mine` may still run"
        )
    if base == "tiny":
        raise InputError(f"model.base: got tiny, but {file} is missing; install the package again")
    return SD15, f"the shape of Stable Diffusion 1.5's UNet, as {base} is not a local folder"


# --------------------------------------------------------------------------------------------------------- for the user


def count(config: Config) -> Counts:
    """Images and labels of the dataset, without opening an image.

    Raises:
        InputError: the source does not exist or holds no labelled images; a label that is to be scored is not there;
            what else `mine` would refuse, as far as it can be told without fetching a model.
    """
    from diffmine.data.labels import label_sizes, labels_to_score

    dataset = config.dataset
    notes: list[str] = []
    if dataset.layout == "toytown":  # not drawn yet
        from diffmine.data.toytown import IMAGES_PER_LABEL, LABELS

        sizes = dict.fromkeys(LABELS, dataset.limit_per_label or IMAGES_PER_LABEL)
        images = sum(sizes.values())
    else:
        from diffmine.data import manifest
        from diffmine.stages.manifest import foreseen

        scanned = manifest.scan(dataset, seed=config.seed)
        _check(scanned.table, config)
        sizes, images = label_sizes(scanned.table), len(scanned.table)
        notes = [*scanned.notes, *foreseen(scanned.table, config)]
        if scanned.skipped:
            notes.append(manifest.skipped_files(scanned.skipped))
    labels_to_score(config.typicality.labels, list(sizes))
    return Counts(images, sum(sizes.values()), len(sizes), (*notes, *_too_few(config, sizes)))


def _check(table: pa.Table, config: Config) -> None:
    from diffmine.run import from_elsewhere
    from diffmine.stages.manifest import check_columns, check_dataset, check_model

    if not from_elsewhere(config.model.base) and config.model.text_encoder is None:
        check_dataset(table, config, check_model(config), config.finetune.enabled)
    elif config.finetune.enabled:
        check_columns(table, config)


def _too_few(config: Config, sizes: Mapping[str, int]) -> Iterator[str]:
    """Labels of which every candidate for a patch is kept, so that the worst are among the most typical."""
    from diffmine.data.manifest import some

    wanted = config.patches
    few = [label for label, images in sizes.items() if images * wanted.per_image <= wanted.per_label]
    if few:
        label = "label has" if len(few) == 1 else "labels have"
        yield (
            f"{len(few):,} {label} no more candidates (images x patches.per_image {wanted.per_image}) than "
            f"patches.per_label {wanted.per_label}, so all are kept and nothing is chosen: give "
            f"--patches.per_label {max(1, min(sizes[label] for label in few) * wanted.per_image // 4)} or so "
            f"({some(few, 5)})"
        )


def render(plan: Plan, tflops: float | None = None, price: float | None = None) -> str:
    """Text for a terminal.

    Args:
        tflops: what one device reaches in use, in 1e12 operations per second; without it there are no hours.
        price: of one device and hour; without it there is no cost.
    """
    counts, (h, w) = plan.counts, plan.cells
    flop = sum(work.flop for work in plan.work.values())
    passes = sum(work.passes for work in plan.work.values())
    columns = ["UNet passes", "TFLOP", *(["hours"] if tflops else []), *(["cost"] if tflops and price else [])]
    lines = [
        f"{counts.images:,} images, {counts.labels:,} labels, {counts.pairs:,} (image, label) pairs; {h} x {w} cells",
        *(f"note: {note}" for note in plan.notes),
        "",
        f"{'stage':<12}{''.join(f'{column:>18}' for column in columns)}",
    ]
    for stage, work in {**plan.work, "all": Work(passes, flop)}.items():
        hours = work.flop / (tflops * 1e12) / 3600 if tflops else 0.0
        numbers = [f"{work.passes:,.0f}", f"{work.flop / 1e12:,.1f}", f"{hours:,.2f}", f"{hours * (price or 0):,.2f}"]
        lines.append(f"{stage:<12}{''.join(f'{number:>18}' for number in numbers[: len(columns)])}")
    lines += ["", f"{'table':<12}{'bytes, before compression':>28}"]
    lines += [f"{table:<12}{_bytes(size):>28}" for table, size in plan.written.items()]
    rate = f"one device at {tflops:g} TFLOP/s throughout" if tflops else "for hours and cost add --tflops and --price"
    return "\n".join([*lines, "", "Assumed:", *(f"- {a}" for a in (*plan.assumptions, rate))])


def _bytes(size: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
