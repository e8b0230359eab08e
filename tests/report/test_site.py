"""The static site, built from hand-made tables."""

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest
from fake_run import build, finetuning, image, settings, tables
from PIL import Image
from pyarrow import csv, parquet

from diffmine.errors import ImageError
from diffmine.report import images
from diffmine.report.pages import Fresh
from diffmine.report.rendering import dataset_name, duration, short
from diffmine.report.site import Site
from diffmine.report.text import summary
from diffmine.run import rows_to_table

HOSTILE = [
    "<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "{{ 7 * 7 }}", "javascript:alert(1)",
    "🏛️ apse", "\u202eمئذنة", "x" * 10_000, "../../etc/passwd", "</title></pre><b>",
]  # fmt: skip
Tag = tuple[str, dict[str, str | None]]


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.tags: list[Tag] = []
        self.text = ""
        self.feed(html.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs))
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\N{NO-BREAK SPACE}", " ")

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def site(found: dict[str, pa.Table], about: dict[str, Any], unreadable: Sequence[str] = ()) -> dict[str, bytes]:
    def opened(image_id: str) -> np.ndarray | ImageError:
        return ImageError("missing", "no such file") if image_id in unreadable else image(image_id)

    listed = list(build(found, about, opened))
    files = dict(listed)
    assert len(files) == len(listed), "a file was written twice"
    return files


def pages(files: dict[str, bytes]) -> dict[str, Page]:
    return {name: Page(data) for name, data in files.items() if name.endswith(".html")}


@pytest.fixture(scope="module")
def two() -> dict[str, bytes]:
    return site(tables(["arch", "door"]), settings())


@pytest.fixture(scope="module")
def hostile() -> dict[str, bytes]:
    found = tables(HOSTILE, images=4)
    failure = {"image_id": "<b>.png", "uri": "/x", "reason": "truncated", "detail": "<i>"}
    rates = {"top": (3, 9), "random": (4, 1000), "bottom": (0, 0), "chance": 0.1, "annotated": 4, "images": 4}
    hits = [{"label": label, **rates} for label in HOSTILE]
    about = settings(
        notes=["<b>note</b>"], hits=hits, skipped={".<u>": 1, ".heic": 2}, finetuning=finetuning(HOSTILE, 4)
    )
    return site({**found, "failures": rows_to_table("failures", [failure])}, about)


def data(files: dict[str, bytes], number: int) -> dict[str, Any]:
    """What the script of a page reads."""
    start = f'(globalThis.diffmine??={{}})["{number:04d}"]='
    text = files[f"labels/{number:04d}.js"].decode()
    assert text.startswith(start)
    assert text.endswith(";\n")
    found: dict[str, Any] = json.loads(text.removeprefix(start).removesuffix(";\n"))
    return found


def resolved(page: str, link: str) -> str:
    """Path of a link within the site."""
    parts: list[str] = []
    for part in (PurePosixPath(page).parent / unquote(link.partition("#")[0])).parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


@pytest.mark.parametrize("name", ["two", "hostile"])
def test_every_file_that_a_page_names_exists_and_is_named(name: str, request: pytest.FixtureRequest) -> None:
    files: dict[str, bytes] = request.getfixturevalue(name)
    named = {"index.html"}
    for path, page in pages(files).items():
        loads = [a["src"] for a in page.all("img")] + [a["href"] for a in page.all("link")]
        loads += [a["src"] for a in page.all("script")] + [a["href"] for a in page.all("image")]
        links = [a["href"] for a in page.all("a") if not a.get("href", "#").startswith("#")]
        named |= {resolved(path, link) for link in [*loads, *links] if link and link != "data:,"}
        named |= {
            f"labels/{a['data-page']}{end}"
            for a in page.all("main")
            if "data-page" in a
            for end in (".js", "-figures.js")
        }
    found = {number: data(files, number) for number in range(sum(name.endswith(".csv") for name in files))}
    named |= {one["sheet"]["href"] for one in found.values()}
    assert named == set(files)
    for number, one in found.items():
        ids = [
            a["href"].partition("=")[2]
            for a in pages(files)[f"labels/{number:04d}.html"].all("a")
            if a.get("href", "").startswith("#")
        ]
        context = sum("class" not in a for a in pages(files)[f"labels/{number:04d}.html"].all("figure"))
        assert one["patches"]["id"] == ids[context:], "the script counts patches as the page does"


