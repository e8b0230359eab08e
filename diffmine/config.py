"""Every setting of a run, with its default, and what fits together: the mirror of the YAML file.

`configfile` reads the file and the command line into it, and says every mistake.
"""

import math
import os
import posixpath
import re
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

# ------------------------------------------------------------------------------------------------------------ settings

Count = Annotated[int, Field(ge=1)]
CountOrAuto = Count | Literal["auto"]
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic reads true as 1; here it is a mistake."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("bool_given", "true or false is not allowed")
        return value


class ImageSize(_Section):
    """How an image is prepared: resized, then cropped centrally."""

    short_side: int = Field(default=512, ge=8, description="short side after resizing, in pixels")
    multiple_of: int = Field(
        default=8,
        ge=8,
        multiple_of=8,
        description="both sides are cropped to multiples of this; a latent cell has 8 pixels",
    )


class Dataset(_Section):
    """Labelled images."""

    source: str = Field(min_length=1, description="folder, CSV or Parquet table (path or URI); 'toytown' for toytown")
    layout: Literal["folder", "table", "toytown"] = Field(
        default="folder",
        description="folder: one sub-folder per label; table: columns uri and label(s); toytown: drawn by code",
    )
    boxes: str | None = Field(
        default=None, min_length=1, description="CSV of boxes: image,label,x,y,w,h in original pixels"
    )
    split: str | None = Field(
        default=None,
        min_length=1,
        description="folder: this sub-folder only; table: rows with this value in column 'split'",
    )
    limit_per_label: int | None = Field(
        default=None,
        ge=1,
        description="so many images of each label, chosen by the seed; where images have several labels, a label gets "
        "those of the others, too; toytown: scenes per label (null: 150)",
    )
    finetune_split: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of each label's images that is held out: mined and validated on, but not trained on",
    )
    group_column: str | None = Field(
        default=None,
        min_length=1,
        description="table: column whose equal values (a person, a panorama) finetune_split holds out together, and "
        "clusters count",
    )
    image: ImageSize = ImageSize()


class Prompt(_Section):
    """One pair of prompts for finetuning, scoring, features and sampling."""

    template: str = Field(
        default="An image of {label}.", description="the condition's prompt; {label} stands for the label"
    )
    null_prompt: str = Field(default="", description="prompt of the null condition")

    @field_validator("template")
    @classmethod
    def _one_placeholder(cls, value: str) -> str:
        if value.count("{label}") != 1 or re.search("[{}]", value.replace("{label}", "")):
            raise ValueError("allowed: a text that contains {label} exactly once and no other braces")
        return value

    @field_validator("null_prompt")
    @classmethod
    def _no_placeholder(cls, value: str) -> str:
        if re.search("[{}]", value):
            raise ValueError("allowed: a text without braces; the null prompt has no label")
        return value


class Model(_Section):
    """Base model, in diffusers' layout."""

    base: str = Field(
        default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        min_length=1,
        description="'tiny' (comes with the package), a local folder, an object-store URI or a hub id",
    )
    text_encoder: str | None = Field(
        default=None, min_length=1, description="CLIP text encoder and tokenizer to use instead of the base model's own"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16",
        description="of the weights when scoring; float16 rounds 8 times less, but can overflow",
    )


