"""The report in a real browser, from a disk and from a server: search, maps, keys, addresses, words of a curator."""

import base64
import functools
import http.server
import io
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from fake_run import build, finetuning, image, settings, tables
from PIL import Image

from diffmine.data.images import prepare
from diffmine.report import images
from diffmine.report.beside import beside_files
from diffmine.report.curation import Curation, Words
from diffmine.run import rows_to_table

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LABELS = ["Genève", "Zürich", "Bern 10", "Bern 9", "<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>"]
BERN, OF_THE_BEST = "labels/0002.html", "2-top-0000"  # pages are sorted by label, patches named by LABELS

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian: apt install chromium)")


def halves(image_id: str, label: str) -> np.ndarray:
    """Positive on the left half, negative on the right."""
    return np.repeat([[0.02] * 8 + [-0.02] * 8], 12, axis=0).astype(np.float32)


def map_of_label(image_id: str, label: str) -> np.ndarray:
    return np.full((12, 16), {"arch": 0.02, "door": -0.02}[label], np.float32)


def _hidden() -> tuple[dict[str, pa.Table], Curation, dict[str, pa.Table]]:
    """A run, words that hide some of its clusters, and the run without them.

    Of arch one that does not lead is hidden; of door the leading one, after which comes a small one; of gate all but
    the small one; of wall all.
    """
    found = tables(["arch", "door", "gate", "wall"])
    rows = {name: found[name].to_pylist() for name in ("patches", "clusters", "members")}
    for row in rows["clusters"]:  # the small one was the last
        row["rank"] = {0: 0, 3: 1, 1: 2, 2: 3}[row["rank"]]
    rank = {(row["label"], row["cluster"]): row["rank"] for row in rows["clusters"]}
    third = {row["patch_id"] for row in rows["members"] if rank[row["label"], row["cluster"]] == 2}
    for row in rows["patches"]:  # the next of door is not told apart from zero; arch has the longest bar all the same
        row["stderr"] = 0.0095 if row["label"] == "arch" else 0.008 if row["patch_id"] in third else row["stderr"]
    hidden = {"arch": {2}, "door": {0}, "gate": {0, 2, 3}, "wall": {0, 1, 2, 3}}
    words = [Words(label=of, cluster=c, hide=True) for (of, c), place in rank.items() if place in hidden[of]]
    [named] = [c for (label, c), place in rank.items() if (label, place) == ("door", 2)]
    words.append(Words(label="door", cluster=named, name="Lions <b>", star=True))
    left = {
        name: [row for row in rows[name] if rank[row["label"], row["cluster"]] not in hidden[row["label"]]]
        for name in ("clusters", "members")
    }
    found |= {name: rows_to_table(name, own) for name, own in rows.items()}
    without = found | {name: rows_to_table(name, own) for name, own in left.items()}
    return found, Curation(clusters_of="some", clusters=words), without


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = Words(label="Bern 10", cluster=1, name="Lions <b>", note="on fountains", star=True)
    about = settings(curation=Curation(clusters_of="one", clusters=[words]), finetuning=finetuning(LABELS))
    about["config"]["report"]["whole_images"] = 6  # of the twelve of a label
    mined = sorted(LABELS)
    other = dict(build(tables(["Bern 10"], k=3), settings(), map_of=halves))
    about |= {"beside": ["Bern 10"], "beside_name": "the base <b>"}
    of_all = tables(["arch", "door"], joint=True, shared=True)
    [leading] = [c["cluster"] for c in of_all["clusters"].to_pylist() if c["rank"] == 0]
    words_of_all = Curation(clusters_of="all", clusters=[Words(label=None, cluster=leading, hide=True)])
    joint = build(of_all, settings(joint=True, curation=words_of_all), map_of=map_of_label)
    found, words_of_some, left = _hidden()
    few = settings(curation=words_of_some)
    few["config"]["report"]["whole_images"] = 4
    for within, files in (
        (folder, build(tables(LABELS), about, map_of=halves)),
        (folder, beside_files({label: i for i, label in enumerate(mined)}, ["Bern 10"], other.__getitem__)),
        (folder / "joint", joint),
        (folder / "curated", build(found, few)),
        (folder / "left", build(left, few | {"curation": None})),
    ):
        for name, data in files:
            (within / name).parent.mkdir(parents=True, exist_ok=True)
            (within / name).write_bytes(data)
    return folder


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module", params=["file", "http"])
def root(request: pytest.FixtureRequest, site: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{site}"
        return
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """A page of a browser without a memory; what it says, asks for and shows unasked is none.

    But for the images' sources, which it may look for on the disk: /data/set is not there.
    """
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    tab, said = context.new_page(), []
    tab.on("console", lambda message: said.append(f"{message.location.get('url', '')}: {message.text}"))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append("a dialog"))
    tab.on("requestfailed", lambda request: said.append(f"{request.url}: {request.failure}"))
    tab.set_default_timeout(10_000)
    yield tab
    context.close()
    left = "net::ERR_ABORTED"  # pictures of a page that is left
    assert [text for text in said if not text.endswith(left) and not text.startswith("file:///data/set/")] == []


