"""Command line -> a call, its output and an exit code.

0 = done, 1 = a stage failed, 2 = bad config or arguments (nothing started), 130 = interrupted, 143 = ended by SIGTERM.
"""

import difflib
import json
import os
import select
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

from diffmine import __version__
from diffmine.errors import DiffmineError, InputError

if TYPE_CHECKING:
    from diffmine.config import Config
    from diffmine.run import Run

# Imported where they are used, so that help and bad arguments wait for nothing: the config (0.2 s), the stages (ray).

_SUMMARY = {
    "mine": "run what is missing of a run; the last line of standard output is the run's path or URI",
    "plan": "what a run would do: images, UNet passes, bytes, hours and cost; writes nothing",
    "status": "how far a run is: stages, shards, failures and the first of them, speed, time and cost",
    "verify": "read every committed file of a run again: digests, rows, each image a result or a failure",
    "report": "make the report of a run anew, or take a curator's words into it",
    "export": "write a run's patches to a folder, for other tools",
    "retry-failed": "try the images of a run that failed once more; if some can be read now, what looks at all images "
    "(patches and what follows) is made again and is missing meanwhile, else nothing is changed",
}
_OF_A_RUN = ("status", "verify", "report", "export", "retry-failed")  # commands that take a run's folder, not a config
_OPTIONS = {
    "mine": {"--rerun": "remove the stages that another config made, and run them again"},
    "plan": {
        "--tflops RATE": "what one device reaches in use, in TFLOP/s; gives hours",
        "--price COST": "of one device for an hour; with --tflops gives the cost",
        "--aspect RATIO": "longer side of the images over the shorter (default 1 for toytown, else 1.333)",
    },
    "status": {"--price COST": "of the run's machines for an hour; gives the cost so far"},
    "verify": {},
    "report": {"--curation FILE": "JSON that the report's pages exported: names, notes, stars, what to hide"},
    "export": {
        "--to FORMAT": "coco, csv, fiftyone or huggingface",
        "--kinds KINDS": "of top, random, bottom, with commas between them (default top)",
        "DESTINATION": "an empty or new folder: a path or an object-store URI",
    },
    "retry-failed": {"--all": "compute all shards with failures again, without a look: for reason non_finite"},
}
_ENDED = {130: "interrupted", 143: "ended by SIGTERM"}  # exit codes
_KEPT = "what is committed is kept, and the same command goes on"
_NEEDED = ("--to FORMAT", "DESTINATION")