@pytest.mark.parametrize("name", ["two", "hostile"])
def test_pages_load_nothing_from_elsewhere_and_hold_no_code(name: str, request: pytest.FixtureRequest) -> None:
    files: dict[str, bytes] = request.getfixturevalue(name)
    assert not re.search(rb"url\(|@import|https?:", files["style.css"])
    for name in ("find.js", "clusters.js", "explore.js", "curate.js", "figure.js", "overview.js", "compare.js"):
        code = files[name].replace(b"http://www.w3.org/2000/svg", b"")  # a name, not an address
        assert not re.search(rb"fetch\(|import|eval|innerHTML|outerHTML|insertAdjacent|https?:", code), name
    scripts = {
        "index.html": ["curation.js", "clusters.js", "curate.js", "overview.js", "find.js"],
        "compare.html": ["curation.js", "clusters.js", "compare.js"],
    }
    for path, page in pages(files).items():
        label = ["../curation.js", "../clusters.js", "../explore.js", "../curate.js", "../figure.js"]
        assert [script["src"] for script in page.all("script")] == scripts.get(path, label), path
        assert not re.search(r"<script[^>]*>[^<]", files[path].decode()), path
        assert not page.all("style"), path
        assert not page.all("iframe"), path
        for tag, attributes in page.tags:
            assert not [key for key in attributes if key.startswith("on") or key in ("style", "srcset")], (path, tag)
            source = attributes.get("src") or ""
            assert ":" not in source, (path, source)
            assert not (attributes.get("href") or "").startswith(("http", "javascript", "//")), path
        policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
        assert policy == "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'"


def test_hostile_labels_are_shown_as_text(hostile: dict[str, bytes]) -> None:
    index = pages(hostile)["index.html"]
    for label in HOSTILE:
        assert short(label, 70) in index.text
    assert "<b>note</b>" in index.text
    assert "<b>.png" in index.text
    assert all(re.fullmatch(r"[a-z0-9./-]+", name) for name in hostile)
    whole = "x" * 10_000
    assert sum(page.text.count(whole) for path, page in pages(hostile).items()) == 1
    assert max(len(data) for path, data in hostile.items() if path.endswith(".html")) < 200_000


def test_pages_are_well_formed(hostile: dict[str, bytes]) -> None:
    void = {"meta", "link", "img", "input", "rect"}
    for path, data in hostile.items():
        if path.endswith(".html"):
            opened: list[str] = []
            for close, tag, end in re.findall(r"<(/?)([a-z][a-z0-9]*)[^>]*?(/?)>", data.decode()):
                if close:
                    assert opened.pop() == tag, path
                elif tag not in void and not end:
                    opened.append(tag)
            assert opened == [], path


def test_every_picture_has_text(two: dict[str, bytes]) -> None:
    for path, page in pages(two).items():
        assert page.all("img") or path == "compare.html"
        assert all(img["alt"] for img in page.all("img"))
        assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))


def test_a_patch_says_its_score_rank_and_image(two: dict[str, bytes]) -> None:
    alts = {img["alt"] for img in pages(two)["labels/0000.html"].all("img")}
    assert "T +0.0200 ± 0.0004, rank 1, 0/000.png" in alts
    assert "T −0.0200 ± 0.0004, rank 1 (least typical), 0/000.png" in alts


def test_fresh_scores_stand_beside_chosen_ones() -> None:
    found = tables(["arch"])
    rows = found["patches"].to_pylist()
    for row in rows:
        if row["rank"] < 2 and row["kind"] != "random":
            row |= {"fresh_typicality": row["typicality"] / 2, "fresh_stderr": 0.0003}
            row |= {"contrast": 0.0123, "rival": "door", "fresh_contrast": 0.0101, "fresh_contrast_stderr": 0.0002}
        if row["rank"] == 3:
            row |= {"contrast": 0.0123, "rival": "<door>"}
    found_pages = pages(site({**found, "patches": rows_to_table("patches", rows)}, settings()))
    page, methods = found_pages["labels/0000.html"], " ".join(found_pages["index.html"].text.split())
    assert "The 2 most typical windows of a label were scored again with 30 draws that had no part in" in methods
    alts = {img["alt"] for img in page.all("img")}
    above = "above door by +0.0123, fresh +0.0101 ± 0.0002"
    assert f"T +0.0200 ± 0.0004, fresh +0.0100 ± 0.0003, {above}, rank 1, 0/000.png" in alts
    assert f"T −0.0200 ± 0.0004, fresh −0.0100 ± 0.0003, {above}, rank 1 (least typical), 0/000.png" in alts
    assert "T +0.0188 ± 0.0004, above <door> by +0.0123, rank 4, 0/003.png" in alts
    assert "T +0.0192 ± 0.0004, rank 3, 0/002.png" in alts
    text = " ".join(page.text.split())
    assert "are folded and do not lead. The 2 most typical, scored again with draws that had no part in the" in text
    assert "have a mean T of +0.0099 ± 0.0003; it was +0.0198 when they were chosen" in text
    assert "They are above the other labels by +0.0101 ± 0.0002; it was +0.0123." in text


@pytest.mark.parametrize(("against", "order"), [("null", "typicality"), ("others", "contrast")])
def test_every_page_says_how_its_clusters_are_ordered(against: str, order: str) -> None:
    about = settings()
    about["config"]["typicality"].update(against=against, labels="all")
    found = pages(site(tables(["arch", "door"]), about))
    assert f"In order of median {order};" in found["labels/0000.html"].text
    assert f"each in order of median {order}." in found["compare.html"].text