def labels(tab: Any) -> list[str]:
    """Labels that are seen, in their order."""
    return [article.get_attribute("data-name") for article in tab.locator("article:visible").all()]


def test_labels_are_searched_and_sorted(tab: Any, root: str) -> None:
    tab.goto(f"{root}/index.html")
    assert len(labels(tab)) == len(LABELS)
    tab.fill("[name=q]", " BERN ")
    tab.select_option("[name=sort]", "name")
    assert labels(tab) == ["Bern 9", "Bern 10"]
    assert tab.locator("output").inner_text() == "2 of 6 labels"
    address = tab.url
    tab.goto(f"{root}/index.html#q=%20GENEVE&sort=nonsense")
    assert labels(tab) == ["Genève"]
    tab.goto(address)
    tab.reload()
    assert labels(tab) == ["Bern 9", "Bern 10"]
    tab.goto(f"{root}/index.html#sort=coverage")
    shares = [float(a.get_attribute("data-coverage")) for a in tab.locator("article[data-name]").all()]
    assert shares == sorted(shares, reverse=True)
    tab.goto(f"{root}/index.html#q=%3Cscript%3E")
    assert labels(tab) == ["<script>alert(1)</script>"]


def test_a_patch_shows_its_map_under_the_hand(tab: Any, root: str) -> None:
    tab.goto(f"{root}/{BERN}")
    cell = tab.locator(f"[data-cluster] a[href='#patch={OF_THE_BEST}']")
    cell.hover()
    canvas = cell.locator("canvas")
    canvas.wait_for()
    colours = canvas.evaluate("c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")
    assert colours == [230, 97, 1, 254] * 16, "the patch lies in the left half"
    assert tab.locator(".tip").inner_text().startswith("T +0.0133 ± 0.0004, rank 1,")
    assert re.fullmatch(r"T −0\.0200\s+\+0\.0200", " ".join(tab.locator(".legend").inner_text().split()))
    grey = "i => getComputedStyle(i).filter"
    assert cell.locator("img").evaluate(grey) == "grayscale(1)"
    tab.mouse.move(0, 0)
    assert canvas.count() == 0
    assert cell.locator("img").evaluate(grey) == "none"


def test_all_maps_at_once_have_a_scale_and_lie_on_whole_images_too(tab: Any, root: str) -> None:
    tab.goto(f"{root}/{BERN}")
    context = tab.locator(".context a svg")
    assert context.count() == 4
    tab.check("[name=always]")
    sync_api.expect(tab.locator(".strip canvas")).to_have_count(tab.locator(".strip:not(.samples) a").count())
    tab.fill("[name=opacity]", "30")
    assert tab.locator(".strip canvas").first.evaluate("c => getComputedStyle(c).opacity") == "0.3"
    assert "+0.0200" in tab.locator(".legend").inner_text()
    for one in context.all():
        seen = np.asarray(Image.open(io.BytesIO(one.screenshot())).convert("RGB"), int)
        red = (seen[..., 0] - seen[..., 1])[8:-8]  # of grey none
        middle = seen.shape[1] // 2
        assert np.quantile(red[:, 8 : middle - 8], 0.1) > 30, "orange on the left half"
        assert 0 < np.quantile(red[:, middle + 8 : -8], 0.9) < 20, "violet on the right"
    tab.uncheck("[name=always]")
    assert tab.locator(".strip canvas").count() == 0
    assert context.locator(".map").count() == 0