class Finetune(_Section):
    """Training of the UNet on the dataset."""

    enabled: bool = Field(default=True, description="false: mine with the base model as it is")
    steps: int = Field(default=10000, ge=1, description="optimizer steps; epochs or images can be given instead")
    epochs: float | None = Field(default=None, gt=0, description="length instead of steps: passes over the images")
    images: int | None = Field(default=None, ge=1, description="length instead of steps: images seen, over all workers")
    batch_size: int = Field(default=64, ge=1, description="images per step, over all workers")
    learning_rate: float = Field(default=1e-4, gt=0, description="of AdamW")
    warmup_steps: int = Field(default=0, ge=0, description="first steps, over which the learning rate rises linearly")
    decay_steps: int = Field(default=0, ge=0, description="last steps, over which it falls to zero along a cosine")
    weight_decay: float = Field(default=0.01, ge=0, description="of AdamW")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")
    t_min: float = Field(default=0.0, ge=0, lt=1, description="least timestep trained on, as a share of 1000")
    t_max: float = Field(default=1.0, gt=0, le=1, description="end of the timesteps (not included), as a share of 1000")
    min_snr_gamma: float | None = Field(
        default=None, gt=0, description="5 is usual: less weight on nearly clean images (min-SNR); null: plain loss"
    )
    label_dropout: float = Field(default=0.1, ge=0, lt=1, description="share of labels replaced by the null prompt")
    multi_label: Literal["one", "joined"] = Field(
        default="one",
        description="of several labels of an image: one, drawn anew each time, or all in one prompt",
    )
    prompt_columns: dict[str, Share] = Field(
        default={},
        description="table: column whose values join the label in the prompt -> how often: {region: 0.5}",
    )
    balance_labels: bool = Field(default=False, description="every label is seen equally often, however few its images")
    posterior: Literal["mean", "sample"] = Field(
        default="mean", description="of the VAE: its mean, or a sample of it, drawn anew each time"
    )
    crop: int | None = Field(
        default=None,
        ge=1,
        description="side of random crops in latent cells; null: whole latents, images of rare shapes with their like",
    )
    ema_decay: float = Field(
        default=0.9999, ge=0, lt=1, description="of the moving average of the weights, which is exported"
    )
    lora_rank: int | None = Field(
        default=None, ge=1, description="train low-rank adapters of the attention, merged at the end; null: all weights"
    )
    validate_every: int = Field(
        default=1000, ge=1, description="steps between losses on held-out images; the best weights are exported"
    )
    validation_images: int = Field(default=8, ge=1, description="held-out images of a label that are used, at most")
    validation_draws: int = Field(default=4, ge=1, description="draws (t, noise) for each, the same every time")
    best_by: Literal["loss", "typicality"] = Field(
        default="loss", description="least loss with the label, or largest typicality: the loss without it less that"
    )
    patience: int | None = Field(
        default=None, ge=1, description="training ends after so many validations without a new best; null: never early"
    )
    samples_per_label: int = Field(
        default=4, ge=0, description="images sampled from the finetuned model for the report"
    )
    sample_every: int | None = Field(
        default=None, ge=1, description="steps between samples on the way; null: at the end only"
    )
    checkpoint_every: int = Field(default=1000, ge=1, description="steps between checkpoints")
    workers: CountOrAuto = Field(
        default="auto",
        description="training workers at most; auto: one per GPU that is there or, on a cluster that grows, that "
        "compute.workers asks for; without GPUs one per core, with 4 images of a batch or more each",
    )
    micro_batch: CountOrAuto = Field(
        default="auto",
        description="images of a worker's pass, whose gradients add up; fewer take less memory; auto: its whole share",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="activations are computed twice instead of kept: slower, less memory"
    )
    sharding: Literal["none", "full"] = Field(
        default="none",
        description="full: weights and optimizer are spread over the workers (FSDP)",
    )
    compile: bool = Field(default=False, description="torch.compile the UNet: minutes at the start, then faster")
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default=["tensorboard"],
        description="who is told losses and samples; tensorboard: files in the run; others are installed apart",
    )

    def length(self, images: int) -> int:
        """Steps of a training on so many images."""
        if self.epochs is None and self.images is None:
            return self.steps
        seen = self.images or (self.epochs or 0) * images
        return max(1, math.ceil(seen / self.batch_size))

    def too_short(self, images: int) -> str | None:
        """Why a training on so many images has no room for its warm-up and decay."""
        steps = self.length(images)
        if self.warmup_steps + self.decay_steps <= steps:
            return None
        return (
            f"{self.asked} of {images} images are {steps} steps, fewer than the {self.warmup_steps} of "
            f"finetune.warmup_steps and {self.decay_steps} of finetune.decay_steps"
        )

    @property
    def asked(self) -> str:
        """Its length in words, as it was given."""
        if self.epochs is not None:
            return f"{self.epochs:g} epochs"
        return f"{self.steps:,} steps" if self.images is None else f"{self.images:,} images"