def test_draws_that_a_pilot_chose_are_shown() -> None:
    about = settings()
    about["config"]["typicality"]["draws"] = "auto"
    index = pages(site(tables(["arch"]), {**about, "draws": 36}))["index.html"]
    text = " ".join(index.text.split())
    assert "draws36of each image and label. A draw is a noise and a timestep t, here from 0.1 to 0.7 of" in text
    raced = pages(site(tables(["arch"]), {**about, "draws": 36, "draws_spent": 0.27}))["index.html"]
    assert "(allocated); a race took 27 % of them and saved 73 %" in raced.text
    assert "dropped after some of these draws; 27 % of all draws were made" in raced.text
    assert "dropped after" not in index.text


def test_what_the_run_took_is_said_in_words() -> None:
    index = pages(site(tables(["arch"]), settings(passes=25200, fresh_passes=3888)))["index.html"]
    text = " ".join(index.text.split())
    assert "scoring25,200passes of the UNet: each denoises an image once, with a label or without; and 3,888 to" in text
    assert "training25,600views of images: 400 steps of 64" in text
    assert "Modeltiny 400 steps of finetuning" in text


@pytest.mark.parametrize(
    ("fresh", "random", "contrast", "doubt", "in_a_race"),
    [
        (0.021, 0.0, None, None, None),
        (0.019, 0.0, None, "zero", "zero"),  # twice its ± is 0.020
        (-0.5, 0.0, None, "zero", "zero"),
        (0.021, 0.002, None, "random patches", None),  # twice the ± of their difference is 0.0206
        (0.021, 0.0, 0.021, None, None),
        (0.021, 0.0, 0.019, "the other labels", "the other labels"),
        (None, 0.0, None, None, None),  # the score of the choice has to do
        (None, 0.035, None, "random patches", None),
    ],
)
def test_typicality_that_chance_may_explain_is_doubted(
    fresh: float | None, random: float, contrast: float | None, doubt: str | None, in_a_race: str | None
) -> None:
    page = Site(tables(["arch"]), settings()).pages[0]
    again = None if fresh is None else Fresh(9, 0.05, fresh, 0.01, None if contrast is None else (0.05, contrast, 0.01))
    page = replace(page, median_typicality=0.04, stderr=0.01, fresh=again, random=(random, 0.0025))
    assert (page.doubt(), page.doubt(beside_random=False)) == (doubt, in_a_race)


def test_the_overview_has_errors_and_doubts_beside_scores() -> None:
    """Standard errors of 0.0004; of the second label that of the patches of the leading cluster, 0.05."""
    found = tables(["arch", "door"])
    rows = found["patches"].to_pylist()
    for row in rows:
        if row["label"] == "door" and row["kind"] == "top":
            row |= {"stderr": 0.05}
        if row["rank"] < 5 and row["kind"] == "top" and row["label"] == "arch":
            row |= {"fresh_typicality": 0.015, "fresh_stderr": 0.0003}
    files = site({**found, "patches": rows_to_table("patches", rows)}, settings())
    arch, door = re.findall(r"<article.*?</article>", files["index.html"].decode(), re.DOTALL)
    assert re.search(
        r"T \+0.0\d+</b> ± 0.0004, leading cluster</span><span>fresh \+0.0150 ± 0.0003, random \+0.00", arch
    )
    assert ("told apart" in arch, "faint" in arch) == (False, False)
    assert re.search(r"± 0.0500, leading cluster <span class=\"mark\">not told apart from zero</span>", door)
    assert 'class="bar faint"' in door
    text = " ".join(pages(files)["index.html"].text.split())
    assert "T has no scale of its own: compare it with that of a label without anything typical" in text
    assert "± its standard error: below twice that, T may be zero" in text
    assert "not told apart from knows this chance of draws only" in text
    assert "somewhat too high, for labels with little that is typical up to twice; fresh is not" in text
    assert "the mean T of a label’s 5 most typical patches with draws that had no part in the choice" in text
    assert "not told apart from zero" in pages(files)["labels/0001.html"].text


@pytest.mark.parametrize(("fewer", "said"), [(6, False), (5, True)])
def test_labels_with_few_images_are_less_select(fewer: int, said: bool) -> None:
    """Of the twelve images of the second label, some were not usable."""
    found = tables(["arch", "door"])
    lost = [f"1/{i:03d}.png" for i in range(fewer, 12)]
    failures = [{"image_id": i, "uri": f"/data/set/{i}", "reason": "empty", "detail": "no bytes"} for i in lost]
    index = pages(site({**found, "failures": rows_to_table("failures", failures)}, settings()))["index.html"]
    text = " ".join(index.text.split())
    want = "Labels have from 5 to 12 usable images, and of each at most 1,000 patches are kept: of a label of few"
    assert (want in text, "usable images, and" in text) == (said, said)