def test_a_patch_opens_in_its_image_and_has_an_address(tab: Any, root: str) -> None:
    tab.goto(f"{root}/{BERN}")
    tab.locator(f"[data-cluster] a[href='#patch={OF_THE_BEST}']").click()
    dialog = tab.locator("dialog")
    dialog.wait_for()
    assert tab.url.endswith(f"{BERN}#patch={OF_THE_BEST}")
    text = " ".join(dialog.inner_text().split())
    assert "2/000.png" in text
    assert "T +0.0133 ± 0.0004" in text
    assert "rank 1 (most typical)" in text
    assert "/data/set/2/000.png" in text
    assert dialog.locator("a[href='file:///data/set/2/000.png']").count() == 1
    box = dialog.locator("rect.box")
    assert [box.get_attribute(key) for key in ("x", "y", "width", "height")] == ["0", "0", "32", "32"]
    picture = dialog.locator("svg.whole").first.bounding_box()
    tab.mouse.move(picture["x"] + 0.1 * picture["width"], picture["y"] + 0.5 * picture["height"])
    assert dialog.locator(".here").inner_text() == "T here +0.0200"
    tab.mouse.move(picture["x"] + 0.9 * picture["width"], picture["y"] + 0.5 * picture["height"])
    assert dialog.locator(".here").inner_text() == "T here −0.0200"
    for grey in (True, False):
        shown = dialog.locator("svg.whole > svg")
        assert shown.evaluate("i => getComputedStyle(i).filter") == ("grayscale(1)" if grey else "none")
        assert dialog.locator("image.map").is_visible() == grey
        dialog.get_by_role("button", name="Map of T").click()
    neighbours = [a.get_attribute("href") for a in dialog.locator(".strip a").all()]
    assert f"#patch={OF_THE_BEST}" in neighbours
    tab.keyboard.press("ArrowLeft")
    tab.wait_for_url(f"**{neighbours[neighbours.index(f'#patch={OF_THE_BEST}') - 1]}")
    address = tab.url
    tab.keyboard.press("Escape")
    sync_api.expect(dialog).to_be_hidden()
    sync_api.expect(tab).not_to_have_url(re.compile("#patch"))
    tab.goto("about:blank")
    tab.goto(address)
    dialog.wait_for()


def test_a_patch_of_an_image_that_is_not_stored_opens_alone_and_says_so(tab: Any, root: str) -> None:
    tab.goto(f"{root}/{BERN}")
    tab.locator(f"[data-cluster] a[href='#patch={OF_THE_BEST}']").hover()
    tab.locator(".strip canvas").wait_for()
    other = tab.evaluate(
        "(({patches, images}) => patches.id[patches.image.findIndex(i => !images.whole[i])])(diffmine['0002'])"
    )
    tab.goto(f"{root}/{BERN}#patch={other}")
    tab.locator("dialog figcaption").wait_for()
    assert "does not store its whole image (report.whole_images 6)" in tab.locator("dialog figcaption").inner_text()
    box = tab.evaluate("id => (({patches}) => patches.box[patches.id.indexOf(id)])(diffmine['0002'])", other)
    assert tab.locator("dialog svg.whole").first.get_attribute("viewBox") == " ".join(map(str, box)), "it fills it"
    shown = tab.locator("dialog svg.whole > svg image")
    assert shown.get_attribute("href").startswith("../images/0002/cluster-")
    assert int(shown.get_attribute("width")) > 1
    assert tab.locator("dialog image.map").count() == 1


