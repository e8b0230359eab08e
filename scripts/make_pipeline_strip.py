"""A mined toytown -> an image, its map of T, the chosen patches, clusters and the report, side by side in one picture.

python scripts/make_pipeline_strip.py runs/toytown docs/pipeline.webp --label Brookvale --report docs/label.webp
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont

import diffmine

PAPER, INK, QUIET, BOX = (251, 250, 248), (27, 28, 30), (95, 99, 105), (255, 214, 10)
UP, DOWN = (230, 97, 1), (94, 60, 153)  # as the report has them
SIDE, GAP, MARGIN, TOP = 256, 56, 20, 44
ROWS, COLUMNS = 4, 4  # clusters, and patches of each
FONT = ImageFont.load_default(22)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("run")
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--label", default="Brookvale")
    arguments.add_argument("--report", type=Path, default=Path("docs/label.webp"))
    given = arguments.parse_args()
    run = diffmine.open_run(given.run)
    uris = dict(zip(*(run["manifest"][name].to_pylist() for name in ("image_id", "uri")), strict=True))
    top = of(run["patches"], label=given.label, kind="top").sort_by("rank")
    image_id = leading_image(top)
    image = open_image(uris[image_id])
    shown = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    [row] = of(run["typicality"], label=given.label, image_id=image_id).to_pylist()
    panels = {
        f"an image of {given.label}": shown,
        "its map of T": with_map(shown, np.array(row["map"], np.float32).reshape(row["h"], row["w"])),
        "most typical patches": with_boxes(shown, of(top, image_id=image_id), SIDE / image.width),
        "clusters": clusters(run, given.label, top, uris),
        "report": corner(Image.open(given.report).convert("RGB")),
    }
    side_by_side(panels).save(given.out, quality=88, method=6)


def of(table: pa.Table, **values: str) -> pa.Table:
    """Rows with these values."""
    for name, value in values.items():
        table = table.filter(pc.equal(table[name], value))
    return table


def leading_image(top: pa.Table) -> str:
    """The image of the most typical patch."""
    return top["image_id"][0].as_py()


def open_image(uri: str) -> Image.Image:
    return Image.open(uri).convert("RGB")


def with_map(image: Image.Image, values: np.ndarray) -> Image.Image:
    """The image in pale grey, and over it T: orange above zero, violet below, clear at zero."""
    scale = np.abs(values).max()
    large = np.array(Image.fromarray(values / scale).resize(image.size, Image.Resampling.BICUBIC))[..., None]
    below = 0.55 * np.array(image.convert("L").convert("RGB"), np.float32) + 0.45 * 255
    strength = np.clip(np.abs(large), 0, 1) ** 0.8 * 0.9
    mixed = below * (1 - strength) + np.where(large > 0, UP, DOWN) * strength
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def with_boxes(image: Image.Image, patches: pa.Table, scale: float) -> Image.Image:
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for p in patches.to_pylist():
        box = [round(v * scale) for v in (p["x"], p["y"], p["x"] + p["width"] - 1, p["y"] + p["height"] - 1)]
        draw.rectangle([box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1], outline=INK, width=5)
        draw.rectangle(box, outline=BOX, width=3)
    return image


def clusters(run: Any, label: str, top: pa.Table, uris: dict[str, str]) -> Image.Image:
    """The first clusters, a row each; patches from the middle of a cluster outwards, one of an image."""
    picture, cell = Image.new("RGB", (SIDE, SIDE), PAPER), SIDE // COLUMNS
    patches = {p["patch_id"]: p for p in top.to_pylist()}
    members = of(run["members"], label=label).sort_by("distance").to_pylist()
    for rank in range(ROWS):
        row: dict[str, dict] = {}
        for member in members:
            if member["cluster"] == rank:
                row.setdefault(patches[member["patch_id"]]["image_id"], patches[member["patch_id"]])
        for column, p in enumerate([*row.values()][:COLUMNS]):
            cut = open_image(uris[p["image_id"]]).crop((p["x"], p["y"], p["x"] + p["width"], p["y"] + p["height"]))
            picture.paste(cut.resize((cell - 3, cell - 3), Image.Resampling.BICUBIC), (column * cell, rank * cell))
    return picture


def corner(report: Image.Image) -> Image.Image:
    """The upper left of a picture of the report, with a frame."""
    side = round(0.75 * min(report.size))
    small = report.crop((0, 0, side, side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    ImageDraw.Draw(small).rectangle([0, 0, SIDE - 1, SIDE - 1], outline=(200, 196, 188), width=2)
    return small


def side_by_side(panels: dict[str, Image.Image]) -> Image.Image:
    """Panels under their names, with arrows between them."""
    width = 2 * MARGIN + len(panels) * SIDE + (len(panels) - 1) * GAP
    picture = Image.new("RGB", (width, TOP + SIDE + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (name, panel) in enumerate(panels.items()):
        x = MARGIN + i * (SIDE + GAP)
        draw.text((x + SIDE / 2, TOP / 2 + 2), name, fill=INK, font=FONT, anchor="mm")
        picture.paste(panel, (x, TOP))
        if i:
            y, left, right = TOP + SIDE / 2, x - GAP + 12, x - 12
            draw.line([left, y, right - 6, y], fill=QUIET, width=4)
            draw.polygon([(right, y), (right - 12, y - 8), (right - 12, y + 8)], fill=QUIET)
    return picture


if __name__ == "__main__":
    main()