class Typicality(_Section):
    """Scores T(x|c) of every image under its labels."""

    draws: Annotated[int, Field(ge=2)] | Literal["auto"] = Field(
        default=40,
        description="draws (t, noise) per image, the same for all images and conditions; auto: see relative_error",
    )
    relative_error: float = Field(
        default=0.1, gt=0, description="with draws: auto, standard error over T of the pilot's best patches"
    )
    max_draws: int = Field(default=400, ge=2, description="with draws: auto, the most draws")
    t_min: float = Field(default=0.1, ge=0, lt=1, description="least timestep, as a share of 1000")
    t_max: float = Field(default=0.7, gt=0, le=1, description="end of the timesteps (not included), as a share of 1000")
    sampler: Literal["independent", "stratified", "antithetic", "allocated"] = Field(
        default="allocated", description="how draws are made; independent is the paper's"
    )
    pilot_images: int = Field(default=16, ge=1, description="images that tell how draws are best spread over t")
    pilot_draws: int = Field(default=64, ge=8, multiple_of=4, description="draws for each of the pilot's images")
    labels: Literal["own", "all"] | list[str] = Field(
        default="own", description="labels that every image is scored under, beside its own"
    )
    against: Literal["null", "others"] = Field(
        default="null",
        description="others: patches are chosen by T less that of the strongest scored label that the image lacks",
    )
    racing: bool = Field(
        default=False, description="score in rounds; images leave that cannot enter their label's best patches"
    )
    racing_confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="with which an image is sent away, as far as the rounds so far can tell"
    )
    batch_size: CountOrAuto = Field(default="auto", description="UNet inputs per pass; changes speed, not results")
    compile: bool = Field(
        default=False, description="torch.compile the UNet: minutes at the start, then faster; for long runs on GPUs"
    )


class Patches(_Section):
    """Windows of the typicality map."""

    size: int = Field(
        default=64, ge=1, description="side of a patch in pixels of the prepared image, whose short side is the most"
    )
    per_image: int = Field(default=5, ge=1, description="most patches of an image, of each kind")
    per_label: int = Field(default=1000, ge=1, description="most patches of a label, of each kind")
    fresh_per_label: int = Field(
        default=250, ge=0, description="the best and worst so many of a label are scored again with fresh draws"
    )
    fresh_draws: int = Field(default=30, ge=4, multiple_of=2, description="draws of the second scoring")


class Features(_Section):
    """Diffusion features of the top patches."""

    timestep: int = Field(default=161, ge=0, le=999, description="timestep at which the UNet is read")
    up_block: int = Field(default=1, ge=0, description="index of the UNet's up-block whose output is read")
    ensemble: int = Field(default=8, ge=1, description="noises averaged per image")
    batch_size: CountOrAuto = Field(default="auto", description="UNet inputs per pass; changes speed, not results")


class Clusters(_Section):
    """k-means of the features."""

    k: int = Field(
        default=32, ge=1, description="clusters per label (or over all, see scope); at most the number of patches"
    )
    scope: Literal["label", "dataset"] = Field(
        default="label", description="cluster each label alone, or all labels together"
    )
    restarts: int = Field(default=10, ge=1, description="k-means starts; the one with the least inertia is kept")


class Report(_Section):
    """The static site."""

    enabled: bool = Field(default=True, description="write report/index.html")
    patches_per_cluster: int = Field(default=12, ge=1, description="patches shown of a cluster")
    clusters_per_label: int = Field(default=32, ge=1, description="clusters shown of a label")
    beside: str | None = Field(
        default=None, description="another run of these images whose clusters can stand beside, e.g. without finetuning"
    )
    whole_images: int = Field(default=18, ge=4, le=240, description="images that a label's page can show whole")


class Compute(_Section):
    """Work units and limits."""

    workers: CountOrAuto = Field(
        default="auto",
        description="most actors that hold the model; auto: one per GPU, else per spare CPU; as many as a cluster that "
        "grows gives",
    )
    device: Literal["auto", "gpu", "cpu"] = Field(
        default="auto",
        description="what models run on; auto: GPUs where the cluster has some now; gpu also waits for a cluster that "
        "grows to add them",
    )
    open_cluster: bool = Field(
        default=False, description="join a Ray cluster that asks for no token: anyone who reaches it can run code there"
    )
    shard_images: int = Field(default=64, ge=1, description="images per shard, the unit of work, commit and retry")
    max_image_pixels: int = Field(
        default=64_000_000, ge=1, description="larger images become failures, before decoding"
    )
    max_image_bytes: int = Field(default=256 * 2**20, ge=1, description="larger files become failures, before reading")
    stall_seconds: float = Field(
        default=900, gt=0, description="a stage that makes no progress for so long ends with an error"
    )