@pytest.mark.parametrize("same", [True, False])
def test_an_image_that_is_not_stored_comes_from_its_source_as_it_was_prepared(
    tab: Any, tmp_path: Path, same: bool
) -> None:
    """A photograph that lies on its side, is smaller when mined and loses an edge; or another one of its name."""
    about, prepared = settings(), {}
    about["config"]["report"]["whole_images"] = 4
    about["config"]["dataset"]["image"] = {"short_side": 96, "multiple_of": 8}
    found = tables(["arch"], base=f"{tmp_path}/set")
    (tmp_path / "set" / "0").mkdir(parents=True)
    for row in found["manifest"].to_pylist():
        upright = np.asarray(Image.fromarray(image(row["image_id"])).resize((271, 205)))
        prepared[row["image_id"]] = prepare(upright, 96, 8)[0]  # 126 pixels wide, less 3 on each side
        exif = Image.Exif()
        exif[0x0112] = 6
        stored = np.rot90(upright if same else upright[:, :250])  # counter-clockwise; 6 says to turn it back
        Image.fromarray(stored).save(row["uri"], "JPEG", quality=95, exif=exif)
    for name, made in build(found, about, prepared.__getitem__):
        (tmp_path / "report" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "report" / name).write_bytes(made)
    tab.goto(f"file://{tmp_path}/report/labels/0000.html#patch=0-top-0030")
    tab.locator("dialog figcaption" if not same else "dialog rect.box").wait_for()
    if not same:
        tab.wait_for_timeout(300)
        assert tab.locator("dialog rect.box").count() == 0
        return
    tab.evaluate("document.querySelector('dialog rect.box').remove()")
    name = tab.locator("dialog h2").inner_text()
    seen = Image.open(io.BytesIO(tab.locator("dialog svg.whole").first.screenshot())).convert("RGB").resize((120, 96))
    want = prepared[name].astype(float)
    apart = {
        by: np.abs(np.roll(want, by, axis=1) - np.asarray(seen, float))[:, 8:-8].mean() for by in (-3, -1, 0, 1, 3)
    }
    assert min(apart, key=apart.__getitem__) == 0, apart
    assert apart[0] < 4


def test_a_patch_opens_where_it_was_chosen(tab: Any, root: str) -> None:
    """The best patch is in its cluster's strip and among the most typical ones."""
    row = tab.locator("[data-kind=top] .strip a")
    strip, current = tab.locator("dialog .strip"), tab.locator("dialog [aria-current]")
    for address in ("", f"#view=top&patch={OF_THE_BEST}"):
        tab.goto("about:blank")
        tab.goto(f"{root}/{BERN}{address}")
        if not address:
            row.first.click()
        sync_api.expect(strip).to_have_attribute("aria-label", "Most typical patches of Bern 10")
        tab.keyboard.press("Alt+ArrowRight")  # is the browser's
        assert OF_THE_BEST in tab.url
        tab.keyboard.press("ArrowRight")
        sync_api.expect(current).to_have_attribute("href", row.nth(1).get_attribute("href"))
        sync_api.expect(strip).to_have_attribute("aria-label", "Most typical patches of Bern 10")
        tab.keyboard.press("Escape")
        sync_api.expect(row.nth(1)).to_be_focused()
    tab.goto("about:blank")
    tab.goto(f"{root}/{BERN}#patch=2-top-0035")  # in a folded cluster only
    strip.wait_for()
    tab.keyboard.press("Escape")
    sync_api.expect(tab.locator("main a[href='#patch=2-top-0035']")).to_be_focused()
    tab.goto("about:blank")
    tab.goto(f"{root}/{BERN}#view=clusters&patch=2-random-0000")  # where the view hides it
    strip.wait_for()
    tab.keyboard.press("Escape")
    sync_api.expect(tab.locator("[name=view]")).to_be_focused()


def test_a_patch_among_all_labels_has_its_image_and_the_map_of_its_label(tab: Any, root: str) -> None:
    told = {}
    for label in ("0", "1"):
        tab.goto("about:blank")
        tab.goto(f"{root}/joint/labels/0000.html#patch={label}-top-0034")
        shown = tab.locator("dialog svg.whole > svg image")
        shown.wait_for()
        size = shown.evaluate(
            "async i => { const own = new Image(); own.src = i.href.baseVal; await own.decode();"
            " return [own.naturalWidth, own.naturalHeight].map(String); }"
        )
        assert size == [shown.get_attribute("width"), shown.get_attribute("height")]
        tab.locator("dialog svg.whole").first.hover()
        told[label] = tab.locator("dialog .here").inner_text(), tab.locator("dialog h2").inner_text()
    assert told == {"0": ("T here +0.0200", "0/010.png"), "1": ("T here −0.0200", "0/010.png")}
    tab.goto(f"{root}/joint/labels/0001.html")  # without clusters, and without an error
    tab.locator("[data-kind=top] a").first.click()
    tab.locator("dialog").wait_for()


