"""The config: what is accepted, what a mistake looks like, and that all mistakes come at once."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from diffmine.config import Config, Dataset, Prompt, Typicality, absolute
from diffmine.configfile import load, sections, settings, to_yaml
from diffmine.errors import InputError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
MINIMAL = "output: out\ndataset: {source: photos}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def mistakes(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(path, overrides)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{len(lines)} mistake")
    return [line.strip() for line in lines]


# ------------------------------------------------------------------------------------------------------------ accepted


def test_only_output_and_source_are_required(write):
    load(write(MINIMAL))
    assert [s.path for s in settings().values() if s.required] == ["output", "dataset.source"]


def test_defaults_are_the_papers_but_for_how_draws_are_made(write):
    config = load(write(MINIMAL))
    assert (config.typicality.draws, config.typicality.t_min, config.typicality.t_max) == (40, 0.1, 0.7)
    assert (config.typicality.sampler, config.typicality.labels, config.typicality.against) == (
        "allocated", "own", "null"
    )  # fmt: skip
    assert not config.typicality.racing
    assert (config.patches.size, config.patches.per_image, config.patches.per_label) == (64, 5, 1000)
    assert (config.features.timestep, config.features.up_block, config.features.ensemble) == (161, 1, 8)
    assert (config.clusters.k, config.clusters.scope) == (32, "label")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_example_loads(path):
    assert "{label}" in load(path).prompt.template


def test_the_default_can_be_turned_to_another_dataset():
    toytown = next(p for p in CONFIGS if p.name == "toytown.yaml")
    flags = "--dataset.layout folder --dataset.source X --dataset.boxes Y --output Z --dataset.limit_per_label 7"
    config = load(toytown, flags.split())
    assert config.dataset.model_dump(exclude={"image"}) == {
        "source": absolute("X"), "layout": "folder", "boxes": absolute("Y"), "split": None, "limit_per_label": 7,
        "finetune_split": 0, "group_column": None,
    }  # fmt: skip
    assert config.output == absolute("Z")


def test_required_keys_may_come_from_the_command_line_alone(write):
    config = load(write("seed: 3"), ["--output", "o", "--dataset.source=s"])
    assert (config.output, config.dataset.source, config.seed) == (absolute("o"), absolute("s"), 3)


def test_a_runs_own_config_means_the_same_in_another_folder(write, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    path = write("output: out/\ndataset: {source: ./photos/, boxes: b.csv}\nreport: {beside: ../base}")
    config = load(path)
    assert (config.output, config.dataset.source) == (f"{tmp_path}/out", f"{tmp_path}/photos")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(write(to_yaml(config))) == config
    assert load(path, ["--dataset.source", "s3://b/x/"]).dataset.source == "s3://b/x/"
    toytown = ["--dataset.source", "toytown", "--dataset.layout", "toytown", "--dataset.boxes", "null"]
    assert load(path, toytown).dataset.source == "toytown"


@pytest.mark.parametrize("name", ["output", "dataset.source", "dataset.boxes", "report.beside"])
@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("ftp://h/x", "; web addresses cannot be listed or written: download the images first"),
        ("az://c/x", ""),
        ("s3:/b/x", "; perhaps you meant s3://b/x"),
        ("S3://b/x", "; perhaps you meant s3://b/x"),
        ("C:/photos", " (a local folder of this name is written ./C:/photos)"),
        ("./a:/b", None),
        ("a/b:/c", None),
        ("gcs://b/x", None),
        ("file:///x", None),
    ],
)
def test_stores_that_runs_do_not_work_with(write, name, uri, hint):
    path = write(MINIMAL)
    if hint is None:
        load(path, [f"--{name}={uri}"])
    else:
        said = f"{name}: got {uri}; allowed: a local path, file://, s3:// or gs://{hint}"
        assert mistakes(path, f"--{name}={uri}") == [said]


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (["--typicality.draws", "50"], 50),
        (["--typicality.draws=50"], 50),
        (["--typicality.draws", "1e3"], 1000),
        (["--finetune.learning_rate", "1e-5"], 1e-5),
        (["--finetune.enabled", "false"], False),
        (["--finetune.enabled=False"], False),
        (["--dataset.boxes", "null"], None),
        (["--dataset.limit_per_label", "None"], None),
        (["--dataset.split", "2017"], "2017"),  # text stays text
        (["--prompt.null_prompt", ""], ""),
        (["--prompt.null_prompt="], ""),
        (["--prompt.template", "a: {label} = #1"], "a: {label} = #1"),
        (["--prompt.null_prompt=--x=1"], "--x=1"),
        (["--compute.workers", "auto"], "auto"),
        (["--compute.workers", "4"], 4),
        (["--typicality.draws", "auto"], "auto"),
        (["--typicality.labels", "all"], "all"),
        (["--typicality.labels", '[1920s, "1930", "a, b"]'], ["1920s", "1930", "a, b"]),
        (["--typicality.labels=[own]"], ["own"]),  # a label of that name
        (["--seed", "1", "--seed", "2"], 2),
    ],
)
def test_override(write, tokens, value):
    config = load(write(MINIMAL + "typicality: {draws: 8}"), tokens)
    found = config
    for key in tokens[0].removeprefix("--").partition("=")[0].split("."):
        found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)


def test_an_override_repairs_a_mistake_of_the_file(write):
    path = write(MINIMAL + "typicality: {draws: many, t_min: 0.9}")
    assert len(mistakes(path)) == 2
    assert load(path, ["--typicality.draws", "6", "--typicality.t_max", "0.95"]).typicality.draws == 6


def test_numbers_of_yaml_that_pyyaml_reads_as_text(write):
    text = (
        MINIMAL + "finetune: {learning_rate: 1e-4, weight_decay: 1E-2, steps: 2e3}\ncompute: {max_image_pixels: 1_000}"
    )
    config = load(write(text))
    assert yaml.safe_load("1e-4") == "1e-4"
    assert (config.finetune.learning_rate, config.finetune.weight_decay, config.finetune.steps) == (1e-4, 1e-2, 2000)
    assert config.compute.max_image_pixels == 1000


def test_labels_to_score_as_a_list_in_the_file(write):
    path = write(MINIMAL + 'typicality: {against: others, labels: [Ashford, "1920"]}')
    assert load(path).typicality.labels == ["Ashford", "1920"]
    assert load(write(to_yaml(load(path)))).typicality.labels == ["Ashford", "1920"]


@pytest.mark.parametrize("sampler", ["independent", "stratified"])
def test_odd_draws_are_for_samplers_without_pairs(write, sampler):
    path = write(MINIMAL + "typicality: {draws: 7, max_draws: 9}")
    assert load(path, ["--typicality.sampler", sampler]).typicality.draws == 7
    assert len(mistakes(path)) == 1


def test_a_section_without_keys_means_its_defaults(write):
    assert load(write(MINIMAL + "typicality:\n")).typicality == Typicality()


def test_overrides_do_not_reach_through_yaml_aliases(write):
    path = write(MINIMAL + "typicality: &x {batch_size: 2}\nfeatures: *x\n")
    config = load(path, ["--features.batch_size", "3"])
    assert (config.typicality.batch_size, config.features.batch_size) == (2, 3)


def test_a_uri_can_hold_the_file(write):
    assert load(f"file://{write(MINIMAL)}") == load(write(MINIMAL))


# ---------------------------------------------------------------------------------------------------------- round trip

AWKWARD = [
    "null",
    "1e-4",
    "yes",
    "2020-01-01",
    "a: b",
    "'",
    '"',
    "# x",
    "~",
    "0123",
    "été\n",
    " ",
    "{}",
    "- a",
    "x" * 300,
]


@pytest.mark.parametrize("text", AWKWARD)
def test_to_yaml_reads_back(write, text):
    config = Config(
        output=absolute(text),
        dataset=Dataset(source=absolute(text), layout="table", boxes=absolute(text), split=text),
        prompt=Prompt(template=f"{text.replace('{}', '')}{{label}}"),
        seed=2**63 - 1,
    )
    assert load(write(to_yaml(config))) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_to_yaml_has_every_key(write, path):
    config = load(path)
    text = to_yaml(config)
    assert load(write(text)) == config
    tree = yaml.safe_load(text)
    for setting in settings():
        node = tree
        for key in setting.split("."):
            node = node[key]


# ------------------------------------------------------------------------------------------------------------ mistakes


ONE_LABEL = "allowed: a text that contains {label} exactly once and no other braces"
T_RANGE = "allowed: t_min below t_max, with at least one timestep of 0..999 between them"
KEYS = "allowed: a section with the keys k, scope, restarts"
PAIRED = "typicality.draws, typicality.max_draws, typicality.sampler"
PAIRS = "allowed: even numbers of at least 4, as draws come in mirrored pairs"
OTHERS = "got others with labels own; allowed: with labels all or a list, so that there are others to compare with"
FOURS = "allowed: whole number >= 8, a multiple of 4"
LABELS = "allowed: own or all or a list of texts"


def test_every_mistake_is_listed_with_path_and_allowed_values(write):
    path = write(
        """
