"""Scenes that share no code with toytown: a sea front seen by another hand, drawn with other shapes, colours and sizes.

Five labels have an element of their own (in 80 % of their images), one has none. `draw(folder, ...)` writes
`<label>/<n>.jpg` and `boxes.csv`.
"""

import csv
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

ELEMENTS = {
    "alba": "umbrella",
    "brena": "lighthouse",
    "corvo": "flagpole",
    "dorso": "crates",
    "elmar": "buoy",
    "fosca": None,
}
SIZE = 160


def draw(folder: Path, per_label: int, seed: int = 99) -> None:
    with (folder / "boxes.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "x", "y", "w", "h"])
        for label, element in ELEMENTS.items():
            (folder / label).mkdir()
            for n in range(per_label):
                rng = random.Random(f"{seed} {label} {n}")
                image = _front(rng)
                if element and rng.random() < 0.8:
                    x0, y0, x1, y1 = _element(image, element, rng)
                    box = max(0, x0), max(0, y0), min(SIZE, x1), min(SIZE, y1)
                    table.writerow([f"{label}/{n}.jpg", label, box[0], box[1], box[2] - box[0], box[3] - box[1]])
                else:
                    table.writerow([f"{label}/{n}.jpg", label, "", "", "", ""])
                image.save(folder / label / f"{n}.jpg", quality=92)


def _near(rng: random.Random, *colour: int, by: int = 25) -> tuple[int, ...]:
    return tuple(max(0, min(255, c + rng.randint(-by, by))) for c in colour)


def _front(rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), _near(rng, 190, 215, 235))
    d = ImageDraw.Draw(image)
    sea = rng.randint(62, 80)
    d.rectangle([0, sea, SIZE, SIZE], fill=_near(rng, 70, 120, 150))
    for _ in range(14):
        x, y = rng.randint(0, SIZE), rng.randint(sea + 3, 110)
        d.line([x, y, x + rng.randint(6, 20), y], fill=_near(rng, 150, 185, 205))
    beach = rng.randint(104, 118)
    d.polygon(
        [(0, beach), (SIZE, beach + rng.randint(-10, 10)), (SIZE, SIZE), (0, SIZE)], fill=_near(rng, 220, 200, 150)
    )
    for _ in range(rng.randint(0, 3)):  # boats
        x, y, s = rng.randint(5, SIZE - 30), rng.randint(sea + 6, sea + 25), rng.uniform(0.7, 1.3)
        d.polygon(
            [(x, y), (x + 26 * s, y), (x + 20 * s, y + 7 * s), (x + 5 * s, y + 7 * s)], fill=_near(rng, 110, 80, 60)
        )
        d.polygon(
            [(x + 12 * s, y - 24 * s), (x + 12 * s, y - 2), (x + 24 * s, y - 2)], fill=_near(rng, 235, 235, 225, by=15)
        )
    for _ in range(rng.randint(1, 5)):  # rocks
        x, y, r = rng.randint(0, SIZE), rng.randint(beach - 4, SIZE), rng.randint(3, 11)
        d.ellipse([x - r, y - r * 0.6, x + r, y + r * 0.6], fill=_near(rng, 120, 115, 110))
    for _ in range(rng.randint(0, 4)):  # gulls
        x, y = rng.randint(0, SIZE), rng.randint(5, sea - 10)
        d.arc([x, y, x + 8, y + 6], 180, 340, fill=(60, 60, 60))
        d.arc([x + 7, y, x + 15, y + 6], 200, 360, fill=(60, 60, 60))
    for _ in range(rng.randint(0, 2)):  # huts
        x, y, w = rng.randint(0, SIZE - 30), rng.randint(beach - 2, beach + 12), rng.randint(18, 28)
        d.rectangle([x, y - w, x + w, y], fill=_near(rng, 170, 140, 120, by=50))
        d.polygon([(x - 3, y - w), (x + w / 2, y - w - 11), (x + w + 3, y - w)], fill=_near(rng, 110, 70, 60))
    return image


def _element(image: Image.Image, name: str, rng: random.Random) -> tuple[float, float, float, float]:
    d = ImageDraw.Draw(image)
    s, x, y = rng.uniform(0.8, 1.25), rng.randint(24, SIZE - 24), rng.randint(118, 152)
    if name == "umbrella":
        d.line([x, y - 30 * s, x, y], fill=(90, 70, 60), width=2)
        for k in range(5):
            colour = _near(rng, 230, 60, 140, by=12) if k % 2 == 0 else (250, 245, 240)
            d.pieslice([x - 20 * s, y - 44 * s, x + 20 * s, y - 12 * s], 180 + 36 * k, 216 + 36 * k, fill=colour)
        return x - 20 * s, y - 44 * s, x + 20 * s, y
    if name == "lighthouse":
        for k in range(4):
            colour = (245, 245, 245) if k % 2 else _near(rng, 190, 40, 40, by=10)
            d.rectangle([x - 9 * s, y - (12 + 12 * k) * s, x + 9 * s, y - 12 * k * s], fill=colour)
        d.rectangle([x - 7 * s, y - 57 * s, x + 7 * s, y - 48 * s], fill=(250, 220, 90))
        return x - 9 * s, y - 57 * s, x + 9 * s, y
    if name == "flagpole":
        d.line([x - 14 * s, y, x - 14 * s, y - 50 * s], fill=(80, 80, 85), width=2)
        for k, colour in enumerate(((30, 110, 60), (245, 245, 245), (235, 140, 30))):
            d.rectangle(
                [x + (-13 + 10 * k) * s, y - 50 * s, x + (-3 + 10 * k) * s, y - 30 * s], fill=_near(rng, *colour, by=10)
            )
        return x - 15 * s, y - 51 * s, x + 17 * s, y - 20 * s
    if name == "crates":
        for dx, dy in ((-17, 0), (1, 0), (-8, -16)):
            box = [x + dx * s, y + (dy - 16) * s, x + (dx + 16) * s, y + dy * s]
            d.rectangle(box, fill=_near(rng, 165, 110, 50, by=12), outline=(80, 50, 25), width=2)
            d.line([box[0], box[1], box[2], box[3]], fill=(80, 50, 25))
        return x - 17 * s, y - 32 * s, x + 17 * s, y
    y -= rng.randint(8, 40)
    d.ellipse([x - 14 * s, y - 18 * s, x + 14 * s, y + 8 * s], fill=_near(rng, 250, 130, 20, by=10))
    d.rectangle([x - 14 * s, y - 9 * s, x + 14 * s, y - 2 * s], fill=(30, 40, 110))
    for k in range(3):
        a = math.pi * (0.3 + 0.2 * k)
        d.line([x, y - 18 * s, x + 9 * s * math.cos(a), y - 30 * s], fill=(40, 40, 50), width=2)
    return x - 14 * s, y - 30 * s, x + 14 * s, y + 8 * s
