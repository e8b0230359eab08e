"""YAML file and command line -> a config, merged, then validated once; every mistake is listed.

Overrides are read here and not by tyro, which ends the program with one kind of mistake at a time (unknown flags, then
missing ones, then values), before the file is looked at, and takes neither `--finetune.enabled false` nor `null`. Here
a flag is a path into the tree of the file: both are checked by the same rules and their mistakes come in one list.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from diffmine.config import FIELDS_ONLY, Config, absolute, cross_check, within
from diffmine.errors import InputError

# -------------------------------------------------------------------------------------------- what there is to be set


@dataclass(frozen=True)
class Setting:
    """One key of the config, as help texts and mistakes name it."""

    path: str  # "section.key"
    allowed: str
    description: str
    default: Any
    required: bool
    nullable: bool
    text: bool  # only text is allowed, so what the command line gives is taken as it stands
    listed: bool  # a list is allowed


@cache
def settings() -> dict[str, Setting]:
    """Path -> setting, in the order of the file."""
    schema = Config.model_json_schema()
    return {setting.path: setting for setting in _leaves(schema, schema["$defs"], "")}


@cache
def sections() -> dict[str, list[str]]:
    """Section ("" is the top) -> names of its keys."""
    found: dict[str, list[str]] = {}
    for path in settings():
        parts = path.split(".")
        for depth, name in enumerate(parts):
            keys = found.setdefault(".".join(parts[:depth]), [])
            if name not in keys:
                keys.append(name)
    return found


def _leaves(schema: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str) -> Iterator[Setting]:
    for name, field in schema["properties"].items():
        if "$ref" in field:
            yield from _leaves(definitions[field["$ref"].rsplit("/", 1)[1]], definitions, f"{prefix}{name}.")
            continue
        kinds = field.get("anyOf", [field])
        yield Setting(
            path=prefix + name,
            allowed=" or ".join(_allowed(kind) for kind in kinds),
            description=field["description"],
            default=field.get("default"),
            required=name in schema.get("required", ()),
            nullable=any(kind["type"] == "null" for kind in kinds),
            text=all(kind["type"] in ("string", "null") for kind in kinds),
            listed=any(kind["type"] == "array" for kind in kinds),
        )


_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _allowed(kind: Mapping[str, Any]) -> str:
    """JSON schema of a value -> what is allowed, in words."""
    if "const" in kind or "enum" in kind:
        return " or ".join(kind.get("enum", [kind.get("const")]))
    if kind["type"] == "array":
        one_of = kind["items"].get("enum")
        return f"a list of {', '.join(one_of)}" if one_of else "a list of texts"
    if kind["type"] == "object":
        return f"a mapping of names to a {_allowed(kind['additionalProperties'])} each"
    names = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "string": "text",
        "null": "null",
    }
    ranges = [f"{sign} {kind[key]:g}" for key, sign in _SIGNS.items() if key in kind and kind[key] < 2**53]
    of = [f"a multiple of {kind['multipleOf']}"] if "multipleOf" in kind else []
    name = "non-empty text" if kind.get("minLength") else names[kind["type"]]
    return " ".join([name, ", ".join(ranges + of)]).strip()


# ------------------------------------------------------------------------------------------------------- YAML, strictly


class _Loader(yaml.SafeLoader):
    """YAML with 1e-4 as a number (PyYAML reads a text) and without dates; notes the keys given twice."""

    def __init__(self, stream: bytes | str) -> None:
        super().__init__(stream)
        self.repeated: list[tuple[int, str]] = []  # (line, key)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                self.repeated.append((key.start_mark.line + 1, key.value))
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as the text that it is."""


_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def to_yaml(config: Config) -> str:
    """A config file with every key, which `load` reads back to an equal config."""
    tree = config.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


