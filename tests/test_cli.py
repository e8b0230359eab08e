"""The command: exit codes, what goes to which stream, and that nothing starts on a bad config."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffmine import __version__
from diffmine.cli import main
from diffmine.config import Config
from diffmine.configfile import settings
from diffmine.errors import DiffmineError, InputError, NonFiniteError, StageError, StaleRunError, StoreError

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / "configs" / "toytown.yaml")


class Pipeline:
    """Stands in for diffmine.pipeline: notes the calls, ends as told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Config, bool]] = []
        self.error: BaseException | None = None

    def mine(self, config: Config, rerun: bool = False) -> str:
        self.calls.append((config, rerun))
        if self.error:
            raise self.error
        print("something on the way")
        return "s3://bucket/run"


@pytest.fixture
def pipeline(monkeypatch):
    pipeline = Pipeline()
    monkeypatch.setitem(sys.modules, "diffmine.pipeline", SimpleNamespace(mine=pipeline.mine))
    return pipeline


def test_mine_prints_the_run_last(pipeline, capsys):
    assert main(["mine", CONFIG, "--typicality.draws", "6"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "s3://bucket/run"
    [(config, rerun)] = pipeline.calls
    assert (config.typicality.draws, rerun) == (6, False)


def test_rerun_is_passed_on(pipeline):
    assert main(["mine", CONFIG, "--rerun", "--seed", "4"]) == 0
    [(config, rerun)] = pipeline.calls
    assert (config.seed, rerun) == (4, True)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("w"), 2),
        (StaleRunError("w"), 2),
        (StageError("w"), 1),
        (StoreError("w"), 1),
        (NonFiniteError("w"), 1),
        (DiffmineError("w"), 1),
    ],
    ids=lambda e: type(e).__name__,
)
def test_errors_are_plain_and_have_their_exit_code(pipeline, capsys, error, code):
    pipeline.error = error
    assert main(["mine", CONFIG]) == code
    assert capsys.readouterr() == ("", "diffmine: w\n")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(130), 130, "interrupted"),
        (SystemExit(143), 143, "ended by SIGTERM"),
    ],
)
def test_signals(pipeline, capsys, error, code, said):
    pipeline.error = error
    assert main(["mine", CONFIG]) == code
    kept = "what is committed is kept, and the same command goes on"
    assert capsys.readouterr() == ("", f"diffmine: {said}; {kept}\n")


def test_an_unexpected_error_shows_its_traceback(pipeline, capsys):
    pipeline.error = ZeroDivisionError("oh")
    assert main(["mine", CONFIG]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" in err
    assert "ZeroDivisionError: oh" in err


@pytest.mark.parametrize("command", ["mine", "plan"])
def test_a_bad_config_starts_and_writes_nothing(pipeline, capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("output: out\ndataset: {source: photos}\nseed: x\npatches: {size: 0}\n")
    assert main([command, "c.yaml", "--typicality.draw", "3"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err
    for mistake in ("seed: got", "patches.size: got 0", "--typicality.draw: unknown setting; perhaps you meant --typ"):
        assert mistake in err
    assert pipeline.calls == []
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "a command is needed; allowed: mine, plan"),
        (["mien", CONFIG], "got command 'mien'; perhaps you meant mine"),
        (["zzz"], "got command 'zzz'; allowed: mine, plan"),
        (["mine"], "the config file comes first: diffmine mine CONFIG.yaml"),
        (["mine", "--seed", "3", CONFIG], "the config file comes first: diffmine mine CONFIG.yaml"),
        (["mine", CONFIG, "--tflops", "3"], "--tflops: unknown setting"),
        (["plan", CONFIG, "--tflops", "fast"], "--tflops: got 'fast'; allowed: number > 0"),
        (["plan", CONFIG, "--price=-1"], "--price: got '-1'; allowed: number > 0"),
        (["plan", CONFIG, "--tflops"], "--tflops: got ''; allowed: number > 0"),
        (["mine", "none.yaml"], "none.yaml: cannot be read (No such file or directory)"),
    ],
)
def test_bad_arguments(pipeline, capsys, argv, expected):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert expected in err
    assert pipeline.calls == []


def test_help(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in ("mine", "plan"))


@pytest.mark.parametrize(("command", "options"), [("mine", ["--rerun"]), ("plan", ["--tflops", "--price", "--aspect"])])
def test_help_of_a_command_lists_its_options_and_every_setting(capsys, command, options):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    flags = [line.split()[0] for line in out.splitlines() if line.startswith("  --")]
    assert flags == [*options, *(f"--{path}" for path in settings())]
    assert 'default "An image of {label}."' in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 120


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffmine {__version__}\n"


def test_plan(capsys):
    assert (
        main(["plan", CONFIG, "--model.base", "a/b", "--tflops=0.1", "--price", "2", "--typicality.draws", "10"]) == 0
    )
    out = capsys.readouterr().out
    assert "1,050 images, 7 labels, 1,050 (image, label) pairs; 16 x 16 cells" in out
    [line] = [line for line in out.splitlines() if line.startswith("typicality ") and "B" not in line]
    assert line.split()[1] == f"{1050 * 10 * 2 + 16 * 32 * 2:,}"  # and the pilot


@pytest.mark.parametrize(
    ("argv", "code"), [(["mine", "--help"], 0), (["mine", CONFIG, "--sed", "3"], 2), (["--help"], 0)], ids=str
)
def test_help_and_mistakes_wait_for_no_heavy_import(argv, code):
    program = f"import sys\nfrom diffmine.cli import main\ncode = main({argv!r})\n"
    program += "print(code, *sorted({'ray', 'torch', 'pyarrow', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(code)


def test_the_job_is_the_command():
    done = subprocess.run(
        [sys.executable, "jobs/mine.py", CONFIG, "--seed", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert '--seed: got "x"; allowed: whole number >= 0' in done.stderr


@pytest.mark.parametrize("argv", [["--help"], ["plan", CONFIG]], ids=str)
def test_a_reader_that_has_enough_gets_no_traceback(argv):
    """As in `diffmine plan ... | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "diffmine", *argv], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