def test_an_image_that_was_not_trained_on_says_so(tab: Any, root: str) -> None:
    told = []
    for rank in (0, 1):
        tab.goto("about:blank")
        tab.goto(f"{root}/{BERN}#patch=2-top-{rank:04d}")
        tab.locator("dialog dl").wait_for()
        told.append("held out not trained on" in " ".join(tab.locator("dialog dl").inner_text().split()))
    assert told == [False, True]


def test_keys_alone_reach_everything(tab: Any, root: str) -> None:
    tab.goto(f"{root}/{BERN}")
    where = "document.activeElement.getAttribute('href')"
    first = tab.locator("[data-cluster] .strip a").nth(0).get_attribute("href")
    for _ in range(30):
        tab.keyboard.press("Tab")
        if tab.evaluate(where) == first:
            break
    assert tab.evaluate(where) == first
    tab.keyboard.press("ArrowRight")
    second = tab.locator("[data-cluster] .strip").nth(0).locator("a").nth(1).get_attribute("href")
    assert tab.evaluate(where) == second
    tab.locator(f"a[href='{second}'] canvas").first.wait_for()  # focus shows the map
    tab.keyboard.press("ArrowDown")
    below = tab.locator("[data-cluster] .strip").nth(1).locator("a").nth(1).get_attribute("href")
    assert tab.evaluate(where) == below
    tab.keyboard.press("End")
    tab.keyboard.press("Home")
    tab.keyboard.press("Enter")
    tab.locator("dialog").wait_for()
    tab.keyboard.press("Escape")
    sync_api.expect(tab.locator("main .strip a:focus")).to_have_count(1)  # back on the patch


def test_views_are_part_of_the_address(tab: Any, root: str) -> None:
    tab.goto(f"{root}/{BERN}")
    tab.select_option("[name=view]", "bottom")
    assert [row.get_attribute("data-kind") for row in tab.locator(".row:visible").all()] == ["bottom"]
    tab.locator("[data-kind=bottom] a").first.click()
    tab.locator("dialog").wait_for()
    assert "view=bottom" in tab.url
    tab.goto("about:blank")
    tab.goto(f"{root}/{BERN}#view=clusters")
    assert tab.locator("[data-kind]:visible").count() == 0
    assert tab.locator("[data-cluster]:visible").count() == 4


def test_words_of_a_curator_go_out_and_come_back(tab: Any, root: str) -> None:
    tab.goto(f"{root}/index.html")
    sync_api.expect(tab.locator("output")).to_be_attached()
    assert tab.locator(".export").is_hidden(), "nothing of this browser's own"
    tab.goto(f"{root}/{BERN}")
    assert tab.locator(".export").is_hidden()
    row = tab.locator("[data-cluster='1']")
    assert "Lions <b>" in row.inner_text()
    assert "on fountains" in row.inner_text()
    assert "★" in row.inner_text()
    tab.check("[name=curate]")
    assert tab.locator(".export").inner_text() == "Export curation (1)"
    other = tab.locator("[data-cluster='0']")
    other.locator(".curate [name=name]").fill("Bears")
    other.locator(".curate [name=hide]").check()
    tab.uncheck("[name=curate]")
    assert other.is_hidden()
    assert "1 hidden by the curator" in tab.locator(".hidden-clusters").inner_text()
    with tab.expect_download() as download:
        tab.locator(".export").click()
    curation = Curation.model_validate(json.loads(Path(download.value.path()).read_text()))
    assert curation.clusters_of == "one"
    assert {(w.cluster, w.name, w.hide, w.star) for w in curation.clusters} == {
        (1, "Lions <b>", False, True), (0, "Bears", True, False),
    }  # fmt: skip
    tab.reload()
    assert other.is_hidden(), "the browser keeps it"
    tab.goto(f"{root}/compare.html#a=0002&b=beside-0002")
    assert seen_beside(tab, "#a")[1:] == (3, "1 hidden by the curator.")
    assert seen_beside(tab, "#b")[1:] == (3, ""), "the other run has no words"
    tab.goto(f"{root}/index.html")
    assert tab.locator(".export").inner_text() == "Export curation (2)"