class Config(_Section):
    """Every setting of a run."""

    output: str = Field(min_length=1, description="run folder: a path or an object-store URI")
    seed: int = Field(default=0, ge=0, lt=2**63, description="every random number of the run derives from it")
    dataset: Dataset
    prompt: Prompt = Prompt()
    model: Model = Model()
    finetune: Finetune = Finetune()
    typicality: Typicality = Typicality()
    patches: Patches = Patches()
    features: Features = Features()
    clusters: Clusters = Clusters()
    report: Report = Report()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> "Config":
        mistakes = [] if info.context == FIELDS_ONLY else cross_check(self)
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self


# ------------------------------------------------------------------------------------------------- cross-field checks

_STORES = ("file", "local", "s3", "s3a", "gs", "gcs", "memory")
# pydantic skips cross-field checks once a field errs, so `configfile` validates the fields and runs the checks itself.
FIELDS_ONLY = {"check": "fields only"}


def _t_range(section: Finetune | Typicality) -> str | None:
    low, high = section.t_min, section.t_max
    if round(1000 * low) < round(1000 * high):
        return None
    return f"got {low} and {high}; allowed: t_min below t_max, with at least one timestep of 0..999 between them"


def _one_length(config: Config) -> str | None:
    wanted = config.finetune
    if wanted.epochs is None or wanted.images is None:
        return None
    return f"got {wanted.epochs:g} and {wanted.images}; allowed: one of them, or neither and steps"


def _schedule_fits(config: Config) -> str | None:
    wanted = config.finetune
    if wanted.epochs or wanted.images or wanted.warmup_steps + wanted.decay_steps <= wanted.steps:
        return None  # what the others come to is known when the images have been counted
    return (
        f"got {wanted.warmup_steps}, {wanted.decay_steps} and {wanted.steps}; allowed: the first two within the steps"
    )


def _enough_draws(config: Config) -> str | None:
    wanted, pairs = config.typicality, config.typicality.sampler in ("antithetic", "allocated")
    counts = {"draws": wanted.draws, "max_draws": wanted.max_draws}
    wrong = [f"{k} {n}" for k, n in counts.items() if pairs and n != "auto" and (n < 4 or n % 2)]
    if not wrong:
        return None
    return f"got {' and '.join(wrong)}; allowed: even numbers of at least 4, as draws come in mirrored pairs"


def _draws_auto(config: Config) -> str | None:
    if config.typicality.draws != "auto" or config.typicality.sampler == "allocated":
        return None
    return f"got auto with {config.typicality.sampler}; allowed: a number, or sampler allocated, which has a pilot"


def _racing_has_draws(config: Config) -> str | None:
    wanted = config.typicality
    if not wanted.racing or (wanted.draws != "auto" and wanted.draws >= 20):
        return None
    return f"got racing with {wanted.draws}; allowed: at least 20 draws, which are dealt out over the rounds"


def _race_without_others(config: Config) -> str | None:
    if not config.typicality.racing or config.typicality.against == "null":
        return None
    return "got racing against others; allowed: racing against null, as who stays in a race is decided by T"


def _others_scored(config: Config) -> str | None:
    if config.typicality.against == "null" or config.typicality.labels != "own":
        return None
    return "got others with labels own; allowed: with labels all or a list, so that there are others to compare with"


def _short_side(config: Config) -> str | None:
    image = config.dataset.image
    if image.multiple_of <= image.short_side:
        return None
    return f"got {image.multiple_of} and {image.short_side}; allowed: multiple_of at most short_side"


def _patches_lie_in_images(config: Config) -> str | None:
    size, short_side = config.patches.size, config.dataset.image.short_side
    if size <= short_side:
        return None
    return f"got {size} and {short_side}; allowed: patches no larger than the short side of the prepared images"


def _toytown_is_whole(config: Config) -> str | None:
    given = [k for k in ("boxes", "split") if getattr(config.dataset, k) is not None]
    if config.dataset.layout != "toytown" or not given:
        return None
    return (
        f"got layout toytown with {' and '.join(given)}; allowed: null, as toytown brings its own boxes and no splits"
    )


def _output_apart(config: Config) -> str | None:
    dataset = config.dataset
    images = absolute(posixpath.join(dataset.source, dataset.split or "")).rstrip("/")
    if dataset.layout != "folder" or not f"{absolute(config.output)}/".startswith(f"{images}/"):
        return None
    return f"got {config.output}; allowed: a folder outside the source, or the run's files would be taken for images"


def _in_a_known_store(name: str) -> Callable[["Config"], str | None]:
    def check(config: Config) -> str | None:
        section, _, key = name.rpartition(".")
        uri = getattr(getattr(config, section) if section else config, key)
        return uri and unknown_store(uri)

    return check