def command(argv: Sequence[str] | None = None) -> None:
    """What the command is, as a process: `main`, and an end at once when a signal asks for it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    code = main(argv)
    if code in _ENDED:  # threads still wait for Ray, which would end this process with a code of its own
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; the exit code. Results go to standard output, everything else to standard error."""
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # or a thread that outlives an interrupted run starts Ray once more
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except DiffmineError as error:
        print(f"diffmine: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print(f"diffmine: interrupted; {_KEPT}", file=sys.stderr)
        return 130
    except SystemExit as ended:
        if not isinstance(ended.code, int) or ended.code not in _ENDED:
            raise
        print(f"diffmine: {_ENDED[ended.code]}; {_KEPT}", file=sys.stderr)
        return ended.code
    except BrokenPipeError:
        if _unread():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still holds back
        else:
            traceback.print_exc()
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def _unread() -> bool:
    """Whether whoever read standard output has gone, as `head` does."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0))


def _run(argv: list[str]) -> int:
    command = argv[0] if argv else ""
    if command in ("-h", "--help"):
        print(_help())
    elif command == "--version":
        print(f"diffmine {__version__}")
    elif command not in _SUMMARY:
        close = difflib.get_close_matches(command, _SUMMARY, n=1)
        hint = f"perhaps you meant {close[0]}" if close else f"allowed: {', '.join(_SUMMARY)}; see diffmine --help"
        raise InputError(f"got command {command!r}; {hint}" if command else f"a command is needed; {hint}")
    elif "-h" in argv or "--help" in argv:
        print(_command_help(command))
    elif len(argv) < 2 or argv[1].startswith("-"):
        first = "run's folder" if command in _OF_A_RUN else "config file"
        raise InputError(f"the {first} comes first: {_usage(command)}")
    elif command in _OF_A_RUN:
        return _of_a_run(command, argv[1], argv[2:])
    elif command == "mine":
        _mine(argv[1], argv[2:])
    else:
        _plan(argv[1], argv[2:])
    return 0


def _mine(path: str, tokens: list[str]) -> None:
    from diffmine.configfile import load

    rerun = "--rerun" in tokens
    config = load(path, [token for token in tokens if token != "--rerun"])
    from diffmine.pipeline import mine

    print(mine(config, rerun=rerun), flush=True)


def _plan(path: str, tokens: list[str]) -> None:
    from diffmine import plan
    from diffmine.configfile import load

    numbers = {name: _take(tokens, name) for name in ("--tflops", "--price", "--aspect")}
    config = load(path, tokens)
    aspect = numbers["--aspect"] or (1.0 if config.dataset.layout == "toytown" else 4 / 3)
    planned = plan.plan(config, plan.count(config), max(aspect, 1 / aspect))
    print(plan.render(planned, numbers["--tflops"], numbers["--price"]))


def _of_a_run(command: str, uri: str, tokens: list[str]) -> int:
    from diffmine import audit

    price = _take(tokens, "--price") if command == "status" else None
    curation = _take_text(tokens, "--curation") if command == "report" else None
    if command == "export":
        return _export(uri, tokens)
    every = command == "retry-failed" and "--all" in tokens
    if rest := [token for token in tokens if not (every and token == "--all")]:
        raise InputError(f"got {' '.join(rest)}; {_usage(command)}")
    run, config = audit.open_run(uri)
    if command == "status":
        print("\n".join(audit.status(run, config, price)))
    elif command == "verify":
        problems, left = audit.verify(run), audit.not_done(run, config)
        whole = f"whole so far; not done: {', '.join(left)}" if left else "whole"
        print("\n".join(problems) if problems else f"{run.uri}: {whole}")
        return 1 if problems else 0
    elif command == "report":
        _report(run, config, curation)
    else:
        from diffmine.pipeline import retry_failed

        print(retry_failed(run, config, every), flush=True)
    return 0


def _report(run: "Run", config: "Config", curation: str | None) -> None:
    """Only the words on clusters, where there are new ones; else the whole site."""
    from diffmine import curate, pipeline

    if curation is None:
        pipeline.remake_report(run, config)
    else:
        count = curate.curate(run, curation)
        print(f"diffmine: words on {count:,} cluster{'s' if count != 1 else ''} are in the report", file=sys.stderr)
    print(f"{run.uri}/report/index.html", flush=True)


def _export(uri: str, tokens: list[str]) -> int:
    """Write a run's patches; the destination goes to standard output."""
    from diffmine import audit
    from diffmine.export import export

    to, kinds = _take_text(tokens, "--to"), _take_text(tokens, "--kinds")
    if to is None or len(tokens) != 1 or tokens[0].startswith("-"):
        raise InputError(f"a format and one destination are needed: {_usage('export')}")
    run, config = audit.open_run(uri)
    count = export(run, config, to, tokens[0], kinds.split(",") if kinds is not None else ("top",))
    print(f"diffmine: {count:,} patches", file=sys.stderr)
    print(tokens[0], flush=True)
    return 0


def _take(tokens: list[str], name: str) -> float | None:
    """Take an option with a number > 0 out of the arguments."""
    text = _take_text(tokens, name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"{name}: got {text!r}; allowed: number > 0")
    return value


def _take_text(tokens: list[str], name: str) -> str | None:
    """Take an option and its value out of the arguments."""
    for i, token in enumerate(tokens):
        if token.partition("=")[0] == name:
            text = token.partition("=")[2] if "=" in token else "".join(tokens[i + 1 : i + 2])
            del tokens[i : i + (1 if "=" in token else 2)]
            return text
    return None


# --------------------------------------------------------------------------------------------------------------- help


def _help() -> str:
    return "\n".join(
        [
            "diffmine: find what is visually typical of the labels of an image dataset",
            "",
            "usage: diffmine COMMAND CONFIG.yaml [--section.key VALUE ...]",
            "       diffmine COMMAND RUN",
            "",
            *_table(_SUMMARY),
            "",
            "diffmine mine --help lists every setting; configs/ holds examples.",
        ]
    )


def _usage(command: str) -> str:
    options = "".join(f" {option}" if option in _NEEDED else f" [{option}]" for option in _OPTIONS[command])
    return f"diffmine {command} {'RUN' if command in _OF_A_RUN else 'CONFIG.yaml [--section.key VALUE ...]'}{options}"


def _command_help(command: str) -> str:
    from diffmine.configfile import settings

    summary = textwrap.wrap(_SUMMARY[command], _width())
    lines = [f"usage: {_usage(command)}", "", *summary, "", *_table(_OPTIONS[command])]
    if command in _OF_A_RUN:
        return "\n".join(lines).rstrip()
    lines += ["", "settings: keys of CONFIG.yaml; a flag, behind the file's name, overrides the key in it"]
    group = None
    for setting in settings().values():
        section = setting.path.rpartition(".")[0]
        if section != group:
            group = section
            lines += ["", section] if section else [""]
        default = "required" if setting.required else f"default {json.dumps(setting.default)}"
        lines += _table({f"--{setting.path}": f"{setting.description} ({setting.allowed}; {default})"})
    return "\n".join(lines)


def _table(rows: dict[str, str]) -> list[str]:
    lines = []
    for left, right in rows.items():
        lines += textwrap.wrap(f"  {left:<30} {right}", _width(), subsequent_indent=" " * 33, break_on_hyphens=False)
    return lines


def _width() -> int:
    return max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