def seen_beside(tab: Any, side: str) -> tuple[list[str], int, str]:
    """What stands before T in each row of a side, the number of rows, and the line below them."""
    place = tab.locator(side)
    place.locator("h2").wait_for()
    heads = [told.inner_text().partition(":")[0] for told in place.locator(".row-facts").all()]
    return heads, place.locator(".strip").count(), " ".join(place.locator("p.quiet").all_inner_texts())


def test_a_hidden_cluster_does_not_lead(tab: Any, root: str) -> None:
    """The overview then says what it says of a run without the cluster."""

    def told(article: Any) -> dict[str, Any]:
        pictures = article.locator(".strip img").all()
        return {
            "text": article.locator("p").all_inner_texts(),
            "bar": article.locator(".bar").evaluate("bar => bar.outerHTML"),
            "patches": article.locator(".strip a").evaluate_all("links => links.map(a => a.getAttribute('href'))"),
            "pictures": [picture.get_attribute("src") for picture in pictures],
            "coverage": float(article.get_attribute("data-coverage")),
        }

    tab.goto(f"{root}/left/index.html")
    without = {label: told(tab.locator(f"[data-name={label}]")) for label in ("arch", "door", "gate")}
    assert "not told apart from zero" in without["door"]["text"][0]
    assert [len(without[label]["pictures"]) for label in without] == [8, 8, 3]
    tab.goto(f"{root}/curated/index.html#sort=coverage")
    wall = tab.locator("[data-name=wall]")
    sync_api.expect(wall.locator(".strip")).to_have_count(0)
    for label, count in (("arch", 1), ("door", 1), ("gate", 3)):
        article, said = tab.locator(f"[data-name={label}]"), without[label]
        said["text"][-1] += f"; {count} hidden by the curator"
        sync_api.expect(article.locator(".strip img")).to_have_count(len(said["pictures"]))
        assert told(article) == said, label
    assert wall.locator("p").all_inner_texts() == ["12 images; all its clusters are hidden by the curator"]
    assert tab.locator("[data-name=door] h2 small").inner_text() == "Lions <b> · ★ 1"
    sync_api.expect(tab.locator("article").last).to_have_attribute("data-name", "wall")
    assert labels(tab) == ["arch", "door", "gate", "wall"]


def test_a_hidden_cluster_of_all_labels_does_not_lead(tab: Any, root: str) -> None:
    tab.goto(f"{root}/joint/index.html")
    article = tab.locator("article").first
    sync_api.expect(article.locator("img").first).to_have_attribute("src", "images/0000/cluster-001.webp")
    assert article.locator(".measure").inner_text().endswith(", most typical patches")
    assert "; the leading one of 3 clusters covers " in article.locator("p.quiet").inner_text()


def test_words_of_a_curator_stand_side_by_side(tab: Any, root: str) -> None:
    tab.goto(f"{root}/curated/compare.html#a=0001&b=0003")
    assert seen_beside(tab, "#a") == (["2", "3 ★ Lions <b>", "4"], 3, "1 hidden by the curator.")
    assert seen_beside(tab, "#b") == ([], 0, "4 hidden by the curator.")


def test_two_labels_stand_side_by_side(tab: Any, root: str) -> None:
    tab.goto(f"{root}/{BERN}")
    tab.get_by_role("link", name="Side by side").click()
    left, right = tab.locator("#a"), tab.locator("#b")
    right.locator("h2").wait_for()
    assert [left.locator("h2").inner_text(), right.locator("h2").inner_text()] == ["Bern 10", "Bern 9"]
    tab.select_option("[name=b]", label="<script>alert(1)</script>")
    sync_api.expect(right.locator("h2")).to_have_text("<script>alert(1)</script>")
    address = tab.url
    tab.goto("about:blank")
    tab.goto(address)
    right.locator(".strip").first.wait_for()
    assert right.locator("h2").inner_text() == "<script>alert(1)</script>"
    assert left.locator(".row").count() == 4
    assert all(
        image.evaluate("i => i.decode().then(() => i.naturalWidth > 0)") for image in left.locator("img").all()[:3]
    )
    left.locator(".strip a").first.click()
    tab.locator("dialog").wait_for()