def _read(path: str) -> tuple[dict[Any, Any] | None, list[str]]:
    """File -> its tree (None if there is none to check) and the mistakes of its form."""
    try:
        data = _bytes(path)
    except (OSError, ImportError, ValueError) as error:
        if _is_run(path):
            return None, [f"{path}: is a run; give {path.rstrip('/')}/run.yaml, with which diffmine mine continues it"]
        reason = getattr(error, "strerror", None) or error
        return None, [f"{path}: cannot be read ({reason}); give the path of a YAML file"]
    try:
        loader = _Loader(data)
        tree = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        return None, [f"{path}{line}: not YAML ({reason})"]
    if not isinstance(tree, dict):
        return None, [f"{path}: got {_shown(tree)}; allowed: sections with keys, as in `dataset: {{source: photos}}`"]
    repeated = [f"{path}, line {line}: key {key!r} is given twice; remove one" for line, key in loader.repeated]
    return tree, repeated


def _bytes(path: str) -> bytes:
    if "://" not in path:
        return Path(path).read_bytes()
    from diffmine.store import read_uri  # a run.yaml in an object store; 0.1 s that other commands need not wait for

    return read_uri(path)


def _is_run(path: str) -> bool:
    try:
        return bool(_bytes(f"{path.rstrip('/')}/run.yaml"))
    except (OSError, ImportError, ValueError):
        return False


# -------------------------------------------------------------------------------------------------------- command line


def _parse(tokens: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """`--section.key value` or `--section.key=value` -> path -> value, and the mistakes; the last of a flag counts."""
    flags: dict[str, Any] = {}
    mistakes = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        name, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--"):
            mistakes.append(f"{token}: stray argument; a setting is given as --section.key value")
            continue
        if not equals and rest and not rest[0].startswith("--"):
            equals, text = "=", rest.pop(0)
        setting = settings().get(name)
        if setting is None:
            mistakes.append(f"--{name}: {_unknown(name, '--')}")
        elif not equals:
            mistakes.append(f"--{name}: no value; allowed: {setting.allowed}")
        else:
            flags[name] = _value(text, setting)
    return flags, mistakes


def _value(text: str, setting: Setting) -> Any:
    if setting.nullable and text.lower() in ("null", "none", "~"):
        return None
    if setting.text:
        return text
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        return text
    return value if isinstance(value, bool | int | float | list | dict) else text


def _merge(tree: Mapping[Any, Any], flags: Mapping[str, Any]) -> dict[Any, Any]:
    """The file's tree with every section there and the flags in their places; the tree itself is left alone."""
    merged = dict(tree)
    for section in filter(None, sections()):
        node, name = _parent(merged, section)
        if node is None:
            continue
        inner = node.get(name)
        if inner is None or isinstance(inner, dict):  # `section:` with nothing under it means its defaults
            node[name] = dict(inner or {})
    for path, value in flags.items():
        node, name = _parent(merged, path)
        if node is not None:  # else the section is no mapping, which is a mistake of its own
            node[name] = value
    return merged


def _parent(tree: Mapping[Any, Any], path: str) -> tuple[dict[Any, Any] | None, str]:
    *above, name = path.split(".")
    node: Any = tree
    for part in above:
        node = node.get(part) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else None), name


# ---------------------------------------------------------------------------------------------------------------- load


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, merge the overrides into it, validate once; local paths are made absolute.

    Args:
        path: YAML file, local or a URI.
        overrides: command-line tokens, `--section.key value` or `--section.key=value`.

    Raises:
        InputError: lists every mistake with its path, what was got and what is allowed.
    """
    tree, mistakes = _read(str(path))
    flags, flag_mistakes = _parse(overrides)
    merged = _merge(tree or {}, flags)
    config, erring = _validate(merged)
    if tree is None:  # what the file would have given is not known
        erring = {p: error for p, error in erring.items() if error["type"] != "missing"}
    mistakes += flag_mistakes + [_mistake(p, error, p in flags) for p, error in erring.items()]
    mistakes += cross_check(config, erring) if tree is not None else []
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise InputError("\n  ".join([f"{count} in the config ({path}) or the arguments:", *mistakes]))
    return _absolute(config)


def _absolute(config: Config) -> Config:
    """The run's own config must mean the same in whatever folder it is read next."""
    dataset, beside = config.dataset, config.report.beside
    source = dataset.source if dataset.layout == "toytown" else absolute(dataset.source)
    placed = {"source": source, "boxes": dataset.boxes and absolute(dataset.boxes)}
    return config.model_copy(
        update={
            "output": absolute(config.output),
            "dataset": dataset.model_copy(update=placed),
            "report": config.report.model_copy(update={"beside": beside and absolute(beside)}),
        }
    )


