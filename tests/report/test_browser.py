"""The overview in a real browser, from a file: what its script makes of the address."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from fake_run import loader, settings, tables

from diffmine.report.site import build

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=2000 --dump-dom"
)
LABELS = ["Genève", "Zürich", "Bern 10", "Bern 9"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    for name, data in build(tables(LABELS), settings(), loader()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def shown(site: Path, address: str) -> tuple[list[str], str]:
    """Labels that are seen, in their order, and how many the page says there are."""
    with tempfile.TemporaryDirectory() as profile:
        command = [str(CHROMIUM), *OPTIONS.split(), f"--user-data-dir={profile}", f"file://{site}/index.html{address}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in ended.stderr, ended.stderr
    articles = re.findall(r'<article class="label"[^>]*?data-name="([^"]*)"[^>]*?( hidden="")?>', ended.stdout)
    assert sorted(name for name, _ in articles) == sorted(LABELS)
    said = re.search(r"<output[^>]*>([^<]*)</output>", ended.stdout)
    assert said
    assert '<form class="find" role="search">' in ended.stdout, "the form is shown where scripts run"
    return [name for name, hidden in articles if not hidden], said[1]


def test_labels_are_sorted_and_searched_by_the_address(site: Path) -> None:
    everything, said = shown(site, "")
    assert (len(everything), said) == (4, "")
    assert shown(site, "#sort=name")[0] == ["Bern 9", "Bern 10", "Genève", "Zürich"]
    assert shown(site, "#q=%20GENEVE&sort=nonsense") == (["Genève"], "1 of 4 labels")
    assert shown(site, "#q=bern&sort=name") == (["Bern 9", "Bern 10"], "2 of 4 labels")
    assert shown(site, "#q=%3Cscript%3Ealert(1)%3C/script%3E") == ([], "0 of 4 labels")