def test_a_label_stands_beside_itself_in_another_run(tab: Any, root: str) -> None:
    tab.goto(f"{root}/{BERN}")
    tab.get_by_role("link", name="Beside the base <b>").click()
    right = tab.locator("#b")
    sync_api.expect(right.locator("h2")).to_have_text("Bern 10 (the base <b>)")
    sync_api.expect(tab.locator("#a h2 a")).to_have_count(1)
    assert right.locator("h2 a").count() == 0, "no page of the other run"
    sync_api.expect(right.locator(".row")).to_have_count(3)
    sync_api.expect(tab.locator("#a .row")).to_have_count(4)
    assert all(
        image.evaluate("i => i.decode().then(() => i.naturalWidth > 0)") for image in right.locator("img").all()[:3]
    )


def test_a_cluster_is_saved_as_a_figure(tab: Any, root: str) -> None:
    tab.goto(f"{root}/{BERN}")
    row = tab.locator("[data-cluster='1']")
    row.hover()
    with tab.expect_download() as download:
        row.get_by_role("button", name="SVG").click()
    svg = ElementTree.fromstring(Path(download.value.path()).read_bytes())
    name = "{http://www.w3.org/2000/svg}"
    [cluster] = [c for c in tables(LABELS)["clusters"].to_pylist() if (c["label"], c["cluster"]) == ("Bern 10", 1)]
    caption = " ".join(text.text or "" for text in svg.iter(f"{name}text"))
    assert caption.startswith(f"Lions <b>. Cluster {cluster['rank'] + 1} of “Bern 10”: {cluster['size']} patches of ")
    pictures = [image.get("href") or "" for image in svg.iter(f"{name}image")]
    assert len(pictures) == 8
    assert all(picture.startswith("data:image/webp;base64,") for picture in pictures)
    with tab.expect_download() as download:
        row.get_by_role("button", name="PNG").click()
    picture = Image.open(download.value.path()).convert("RGB")
    assert picture.size == (3 * (8 * 100 - 4), 3 * (96 + 10 + 16 * 2))
    strip = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2]))).convert("RGB")
    for i in range(8):  # each patch is where it belongs
        place = np.asarray(picture.crop((300 * i, 0, 300 * i + 288, 288)).resize((12, 12)), float)
        side = strip.height
        assert (
            np.abs(place - np.asarray(strip.crop((side * i, 0, side * (i + 1), side)).resize((12, 12)), float)).mean()
            < 12
        )


def test_cells_do_not_run_into_each_other(tab: Any, site: Path) -> None:
    """Small cells, which are shown enlarged, of two colours in turn."""
    colours = (200, 30, 30), (30, 30, 200)
    strip = images.strip([Image.new("RGBA", (48, 48), (*colours[i % 2], 255)) for i in range(4)])
    (site / "images" / "cells.webp").write_bytes(strip)
    cells = "".join("<li><a><img src='images/cells.webp'></a></li>" for _ in range(4))
    (site / "cells.html").write_text(f"<!doctype html><link rel=stylesheet href=style.css><ul class=strip>{cells}</ul>")
    tab.goto(f"file://{site}/cells.html")
    for i, cell in enumerate(tab.locator(".strip a").all()):
        seen = np.asarray(Image.open(io.BytesIO(cell.screenshot())).convert("RGB"), int)[8:-8]
        assert np.abs(seen - colours[i % 2]).max() < 30, i  # 48 where nothing is cut off


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_out_of_reach(tab: Any, site: Path, width: int, scheme: str) -> None:
    """No page scrolls sideways, and an automated check of accessibility finds nothing."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-playwright-python").Axe()
    tab.set_viewport_size({"width": width, "height": 800})
    tab.emulate_media(color_scheme=scheme)
    for address in ("index.html", "compare.html", BERN, f"{BERN}#patch={OF_THE_BEST}"):
        tab.goto("about:blank")
        tab.goto(f"file://{site}/{address}")
        if "#" in address:
            tab.locator("dialog").wait_for()
            assert tab.evaluate("document.querySelector('dialog').scrollTop") == 0, "its head is seen"
            heights = [button.bounding_box()["height"] for button in tab.locator("dialog header > :not(h2)").all()]
            assert max(heights) < 40, "what is on a button stands on one line"
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, address
        found = axe.run(tab, options={"preload": False}).response["violations"]
        assert [(v["id"], [n["html"] for n in v["nodes"]][:2]) for v in found] == [], address