seed: true
dataset: {layout: foldr, split: 2017, image: 5}
typicality: {draws: many, drws: 3, t_min: 0.8, t_max: 0.2}
compute: {workers: 0}
finetune: {steps: 3, steps: 4, ema_decay: .nan}
prompt: {template: "a {label} {label}"}
typicality.draws: 3
"""
    )
    assert mistakes(
        path, "--features.timestep", "1000", "--compute.shard_images", "--draws", "4", "--clusters", "3", "x"
    ) == [
        f"{path}, line 6: key 'steps' is given twice; remove one",
        "--compute.shard_images: no value; allowed: whole number >= 1",
        "--draws: unknown setting; perhaps you meant --typicality.draws",
        "--clusters: a section; set one of --clusters.k, --clusters.scope, --clusters.restarts",
        "x: stray argument; a setting is given as --section.key value",
        "output: required (run folder: a path or an object-store URI); set it in the file or add --output VALUE",
        "seed: got true; allowed: whole number >= 0",
        f"dataset.source: required ({settings()['dataset.source'].description}); "
        "set it in the file or add --dataset.source VALUE",
        'dataset.layout: got "foldr"; allowed: folder or table or toytown',
        "dataset.split: got 2017; allowed: non-empty text or null (put it in quotes)",
        "dataset.image: got 5; allowed: a section with the keys short_side, multiple_of",
        f'prompt.template: got "a {{label}} {{label}}"; {ONE_LABEL}',
        "finetune.ema_decay: got NaN; allowed: number >= 0, < 1",
        'typicality.draws: got "many"; allowed: whole number >= 2 or auto',
        "typicality.drws: unknown setting; perhaps you meant typicality.draws",
        "--features.timestep: got 1000; allowed: whole number >= 0, <= 999",
        "compute.workers: got 0; allowed: whole number >= 1 or auto",
        "'typicality.draws': dots are for the command line; in the file write draws under typicality",
        f"typicality.t_min, typicality.t_max: got 0.8 and 0.2; {T_RANGE}",
    ]


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("typicallity: {draws: 3}", "typicallity", "unknown setting; perhaps you meant typicality"),
        ("draws: 3", "draws", "unknown setting; perhaps you meant typicality.draws"),
        ("zzz: 3", "zzz", f"unknown setting; allowed: {', '.join(Config.model_fields)}"),
        ("clusters: {restart: 3}", "clusters.restart", "unknown setting; perhaps you meant clusters.restarts"),
        ("clusters: {qq: 3}", "clusters.qq", "unknown setting; allowed in clusters: k, scope, restarts"),
        ("clusters: {draws: 3}", "clusters.draws", "unknown setting; perhaps you meant typicality.draws"),
        ("clusters: 5", "clusters", f"got 5; {KEYS}"),
        ("clusters: [1]", "clusters", f"got [1]; {KEYS}"),
        ("clusters: true", "clusters", f"got true; {KEYS}"),
        ("seed: null", "seed", "got null; allowed: whole number >= 0"),
        ("seed: 1.5", "seed", "got 1.5; allowed: whole number >= 0"),
        ("seed: -1", "seed", "got -1; allowed: whole number >= 0"),
        ("finetune: {enabled: maybe}", "finetune.enabled", 'got "maybe"; allowed: true or false'),
        ("finetune: {learning_rate: 0}", "finetune.learning_rate", "got 0; allowed: number > 0"),
        ("finetune: {learning_rate: .inf}", "finetune.learning_rate", "got Infinity; allowed: number > 0"),
        ("finetune: {label_dropout: 1}", "finetune.label_dropout", "got 1; allowed: number >= 0, < 1"),
        ("finetune: {crop: true}", "finetune.crop", "got true; allowed: whole number >= 1 or null"),
        ("patches: {size: 0}", "patches.size", "got 0; allowed: whole number >= 1"),
        ("model: {dtype: float8}", "model.dtype", 'got "float8"; allowed: float32 or bfloat16 or float16'),
        ("prompt: {template: An image.}", "prompt.template", f'got "An image."; {ONE_LABEL}'),
        ("prompt: {template: 'a {age} {label}'}", "prompt.template", f'got "a {{age}} {{label}}"; {ONE_LABEL}'),
        (
            "prompt: {null_prompt: 'a {label}'}",
            "prompt.null_prompt",
            'got "a {label}"; allowed: a text without braces; the null prompt has no label',
        ),
        ("typicality: {t_min: 0.7}", "typicality.t_min, typicality.t_max", f"got 0.7 and 0.7; {T_RANGE}"),
        ("typicality: {t_min: 0.6999}", "typicality.t_min, typicality.t_max", f"got 0.6999 and 0.7; {T_RANGE}"),
        ("finetune: {t_min: 0.7, t_max: 0.7}", "finetune.t_min, finetune.t_max", f"got 0.7 and 0.7; {T_RANGE}"),
        (
            "finetune: {workers: 65}",
            "finetune.workers, finetune.batch_size",
            "got 65 and 64; allowed: at most as many workers as images per step",
        ),
        (
            "finetune: {warmup_steps: 9000, decay_steps: 1001}",
            "finetune.warmup_steps, finetune.decay_steps, finetune.steps",
            "got 9000, 1001 and 10000; allowed: the first two within the steps",
        ),
        ("finetune: {epochs: 0}", "finetune.epochs", "got 0; allowed: number > 0 or null"),
        (
            "finetune: {epochs: 2, images: 100}",
            "finetune.epochs, finetune.images",
            "got 2 and 100; allowed: one of them, or neither and steps",
        ),
        (
            "finetune: {patience: 3}",
            "finetune.patience, dataset.finetune_split",
            "got 3 and 0; allowed: patience where images are held out, as 0.1 of them",
        ),
        (
            "finetune: {prompt_columns: {region: 0.5}}",
            "finetune.prompt_columns, dataset.group_column, dataset.layout",
            "got column region with layout folder; allowed: with layout table",
        ),
        (
            "finetune: {prompt_columns: {region: 2}}",
            "finetune.prompt_columns",
            "got 2; allowed: a mapping of names to a number >= 0, <= 1 each",
        ),
        (
            "finetune: {trackers: [comet]}",
            "finetune.trackers",
            'got "comet"; allowed: a list of tensorboard, wandb, mlflow',
        ),
        (
            "finetune: {sharding: full, lora_rank: 4}",
            "finetune.sharding, finetune.lora_rank",
            "got full and 4; allowed: one of them, as adapters are too small to be spread",
        ),
        ("typicality: {draws: 7}", PAIRED, f"got draws 7; {PAIRS}"),
        ("typicality: {draws: 2, max_draws: 9}", PAIRED, f"got draws 2 and max_draws 9; {PAIRS}"),
        ("typicality: {draws: 7, sampler: antithetic}", PAIRED, f"got draws 7; {PAIRS}"),
        (
            "typicality: {draws: auto, sampler: stratified}",
            "typicality.draws, typicality.sampler",
            "got auto with stratified; allowed: a number, or sampler allocated, which has a pilot",
        ),
        (
            "typicality: {draws: auto, racing: true}",
            "typicality.racing, typicality.draws",
            "got racing with auto; allowed: at least 20 draws, which are dealt out over the rounds",
        ),
        ("typicality: {draws: 3.5}", "typicality.draws", "got 3.5; allowed: whole number >= 2 or auto"),
        (
            "typicality: {pilot_draws: 10}",
            "typicality.pilot_draws",
            f"got 10; {FOURS}",
        ),
        (
            "typicality: {pilot_draws: 4}",
            "typicality.pilot_draws",
            f"got 4; {FOURS}",
        ),
        ("patches: {fresh_draws: 5}", "patches.fresh_draws", "got 5; allowed: whole number >= 4, a multiple of 2"),
        ("typicality: {against: others}", "typicality.against, typicality.labels", OTHERS),
        (
            "typicality: {against: others, labels: all, racing: true}",
            "typicality.racing, typicality.against",
            "got racing against others; allowed: racing against null, as who stays in a race is decided by T",
        ),
        ("typicality: {labels: some}", "typicality.labels", f'got "some"; {LABELS}; a list is written [some]'),
        ("typicality: {labels: [1920, a]}", "typicality.labels", f"got [1920, 'a']; {LABELS}"),
    ],
)
def test_mistake(write, text, path, expected):
    assert mistakes(write(MINIMAL + text)) == [f"{path}: {expected}"]


@pytest.mark.parametrize(
    ("dataset", "path", "expected"),
    [
        (
            "{source: s, image: {multiple_of: 12}}",
            "dataset.image.multiple_of",
            "got 12; allowed: whole number >= 8, a multiple of 8",
        ),
        (
            "{source: s, image: {short_side: 64, multiple_of: 128}}",
            "dataset.image.multiple_of, dataset.image.short_side",
            "got 128 and 64; allowed: multiple_of at most short_side",
        ),
        (
            "{source: s, image: {short_side: 48}}",
            "patches.size, dataset.image.short_side",
            "got 64 and 48; allowed: patches no larger than the short side of the prepared images",
        ),
        (
            "{source: toytown, layout: toytown, boxes: b.csv}",
            "dataset.layout, dataset.boxes, dataset.split",
            "got layout toytown with boxes; allowed: null, as toytown brings its own boxes and no splits",
        ),
        (
            "{source: .}",
            "output, dataset.source, dataset.layout, dataset.split",
            "got out; allowed: a folder outside the source, or the run's files would be taken for images",
        ),
        ("{source: ''}", "dataset.source", 'got ""; allowed: non-empty text'),
    ],
)
def test_mistake_of_the_dataset(write, dataset, path, expected):
    assert mistakes(write(f"output: out\ndataset: {dataset}")) == [f"{path}: {expected}"]


def test_output_beside_the_split_is_fine(write):
    path = write("output: s3://b/geo/runs\ndataset: {source: s3://b/geo, split: train}")
    assert load(path).dataset.split == "train"
    assert len(mistakes(path, "--dataset.split", "null")) == 1


def test_cross_field_checks_run_beside_other_mistakes_but_not_on_what_errs(write):
    path = write(MINIMAL + "seed: x\ntypicality: {t_min: 0.9}\nfinetune: {workers: 99, batch_size: x}")
    assert [m.split(":")[0] for m in mistakes(path)] == [
        "seed",
        "finetune.batch_size",
        "typicality.t_min, typicality.t_max",
    ]


def test_mistakes_of_scoring_come_together_with_others(write):
    path = write(
        MINIMAL + "seed: x\ntypicality: {draws: 7, against: others, pilot_draws: 6}\npatches: {fresh_draws: 5}"
    )
    assert mistakes(path, "--clusters.k", "0") == [
        'seed: got "x"; allowed: whole number >= 0',
        f"typicality.pilot_draws: got 6; {FOURS}",
        "patches.fresh_draws: got 5; allowed: whole number >= 4, a multiple of 2",
        "--clusters.k: got 0; allowed: whole number >= 1",
        f"{PAIRED}: got draws 7; {PAIRS}",
        f"typicality.against, typicality.labels: {OTHERS}",
    ]


def test_cross_field_checks_hold_for_configs_made_in_python():
    with pytest.raises(ValidationError, match="t_min below t_max"):
        Config(output="o", dataset=Dataset(source="s"), typicality=Typicality(t_min=0.8))
    with pytest.raises(ValidationError, match="frozen"):
        Typicality().draws = 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\n  x: [", "line 2: not YAML (mapping values are not allowed here)"),
        ("seed: 1\nx: [1\n", "line 3: not YAML (expected ',' or ']', but got '<stream end>')"),
        ("a: 1\n---\nb: 2", "line 2: not YAML (but found another document)"),
        ("- a\n- b", ": got ['a', 'b']; allowed: sections with keys, as in `dataset: {source: photos}`"),
        ("", ": got null; allowed: sections with keys, as in `dataset: {source: photos}`"),
        ("x: !!python/object:os.system 1", "line 1: not YAML (could not determine a constructor for the tag "
                                           "'tag:yaml.org,2002:python/object:os.system')"),
    ],
)  # fmt: skip
def test_bad_yaml_is_reported_with_its_line_and_with_the_bad_flags(write, text, expected):
    first, second, third = mistakes(write(text), "--typicality.draw", "5", "--seed", "x")
    assert first.endswith(expected)
    assert second == "--typicality.draw: unknown setting; perhaps you meant --typicality.draws"
    assert third == '--seed: got "x"; allowed: whole number >= 0'


def test_missing_file_and_folder(tmp_path):
    for path, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        assert mistakes(path) == [f"{path}: cannot be read ({reason}); give the path of a YAML file"]


def test_the_folder_of_a_run_in_place_of_a_config(tmp_path):
    (tmp_path / "run.yaml").write_text(MINIMAL)
    assert mistakes(f"{tmp_path}/") == [
        f"{tmp_path}/: is a run; give {tmp_path}/run.yaml, with which diffmine mine continues it"
    ]


def test_a_text_in_place_of_a_list_on_the_command_line(write):
    [trackers, labels] = mistakes(write(MINIMAL), "--typicality.labels", "hat, t-shirt", "--finetune.trackers", "wandb")
    assert trackers.endswith("; a list is written '[wandb]'")
    assert labels == f"--typicality.labels: got \"hat, t-shirt\"; {LABELS}; a list is written '[hat, t-shirt]'"
    [wrong] = mistakes(write(MINIMAL), "--finetune.trackers", "[comet]")
    assert wrong.endswith("allowed: a list of tensorboard, wandb, mlflow")


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"output: \xff\xfe")
    [mistake] = mistakes(tmp_path / "c.yaml")
    assert "not YAML" in mistake


def test_yaml_that_contains_itself(write):
    assert len(mistakes(write("output: o\ndataset: &a {source: *a}"))) == 1


# ---------------------------------------------------------------------------------------------------------------- flags


def test_settings_are_frozen():
    """Other people's files and scripts use these names: adding is fine, renaming or removing needs a word to them."""
    assert {section: " ".join(keys) for section, keys in sections().items()} == {
        "": "output seed dataset prompt model finetune typicality patches features clusters report compute",
        "dataset": "source layout boxes split limit_per_label finetune_split group_column image",
        "dataset.image": "short_side multiple_of",
        "prompt": "template null_prompt",
        "model": "base text_encoder dtype",
        "finetune": "enabled steps epochs images batch_size learning_rate warmup_steps decay_steps weight_decay "
        "max_grad_norm t_min t_max min_snr_gamma label_dropout multi_label prompt_columns balance_labels posterior "
        "crop ema_decay lora_rank validate_every validation_images validation_draws best_by patience samples_per_label "
        "sample_every checkpoint_every workers micro_batch gradient_checkpointing sharding compile trackers",
        "typicality": "draws relative_error max_draws t_min t_max sampler pilot_images pilot_draws labels against "
        "racing racing_confidence batch_size compile",
        "patches": "size per_image per_label fresh_per_label fresh_draws",
        "features": "timestep up_block ensemble batch_size",
        "clusters": "k scope restarts",
        "report": "enabled patches_per_cluster clusters_per_label beside whole_images",
        "compute": "workers device open_cluster shard_images max_image_pixels max_image_bytes stall_seconds",
    }


def test_every_setting_is_described():
    assert all(s.description and s.allowed for s in settings().values())
