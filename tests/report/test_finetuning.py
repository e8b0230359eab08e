"""What the report says of finetuning: losses, held-out images, and how their patches compare."""

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_run import finetuning, image, settings, tables

from diffmine.report.finetuning import Finetuning, compared
from diffmine.report.page import page_files
from diffmine.report.site import Site

LABELS = ["arch", "door"]
TABLES = tables(LABELS)


def site(told: Finetuning | None) -> Site:
    return Site(TABLES, settings(finetuning=told))


def overview(told: Finetuning | None) -> str:
    return words(dict(site(told).overview({}))["index.html"])


def page(told: Finetuning, number: int) -> dict[str, bytes]:
    """The files of a label."""
    job = list(site(told).jobs())[number]
    return dict(page_files(job, map(image, job.page.image_ids()), {}, {}))


def words(html: bytes) -> str:
    return " ".join(re.sub(r"<[^>]*>", "", html.decode()).split())


def test_the_overview_says_how_it_was_trained() -> None:
    text = overview(finetuning(LABELS))
    assert "trained for 400 steps on 22 images; its loss went from 0.2976 to 0.2026. 2 images (8.3 %) were held" in text
    assert "the loss with the label went from 0.3100 to 0.2200, and what the label tells (squared error of ε" in text
    assert "of training) from +0.0000 to +0.0100. The weights after step 300, which did best there, are used." in text
    assert "as 10 % of the images were seen); 2 images (8.3 %) were held out, and the weights that did best" in text
    assert "Training loss, smoothed" in text
    assert "used: step 300" in text


@pytest.mark.parametrize(("base", "warned"), [(0.0, False), (0.01, True), (0.02, True)])
def test_labels_that_tell_no_more_than_before_are_no_secret(base: float, warned: bool) -> None:
    told = finetuning(LABELS)
    first = told.validation[0] | {"typicality": base}  # 0.01 after step 300
    text = overview(replace(told, validation=[first, *told.validation[1:]]))
    assert ("are used. Labels tell no more of held-out images than they told the base model, so T" in text) == warned


def test_patches_of_held_out_images_are_compared_with_the_others() -> None:
    patches = TABLES["patches"]
    top = [row for row in patches.to_pylist() if row["kind"] == "top"]
    wanted = {
        name: [row["typicality"] for row in top if row["image_id"].endswith("/001.png") == held]
        for name, held in (("trained", False), ("held_out", True))
    }
    found = compared(patches, finetuning(LABELS).held_out)
    assert found == {name: (len(values), pytest.approx(np.median(values))) for name, values in wanted.items()}
    assert compared(patches, frozenset()) is None
    assert (compared(patches, frozenset(["elsewhere"])) or {})["held_out"] == (0, None)
    text = overview(finetuning(LABELS))
    trained, held = (f"+{np.median(values):.4f}" for values in wanted.values())
    assert f"66 (median T {trained}) are of images trained on, and 6 (median T {held}) of" in text
    assert "held-out ones: 8.3 % of the patches, from 8.3 % of the images" in text


def test_a_label_has_its_own_losses() -> None:
    told = replace(finetuning(LABELS), validation=finetuning(["door"]).validation)
    assert "not trained on" not in words(page(told, 0)["labels/0000.html"])
    assert (
        "On 1 image of this label that the model was not trained on, its loss with the label is 0.2200, and the label "
        "tells +0.0100 (squared error of ε without it less that with it, over the timesteps of training); before "
        "finetuning 0.3100 and +0.0000."
    ) in words(page(told, 1)["labels/0001.html"])


def test_held_out_images_are_marked() -> None:
    text = page(finetuning(LABELS), 0)["labels/0000.js"].decode()
    found = json.loads(text[text.index("]=") + 2 :].rstrip(";\n"))["images"]
    marked = {name for name, facts in zip(found["id"], found["facts"], strict=True) if "held out" in facts}
    assert marked == {"0/001.png"}


def test_the_base_model_may_be_the_best() -> None:
    told = finetuning(LABELS)
    same = replace(told, validation=[{**one, "exported": one["step"] == 0} for one in told.validation])
    assert same.kept == same.validation[0]
    text = overview(same)
    assert "No step did better than the base model, so its weights are used." in text
    assert "before finetuning" not in words(page(same, 0)["labels/0000.html"])


@pytest.mark.parametrize(
    "missing", [{"validation": ()}, {"held_out": frozenset()}, {"trained": None}, {"loss": [0.3] * 5}]
)
def test_a_run_that_knows_less_says_less(missing: dict[str, Any]) -> None:
    text = overview(replace(finetuning(LABELS), **missing))
    assert ("were held out:" in text) == ("held_out" not in missing)
    assert ("On held-out images" in text) == ("validation" not in missing)
    assert ("on 22 images" in text) == ("trained" not in missing)
    assert ("Training loss, smoothed" in text) == ("loss" not in missing)


def test_a_run_without_finetuning_does_not_speak_of_it() -> None:
    text = overview(None)
    assert text == overview(Finetuning())
    assert "The model was trained" not in text
    assert "held out" not in text