def _workers_have_images(config: Config) -> str | None:
    workers, batch = config.finetune.workers, config.finetune.batch_size
    if workers == "auto" or workers <= batch:
        return None
    return f"got {workers} and {batch}; allowed: at most as many workers as images per step"


def _patience_validates(config: Config) -> str | None:
    if config.finetune.patience is None or config.dataset.finetune_split:
        return None
    return f"got {config.finetune.patience} and 0; allowed: patience where images are held out, as 0.1 of them"


def _columns_of_a_table(config: Config) -> str | None:
    wanted = [*config.finetune.prompt_columns, *filter(None, [config.dataset.group_column])]
    if not wanted or config.dataset.layout == "table":
        return None
    return f"got column {', '.join(wanted)} with layout {config.dataset.layout}; allowed: with layout table"


def _sharded_weights(config: Config) -> str | None:
    if config.finetune.sharding == "none" or config.finetune.lora_rank is None:
        return None
    return f"got full and {config.finetune.lora_rank}; allowed: one of them, as adapters are too small to be spread"


_CHECKS: tuple[tuple[tuple[str, ...], Callable[[Config], str | None]], ...] = (
    (("finetune.t_min", "finetune.t_max"), lambda config: _t_range(config.finetune)),
    (("typicality.t_min", "typicality.t_max"), lambda config: _t_range(config.typicality)),
    (("finetune.epochs", "finetune.images"), _one_length),
    (("finetune.patience", "dataset.finetune_split"), _patience_validates),
    (("finetune.prompt_columns", "dataset.group_column", "dataset.layout"), _columns_of_a_table),
    (("finetune.sharding", "finetune.lora_rank"), _sharded_weights),
    (("finetune.warmup_steps", "finetune.decay_steps", "finetune.steps"), _schedule_fits),
    (("typicality.draws", "typicality.max_draws", "typicality.sampler"), _enough_draws),
    (("typicality.draws", "typicality.sampler"), _draws_auto),
    (("typicality.racing", "typicality.draws"), _racing_has_draws),
    (("typicality.racing", "typicality.against"), _race_without_others),
    (("typicality.against", "typicality.labels"), _others_scored),
    (("dataset.image.multiple_of", "dataset.image.short_side"), _short_side),
    (("patches.size", "dataset.image.short_side"), _patches_lie_in_images),
    (("dataset.layout", "dataset.boxes", "dataset.split"), _toytown_is_whole),
    *(((name,), _in_a_known_store(name)) for name in ("output", "dataset.source", "dataset.boxes", "report.beside")),
    (("output", "dataset.source", "dataset.layout", "dataset.split"), _output_apart),
    (("finetune.workers", "finetune.batch_size"), _workers_have_images),
)


def cross_check(config: Config, erring: Collection[str] = ()) -> list[str]:
    """Mistakes between settings; checks that read a path of `erring` (a setting or a section) are left out."""
    return [
        f"{', '.join(keys)}: {mistake}"
        for keys, check in _CHECKS
        if not any(within(key, path) for key in keys for path in erring) and (mistake := check(config))
    ]


def within(key: str, path: str) -> bool:
    """Whether a setting is another one, or lies in a section."""
    return key == path or key.startswith(f"{path}.")


def unknown_store(uri: str) -> str | None:
    """What to say of a URI of a kind of store that runs do not work with, and of what is nearly a URI."""
    scheme, colon, rest = uri.partition(":/")
    if not colon or not re.fullmatch(r"\w[\w+.-]*", scheme) or (scheme in _STORES and rest.startswith("/")):
        return None
    allowed = "allowed: a local path, file://, s3:// or gs://"
    if scheme.lower() in _STORES:
        return f"got {uri}; {allowed}; perhaps you meant {scheme.lower()}://{rest.lstrip('/')}"
    if scheme.lower() in ("http", "https", "ftp"):
        return f"got {uri}; {allowed}; web addresses cannot be listed or written: download the images first"
    named = "" if rest.startswith("/") else f" (a local folder of this name is written ./{uri})"
    return f"got {uri}; {allowed}{named}"


def absolute(uri: str) -> str:
    """Local path or file:// URI -> absolute path; any other URI as it is."""
    scheme, colon, path = uri.partition("://")
    if not colon:
        return os.path.abspath(os.path.expanduser(uri))
    return os.path.abspath(path) if scheme in ("file", "local") else uri