def test_strip_shows_the_members_in_order_of_distance(two: dict[str, bytes]) -> None:
    strip = np.asarray(Image.open(io.BytesIO(two["images/0000/cluster-000.webp"])).convert("RGB"), dtype=np.float64)
    side = 48  # patches of 32 pixels, in the smallest cells
    assert strip.shape == (side, 12 * side, 3)
    found = tables(["arch", "door"])
    best = next(c for c in found["clusters"].to_pylist() if c["label"] == "arch" and c["rank"] == 0)
    members = [m for m in found["members"].to_pylist() if (m["label"], m["cluster"]) == ("arch", best["cluster"])]
    patches = {p["patch_id"]: p for p in found["patches"].to_pylist()}
    nearest = sorted(members, key=lambda member: member["distance"])[:12]
    for i, patch in enumerate(patches[member["patch_id"]] for member in nearest):
        box = patch["x"], patch["y"], patch["width"], patch["height"]
        want = np.asarray(images.cell(image(patch["image_id"]), box, side).convert("RGB"), dtype=np.float64)
        assert np.abs(strip[:, i * side : (i + 1) * side] - want).mean() < 8, i


def test_a_cluster_of_one_image_is_marked(two: dict[str, bytes]) -> None:
    text = pages(two)["labels/0000.html"].text
    assert text.count("one image: a duplicate or an artefact") == 1
    assert "3 patches of 1 image " in text


def test_groups_of_a_cluster_are_counted() -> None:
    """All images but two are of one patient; the two have none, so that each is on its own."""
    found, about = tables(["arch"]), settings()
    about["config"]["dataset"]["group_column"] = "patient"
    who = ["7"] * 10 + [" ", None]
    manifest = found["manifest"].append_column("patient", pa.array(who))
    files = pages(site({**found, "manifest": manifest}, about))
    alone, marks = {"0/010.png", "0/011.png"}, 0
    image_of = {p["patch_id"]: p["image_id"] for p in found["patches"].to_pylist()}
    members = [(m["cluster"], image_of[m["patch_id"]]) for m in found["members"].to_pylist()]
    for cluster in found["clusters"].to_pylist():
        images = {image_id for number, image_id in members if number == cluster["cluster"]}
        groups = len(images & alone) + bool(images - alone)
        marks += groups == 1 < len(images)
        of = f"{len(images)} image{'s' * (len(images) > 1)} from {groups} patient"
        assert f"{cluster['size']} patches of {of}" in files["labels/0000.html"].text
    assert files["labels/0000.html"].text.count("one patient: perhaps its habit") == marks > 0
    assert re.search(r"covers \d+ of them, \d+ %, from \d patient", " ".join(files["index.html"].text.split()))


def test_labels_are_ranked_by_typicality() -> None:
    index = site(tables(["weak", "strong"][::-1]), settings())["index.html"].decode()
    assert index.index("<bdi>strong</bdi>") < index.index("<bdi>weak</bdi>")


def test_images_are_opened_once_per_page_and_only_if_shown() -> None:
    about = settings()
    about["config"]["report"] |= {"patches_per_cluster": 2, "clusters_per_label": 1}
    [job] = Site(tables(["arch"], images=40), about).jobs()
    opened = job.page.image_ids()
    assert len(opened) == len(set(opened)) < 30
    assert set(opened) >= {p.image_id for p in job.page.shown()}


def test_an_unreadable_image_becomes_a_placeholder_that_says_so() -> None:
    files = site(tables(["arch"]), settings(), unreadable=["0/000.png"])
    assert "0/000.png (missing)" in pages(files)["index.html"].text
    page = pages(files)["labels/0000.html"]
    assert "1 image could no longer be read" in " ".join(page.text.split())
    assert any("can no longer be read: missing" in (i["alt"] or "") for i in page.all("img"))
    cell = np.asarray(Image.open(io.BytesIO(files["images/0000/kinds.webp"])).convert("RGB"))[:8, :8]
    assert np.abs(cell.astype(int) - 150).max() < 8
    found = data(files, 0)["images"]
    assert not found["whole"][0], "nobody knows where in the placeholder its patches would be"
    assert found["whole"][1]


def test_same_tables_give_the_same_bytes_in_any_order() -> None:
    found = tables(["arch", "door"])
    rng = np.random.default_rng(0)
    shuffled = {name: table.take(pa.array(rng.permutation(len(table)))) for name, table in found.items()}
    assert site(found, settings()) == site(shuffled, settings())


def test_clusters_over_the_dataset_have_a_page_of_their_own() -> None:
    files = site(tables(["arch", "door"], joint=True, shared=True), settings(joint=True))
    index = " ".join(pages(files)["index.html"].text.split())
    assert "12 images; the leading one of 4 clusters covers 4 of them, 33 %" in index
    assert "12 images: its 36 most typical patches. " in " ".join(pages(files)["labels/0001.html"].text.split())
    first = pages(files)["labels/0000.html"].text
    assert "All labels" in first
    assert "arch 12, door 12" in " ".join(first.split())
    assert "Most typical, random, least typical" in pages(files)["labels/0001.html"].text
    assert pages(files)["index.html"].text.index("All labels") < pages(files)["index.html"].text.index("arch")
    assert "compare.html" not in files, "no other page has clusters"
    assert not any("Side by side" in page.text or "side by side" in page.text for page in pages(files).values())