def _validate(tree: Mapping[Any, Any]) -> tuple[Config, dict[str, Any]]:
    """The config, with defaults in place of what errs, and path -> first error of pydantic there."""
    try:
        return Config.model_validate(tree, context=FIELDS_ONLY), {}
    except ValidationError as error:
        erring: dict[str, Any] = {}
        for item in error.errors():
            erring.setdefault(_path(item), item)
    sound = {path: "?" for path, setting in settings().items() if setting.required}  # no check reads these stand-ins
    for path in settings():
        node, name = _parent(tree, path)
        if node is not None and name in node and not any(within(path, bad) for bad in erring):
            sound[path] = node[name]
    return Config.model_validate(_merge({}, sound), context=FIELDS_ONLY), erring


def _path(item: Mapping[str, Any]) -> str:
    """Path of a setting or a section; an unknown key's own. A union's error names its member last: that is cut off."""
    loc = [str(part) for part in item["loc"]]
    if item["type"] in _UNKNOWN_KEY:
        return ".".join(repr(part) if "." in part else part for part in loc)
    known = (".".join(loc[:n]) for n in range(len(loc), 0, -1))
    return next(path for path in known if path in settings() or path in sections())


_UNKNOWN_KEY = ("extra_forbidden", "invalid_key")


def _mistake(path: str, error: Mapping[str, Any], from_flag: bool) -> str:
    shown = f"--{path}" if from_flag else path
    if error["type"] in _UNKNOWN_KEY:
        return f"{path}: {_unknown(path)}"
    if path in sections():
        return f"{path}: got {_shown(error['input'])}; allowed: a section with the keys {', '.join(sections()[path])}"
    setting = settings()[path]
    if error["type"] == "missing":
        return f"{path}: required ({setting.description}); set it in the file or add --{path} VALUE"
    reason = str(error["ctx"]["error"]) if error["type"] == "value_error" else ""
    unquoted = setting.text and not isinstance(error["input"], str | dict | list | None)
    hint = " (put it in quotes)" if unquoted else ""
    if setting.listed and isinstance(error["input"], str) and not isinstance(error["loc"][-1], int):
        written = f"[{error['input']}]"
        hint = f"; a list is written {repr(written) if from_flag else written}"
    return f"{shown}: got {_shown(error['input'])}; {reason or f'allowed: {setting.allowed}{hint}'}"


def _unknown(path: str, dashes: str = "") -> str:
    """What to say of a path that is no setting."""
    if path.strip("'") in settings() and path not in settings():
        section, _, key = path.strip("'").rpartition(".")
        return f"dots are for the command line; in the file write {key} under {section}"
    if path in sections():
        return f"a section; set one of {', '.join(f'{dashes}{path}.{key}' for key in sections()[path])}"
    section, _, leaf = path.rpartition(".")
    names = [*settings()] if dashes else [*settings(), *sections()]
    if section in sections():
        near = [f"{section}.{key}".lstrip(".") for key in difflib.get_close_matches(leaf, sections()[section], n=1)]
    else:
        near = difflib.get_close_matches(path, names, n=1, cutoff=0.75)
    close = [name for name in near if name in names] or [name for name in names if name.rpartition(".")[2] == leaf]
    if close:
        return f"unknown setting; perhaps you meant {' or '.join(dashes + name for name in close)}"
    known = section if section in sections() else ""
    return f"unknown setting; allowed{f' in {known}' if known else ''}: {', '.join(sections()[known])}"


def _shown(value: Any) -> str:
    scalar = value is None or isinstance(value, str | int | float)
    text = json.dumps(value, ensure_ascii=False) if scalar else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