def test_whole_images_open_a_patch_that_the_page_has() -> None:
    """On the page of all labels the most typical patches need not be among those that stand for a cluster."""
    about = settings(joint=True)
    about["config"]["report"]["patches_per_cluster"] = 2
    files = site(tables(["arch", "door"], joint=True, shared=True), about)
    linked = []
    for number in range(3):
        page, known = pages(files)[f"labels/{number:04d}.html"], data(files, number)["patches"]["id"]
        opened = [a["href"].removeprefix("#patch=") for a in page.all("a") if a.get("href", "").startswith("#patch=")]
        assert set(opened) <= set(known)
        linked.append(len(opened) - len(known))
    assert linked[0] < 4
    assert linked[1:] == [4, 4]


def test_the_images_seen_first_are_stored_whole() -> None:
    """Those of the most typical patches, of the overview, and then of each row in turn; of folded clusters last."""
    page = Site(tables(["arch"], images=60), settings()).pages[0]
    rows = [*(c.patches for c in page.clusters if not c.small), *page.kinds.values()]
    first = [*(image_id for image_id, _ in page.context), *(p.image_id for p in page.clusters[page.best].patches[:8])]
    assert len(set(first)) == 12
    wanted = [*first, *(row[0].image_id for row in rows), *(row[1].image_id for row in rows)]
    assert page.wholes(16) == list(dict.fromkeys(wanted))[:16]
    [folded] = [c for c in page.clusters if c.small]
    assert page.wholes(240)[-1] == folded.patches[0].image_id


@pytest.mark.parametrize(
    ("base", "link"),
    [
        ("/runs/one/toytown", "../../toytown/0/000.png"),
        ("/a b/#x", "file:///a%20b/%23x/0/000.png"),
        ("/runs/one.more", "file:///runs/one.more/0/000.png"),
        ("s3://bucket/set", None),
        ("javascript:alert(1)", None),
    ],
)
def test_links_to_images(base: str, link: str | None) -> None:
    found = data(site(tables(["arch"], base=base), settings()), 0)["images"]
    assert (found["id"][0], found["href"][0]) == ("0/000.png", link)
    assert (found["base"], found["uri"][0]) == (f"{base}/", None), "base and id make the URI"


def test_an_image_from_elsewhere_has_its_own_uri() -> None:
    found = tables(["arch"])
    rows = found["manifest"].to_pylist()
    rows[3]["uri"] = "s3://elsewhere/a.png"
    one = data(site(found | {"manifest": rows_to_table("manifest", rows)}, settings()), 0)["images"]
    assert dict(zip(one["id"], one["uri"], strict=True))["0/003.png"] == "s3://elsewhere/a.png"
    assert one["uri"].count(None) == 11


def test_what_is_missing_is_named() -> None:
    found = tables(["arch"])
    lost = rows_to_table("manifest", [{"image_id": "z", "uri": "/z", "labels": ["lost"], "boxes": None}])
    failure = {"image_id": "z", "uri": "/z", "reason": "truncated", "detail": "ends early"}
    found = {
        **found, "manifest": pa.concat_tables([found["manifest"], lost]),
        "failures": rows_to_table("failures", [failure]),
    }  # fmt: skip
    text = " ".join(pages(site(found, settings()))["index.html"].text.split())
    assert "1 image could not be used" in text
    assert "truncated1z" in text
    assert "none of their images was usable: lost." in text
    assert text.count("Without a patch") == 1


def test_labels_without_another_to_compare_with_are_not_called_unusable() -> None:
    """Images of `none` have the one label that is scored; that of `lost` failed."""
    found, about = tables(["arch"]), settings()
    about["config"]["typicality"].update(against="others", labels=["none"])
    more = [{"image_id": i, "uri": f"/{i}", "labels": [i], "boxes": None} for i in ("none", "lost")]
    failure = {"image_id": "lost", "uri": "/lost", "reason": "truncated", "detail": "ends early"}
    found = {
        **found, "manifest": pa.concat_tables([found["manifest"], rows_to_table("manifest", more)]),
        "failures": rows_to_table("failures", [failure]),
    }  # fmt: skip
    text = " ".join(pages(site(found, about))["index.html"].text.split())
    assert "none of their images was usable: lost." in text
    assert "since their images have every label that was scored, and so no other to compare with: none." in text


def test_only_the_config_and_four_tables_are_needed() -> None:
    found = {name: table for name, table in tables(["arch"]).items() if name not in ("samples", "failures")}
    files = site(found, {"config": settings()["config"]})
    assert not any("samples" in name for name in files)
    assert "Nothing: every image was used." in pages(files)["index.html"].text


def test_a_run_without_patches_has_an_overview() -> None:
    found = {name: table if name == "manifest" else table[:0] for name, table in tables(["arch"]).items()}
    assert set(site(found, settings())) == {"index.html", "style.css"}


def test_chance_stands_beside_the_hit_rate(hostile: dict[str, bytes]) -> None:
    text = " ".join(pages(hostile)["index.html"].text.split())
    assert text.count("3 of 9 most typical on its boxes, chance 10 %") == len(HOSTILE)
    table = " ".join(pages(hostile)["labels/0000.html"].text.split())
    assert "most typical 3 of 933 % random 4 of 1,0000.4 % chance" in table, "without a row of no patches"
    assert "annotated images" not in text + table, "all are"


def test_hits_in_a_part_of_the_images_say_so() -> None:
    hit = {"label": "arch", "top": (9, 9), "random": (0, 0), "bottom": (0, 0), "chance": 0.1}
    found, partly = tables(["arch"]), {**hit, "annotated": 5, "images": 12}
    said = pages(site(found, settings(hits=[partly])))
    overview, page = (" ".join(said[name].text.split()) for name in ("index.html", "labels/0000.html"))
    assert "9 of 9 most typical of 5 annotated images on its boxes, chance 10 %" in overview
    assert "Patches and windows of images that are not annotated are left out." in overview
    assert "Patches of 5 annotated images on annotated boxes" in page
    [_, line] = summary(found["clusters"], [partly], None)
    assert "9 of the 9 most typical patches of 5 annotated images on its boxes (chance 10%)" in line
    [_, line] = summary(found["clusters"], [{**hit, "annotated": 12, "images": 12}], None)
    assert "9 of the 9 most typical patches on its boxes (chance 10%)" in line


def test_a_long_label_leaves_the_lines_of_the_terminal_short() -> None:
    lines = list(summary(tables(["a" * 200, "door\n2"])["clusters"], None, None))
    assert len(lines) == 3
    assert max(map(len, lines)) < 90
    assert len({line.index("median T") for line in lines[1:]}) == 1


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("../photos", "photos"),
        ("s3://bucket/set/", "set"),
        ("a b", "a b"),
        ("..", ".."),
        ("/", "/"),
        ("x/t.csv", "t.csv"),
    ],
)
def test_a_dataset_is_named_by_the_end_of_its_path(source: str, name: str) -> None:
    assert dataset_name(source) == name


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.24, "0.2 s"), (59.6, "1 min 0 s"), (87, "1 min 27 s"), (3599, "59 min"), (7260, "2 h 1 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_script_shows_the_numbers_of_the_page() -> None:
    """Rounded for the script first, then by it."""
    found = tables(["arch"])
    clusters = [{**row, "median_typicality": 0.00788501} for row in found["clusters"].to_pylist()]
    files = site({**found, "clusters": rows_to_table("clusters", clusters)}, settings())
    one = data(files, 0)
    shown = f"{one['clusters'][0]['median']:+.{one['decimals']}f}"
    assert shown == "+0.00789"
    assert f"T {shown} ± 0.00040 median, 12 patches" in pages(files)["labels/0000.html"].text


def test_a_patch_of_another_shape_is_centred_in_its_cell() -> None:
    cell = np.asarray(images.cell(np.full((40, 80, 3), 200, np.uint8), (0, 0, 80, 40), images.CELL))
    assert cell.shape == (images.CELL, images.CELL, 4)
    assert (cell[:, :, 3] > 0).sum(0).tolist() == [images.CELL // 2] * images.CELL


def test_patches_of_a_label_are_taken_away_as_tables(two: dict[str, bytes]) -> None:
    found = tables(["arch", "door"])
    for number, label in enumerate(["arch", "door"]):
        rows = csv.read_csv(io.BytesIO(two[f"labels/{number:04d}.csv"])).to_pylist()
        own = [r for r in found["patches"].to_pylist() if (r["label"], r["kind"]) == (label, "top")]
        assert [r["patch_id"] for r in rows] == [r["patch_id"] for r in sorted(own, key=lambda r: r["rank"])]
        assert all(r["uri"] == f"/data/set/{r['image_id']}" for r in rows)
        assert {r["cluster_rank"] for r in rows} == {0, 1, 2, 3}
        columns = parquet.read_table(io.BytesIO(two[f"labels/{number:04d}.parquet"])).to_pylist()
        assert [(r["patch_id"], r["x"], r["uri"]) for r in columns] == [(r["patch_id"], r["x"], r["uri"]) for r in rows]


def test_columns_that_a_csv_cannot_hold_are_taken_away_as_json() -> None:
    found, values = tables(["arch"]), {"place": [1.5, None], "eye": {"left": [3]}, "thumbnail": b"\xff", "year": 1931}
    for name, value in values.items():
        found["manifest"] = found["manifest"].append_column(name, pa.array([value, *[None] * 11]))
    files = site(found, settings())
    rows, columns = csv.read_csv(io.BytesIO(files["labels/0000.csv"])), files["labels/0000.parquet"]
    own = rows.filter(pa.compute.equal(rows["image_id"], "0/000.png")).to_pylist()
    assert [json.loads(own[0][name]) for name in ("place", "eye")] == [values["place"], values["eye"]]
    assert own[0]["year"] == 1931
    assert "0/001.png" in rows["image_id"].to_pylist(), "where all are null"
    kept = next(r for r in parquet.read_table(io.BytesIO(columns)).to_pylist() if r["image_id"] == "0/000.png")
    assert {name: kept[name] for name in values} == values


def test_labels_say_in_how_many_images_their_leading_cluster_is(two: dict[str, bytes]) -> None:
    found = tables(["arch", "door"])
    for label in ("arch", "door"):
        clusters = [c for c in found["clusters"].to_pylist() if c["label"] == label]
        best = max((c for c in clusters if c["images"] >= 3), key=lambda c: c["median_typicality"])
        article = re.search(rf'<article[^>]*data-name="{label}"[^>]*>', two["index.html"].decode())
        assert article
        assert f'data-coverage="{best["images"] / 12}"' in article[0]
        text = f"12 images; the leading one of 4 clusters covers {best['images']} of them, {best['images'] / 12:.0%}"
        assert text.replace("%", " %") in " ".join(pages(two)["index.html"].text.split())


def test_a_share_is_of_the_images_that_could_be_used() -> None:
    found = tables(["arch"])
    lost = {"image_id": "0/011.png", "uri": "/data/set/0/011.png", "reason": "empty", "detail": "no bytes"}
    index = pages(site({**found, "failures": rows_to_table("failures", [lost])}, settings()))["index.html"].text
    of = min((c["rank"], c["images"]) for c in found["clusters"].to_pylist() if c["images"] >= 3)[1]
    said = f"12 images, 11 of them usable; the leading one of 4 clusters covers {of} of them, {of / 11:.0%}"
    assert said.replace("%", " %") in " ".join(index.split())


def test_a_page_says_what_it_leaves_out_and_nothing_twice() -> None:
    about = settings()
    about["config"]["report"]["patches_per_cluster"] = 5
    text = " ".join(pages(site(tables(["arch"]), about))["labels/0000.html"].text.split())
    assert "12 patches of 4 images, 5 shown" in text
    assert "3 patches of 1 image " in text
    assert text.count("Random patches were drawn without a look at T.") == 1


def test_a_run_that_has_no_label_of_this_one_cannot_stand_beside() -> None:
    said = "base (report.beside) has none of these labels"
    for beside, alone in ((["door"], True), (["arch"], False)):
        found = pages(site(tables(["arch", "gate"]), settings(beside=beside, beside_name="/runs/base")))
        assert (said in found["index.html"].text, said in found["compare.html"].text) == (alone, alone)
        assert (found["compare.html"].text.count("(base)") > 0) == (not alone)
    assert "compare.html" not in site(tables(["arch"]), settings(beside=["door"], beside_name="/runs/base"))


@pytest.mark.parametrize(
    ("section", "key", "value", "said", "unsaid"),
    [
        ("typicality", "against", "others", "kept the 1,000 windows with the largest T less that", "most typical w"),
        ("typicality", "against", "others", "does not have (a choice that is not in the paper)", "most typical w"),
        ("typicality", "against", "others", "Patches were chosen by T less that of the strongest", "by the score that"),
        ("typicality", "against", "others", "above the other labels; with fresh draws", "shown with them"),
        ("finetune", "lora_rank", 8, "finetuned by low-rank adapters of its attention (rank 8) for 4", "finetuned for"),
        ("finetune", "lora_rank", 8, "trained by low-rank adapters of its attention (rank 8) for 4", "trained for"),
        ("clusters", "scope", "dataset", "grouped those of all labels by k-means", "grouped them"),
        ("dataset", "group_column", "artist", "held out, those of one artist together, and", "held out, and"),
    ],
)
def test_what_was_done_otherwise_is_said(section: str, key: str, value: object, said: str, unsaid: str) -> None:
    about = settings(finetuning=finetuning(["a", "b"]))
    for changed in (False, True):
        if changed:
            about["config"][section][key] = value
        text = _overview_text(about)
        assert (said in text, unsaid in text) == (changed, not changed)


def test_methods_have_the_numbers_of_the_run() -> None:
    text = " ".join(pages(site(tables(["a", "b"]), settings(draws=17)))["index.html"].text.split())
    assert "We mined 24 images with 2 labels using diffmine 0.1.0" in text
    assert "finetuned for 400 steps of 64 images" in text
    assert "held out" not in text
    assert "estimated in bfloat16 with 17 draws of (t, ε), t between 0.1 and 0.7" in text
    assert "@inproceedings{siglidis2024diffusion," in text


def test_methods_say_what_the_paper_does_otherwise() -> None:
    told: list[tuple[str, str, object, str]] = [
        ("finetune", "t_max", 0.75, "timesteps lay between 0.0 and 0.75 of the schedule, "),
        ("finetune", "min_snr_gamma", 5.0, "losses had min-SNR weights (γ = 5), "),
        ("finetune", "crop", 16, "images were random crops of 16 × 16 latent cells, "),
        ("finetune", "balance_labels", True, "every label was seen equally often, "),
        ("finetune", "multi_label", "joined", "all labels of an image made up one prompt, "),
        ("finetune", "ema_decay", 0.99, "weights were averaged (exponentially, decay 0.99)."),
        ("finetune", "warmup_steps", 20, "of 0.0001, which rose over the first 20 steps"),
        ("finetune", "decay_steps", 2400, " and fell to zero over the last 2,400, with"),
        ("finetune", "label_dropout", 0.05, "(without the label “”, as 5 % of the images were seen)"),
        ("model", "text_encoder", "<b>/clip", "(tiny, with the text encoder <b>/clip)"),
        ("model", "dtype", "float16", "in float16 with 24 draws"),
        ("typicality", "labels", "all", "under its labels c and all others was estimated"),
        ("dataset", "image", {"short_side": 256}, "scaled to a short side of 256 px"),
    ]
    usual, changed = settings(), settings()
    for section, key, value, _ in told:
        changed["config"][section][key] = value
    changed["config"]["seed"] = 7
    before, after = (_overview_text(about) for about in (usual, changed))
    for said in [*(said for *_, said in told), "The seed was 7."]:
        assert (said in before, said in after) == (False, True), said
    assert "of 0.0001, with the prompt “An image of {label}.” (without the label “”, as 10 % of the images" in before
    assert "were seen). In training, weights were averaged (exponentially, decay 0.9999). The typicality" in before
    usual["config"]["finetune"]["ema_decay"] = 0.0
    usual["config"]["typicality"]["labels"] = ["a", "<b>"]
    text = _overview_text(usual)
    assert "In training" not in text
    assert "under its labels c and under a, <b> was estimated in bfloat16" in text


def _overview_text(about: dict[str, Any]) -> str:
    return " ".join(Page(dict(Site(tables(["a", "b"]), about).overview({}))["index.html"]).text.split())


def test_the_script_has_the_maps_under_the_patches() -> None:
    """Independently: the value at each cell of a patch, of maps that say where it is, and whose label's they are."""
    rows, columns = np.mgrid[:12, :16]
    whole = (rows - 2 * columns).astype(np.float32) / 100
    sign = {"arch": 1, "door": -1}
    found = tables(list(sign), joint=True, shared=True)
    one = data(dict(build(found, settings(joint=True), map_of=lambda _, label: sign[label] * whole)), 0)
    assert one["unit"] == pytest.approx(np.quantile(np.abs(_all_under(one, whole)), 0.99), rel=1e-3)
    assert all(one["images"]["whole"])
    assert len(one["maps"]) == 2 * len(one["images"]["id"])
    for i, label in enumerate(one["patches"]["label"]):
        under = _under(one["patches"]["box"][i], whole)
        for packed, want in ((one["patches"]["map"][i], under), (one["maps"][one["patches"]["whole"][i]], whole)):
            height, width, text = packed
            steps = np.frombuffer(base64.b64decode(text), np.int8).reshape(height, width)
            wanted = (sign[label] * want).clip(-one["unit"], one["unit"])
            assert np.allclose(steps * one["unit"] / 127, wanted, atol=one["unit"] / 200), (i, label)


def _under(box: list[int], whole: np.ndarray) -> np.ndarray:
    """The cells of 8 pixels at the middles of a patch's 4 x 4 parts."""
    x, y, width, height = box
    assert (width, height) == (32, 32)
    return np.array([[whole[(y + 4 + 8 * i) // 8, (x + 4 + 8 * j) // 8] for j in range(4)] for i in range(4)])


def _all_under(one: dict[str, Any], whole: np.ndarray) -> np.ndarray:
    """Of every patch once: one may be in a cluster and among the best."""
    boxes = dict(zip(one["patches"]["id"], one["patches"]["box"], strict=True)).values()
    return np.concatenate([_under(box, whole).ravel() for box in boxes])


def test_what_the_manifest_says_of_an_image_goes_with_it() -> None:
    found = tables(["arch"])
    years = pa.array([1900 + i for i in range(len(found["manifest"]))])
    found["manifest"] = found["manifest"].append_column("year", years)
    one = data(site(found, settings()), 0)["images"]
    assert dict(zip(one["id"], one["facts"], strict=True))["0/003.png"] == {"year": "1903"}


def test_small_clusters_are_folded() -> None:
    found = tables(["arch"])
    members = found["members"].to_pylist()
    for row in members[:2]:
        row["cluster"] = 9
    clusters = [
        *found["clusters"].to_pylist(),
        {"label": "arch", "cluster": 9, "rank": 4, "size": 2, "images": 2, "median_typicality": 0.0},
    ]
    found |= {"members": rows_to_table("members", members), "clusters": rows_to_table("clusters", clusters)}
    rows = pages(site(found, settings()))["labels/0000.html"].all("details")
    assert [(row["data-rank"], "open" in row) for row in rows] == [
        ("0", True),
        ("1", True),
        ("2", True),
        ("3", False),
        ("4", False),
    ]


def test_a_cluster_of_few_images_does_not_lead() -> None:
    found = tables(["arch"])
    clusters = found["clusters"].to_pylist()
    for row in clusters:  # the one from a single image, which was the last
        row["rank"] = (row["rank"] + 1) % 4
    index = pages(site({**found, "clusters": rows_to_table("clusters", clusters)}, settings()))["index.html"]
    assert {img["src"] for img in index.all("img")} == {"images/0000/cluster-001.webp"}
    assert "is from one image" not in index.text
