"""seed -> street scenes drawn by code, with a planted typical element per label and its boxes.

Every label shares the distractors (houses, windows, trees, cars, poles, signs). Each label but one has a typical
element, drawn in 85 % of its images and in 3 % of the others'. `fountain` is typical of two labels; `Greyfield` has
nothing of its own and is the null control. As the truth is known, a run on these images can say how good it is.
"""

import csv
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from diffmine.randomness import generator

LABELS: dict[str, str | None] = {
    "Ashford": "mailbox",
    "Brookvale": "windmill",
    "Cedarton": "lantern",
    "Dunmore": "fountain",
    "Eastwick": "fountain",
    "Fairhaven": "kiosk",
    "Greyfield": None,
}
IMAGES_PER_LABEL = 150
SIZE = 128  # pixels of a side
_DRAWN = 2 * SIZE  # drawn at twice the size and reduced, for smooth edges
_OWN, _FOREIGN = 0.85, 0.03  # how often an element is drawn in its own labels' images, and in the others'

Colour = tuple[int, int, int]
BoxXYXY = tuple[float, float, float, float]


@dataclass(frozen=True)
class Box:
    """Where an element lies, in pixels of the finished scene."""

    element: str
    x: float
    y: float
    width: float
    height: float


@dataclass
class _Canvas:
    draw: ImageDraw.ImageDraw
    rng: np.random.Generator
    horizon: float  # y of the pavement's upper edge, in drawn pixels

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, *colours: Colour, jitter: float = 18) -> Colour:
        """One of the colours, shifted a little."""
        return _shift(colours[int(self.rng.integers(len(colours)))], self.rng.normal(0, jitter, 3))


def _shift(colour: Colour, by: np.ndarray | float) -> Colour:
    shifted = np.clip(np.asarray(colour, dtype=np.float64) + by, 0, 255).astype(int)
    return int(shifted[0]), int(shifted[1]), int(shifted[2])


# ------------------------------------------------------------------------------------------------ what every street has


def _sky(c: _Canvas) -> None:
    upper = c.pick((150, 190, 230), (190, 200, 215), (235, 200, 170), (120, 150, 190))
    lower = _shift(upper, c.between(10, 45))
    for row in range(int(c.horizon)):
        k = row / c.horizon
        blend = tuple(int(a * (1 - k) + b * k) for a, b in zip(upper, lower, strict=True))
        c.draw.line([(0, row), (_DRAWN, row)], fill=blend)
    for _ in range(int(c.rng.integers(0, 4))):
        x, y, r = c.between(0, _DRAWN), c.between(5, 60), c.between(8, 22)
        for dx in (-r, 0, r):
            c.draw.ellipse([x + dx - r, y - r * 0.5, x + dx + r, y + r * 0.5], fill=_shift(lower, 18))


def _ground(c: _Canvas) -> None:
    pavement = c.pick((175, 170, 160), (150, 150, 155), (190, 175, 150))
    road = c.pick((95, 95, 100), (115, 110, 108), (80, 82, 90))
    edge = c.horizon + c.between(30, 50)
    c.draw.rectangle([0, c.horizon, _DRAWN, edge], fill=pavement)
    c.draw.rectangle([0, edge, _DRAWN, _DRAWN], fill=road)
    offset = c.between(0, 40)
    for x in range(-40, _DRAWN, 44):
        c.draw.rectangle([x + offset, edge + 20, x + offset + 20, edge + 23], fill=_shift(road, 90))


def _house(c: _Canvas, x: float, width: float) -> None:
    wall = c.pick((200, 170, 140), (180, 100, 80), (210, 205, 195), (150, 160, 150), (225, 200, 130), (140, 130, 140))
    top = c.horizon - c.between(60, 125)
    c.draw.rectangle([x, top, x + width, c.horizon], fill=wall)
    roof = c.pick((120, 60, 50), (80, 80, 90), (100, 85, 70))
    kind = int(c.rng.integers(3))
    if kind == 0:
        c.draw.polygon([(x - 4, top), (x + width / 2, top - c.between(18, 38)), (x + width + 4, top)], fill=roof)
    elif kind == 1:
        c.draw.rectangle([x - 3, top - 8, x + width + 3, top], fill=roof)
    else:
        c.draw.polygon([(x - 4, top), (x + 10, top - 20), (x + width - 10, top - 20), (x + width + 4, top)], fill=roof)
    if c.chance(0.4):
        chimney = x + c.between(0.15, 0.75) * width
        c.draw.rectangle([chimney, top - 32, chimney + 9, top - 4], fill=_shift(roof, -20))
    _windows(c, x, top, width, wall)


def _windows(c: _Canvas, x: float, top: float, width: float, wall: Colour) -> None:
    columns, rows = max(1, int(width // 24)), max(1, int((c.horizon - top) // 34))
    glass = c.pick((90, 110, 140), (220, 215, 160), (60, 70, 85))
    frame = _shift(wall, 40 if c.chance(0.6) else -50)
    door = int(c.rng.integers(columns))
    for row in range(rows):
        for column in range(columns):
            cx = x + width * (column + 0.5) / columns
            y = top + 8 + row * 34
            if row == rows - 1 and column == door:
                c.draw.rectangle(
                    [cx - 7, c.horizon - 27, cx + 7, c.horizon], fill=c.pick((90, 55, 40), (50, 80, 60), (60, 60, 90))
                )
            else:
                c.draw.rectangle([cx - 7, y, cx + 7, y + 18], fill=frame)
                c.draw.rectangle([cx - 5, y + 2, cx + 5, y + 16], fill=glass)
                c.draw.line([(cx, y + 2), (cx, y + 16)], fill=frame)


def _tree(c: _Canvas) -> None:
    x, base, r = c.between(0, _DRAWN), c.horizon + c.between(2, 22), c.between(14, 30)
    height = c.between(40, 70)
    c.draw.rectangle([x - 3, base - height, x + 3, base], fill=c.pick((90, 65, 45), (75, 60, 50)))
    leaf = c.pick((70, 120, 60), (110, 130, 60), (150, 110, 50), (60, 100, 80))
    for _ in range(7):
        dx, dy, s = c.between(-r, r) * 0.7, c.between(-r, r) * 0.6, c.between(0.5, 0.85) * r
        c.draw.ellipse(
            [x + dx - s, base - height + dy - s, x + dx + s, base - height + dy + s],
            fill=_shift(leaf, c.between(-18, 18)),
        )


def _car(c: _Canvas) -> None:
    x, base, s = c.between(-10, _DRAWN - 30), c.horizon + c.between(52, 92), c.between(0.8, 1.25)
    body = c.pick((180, 50, 50), (50, 80, 150), (220, 220, 220), (60, 60, 65), (200, 170, 60), (70, 120, 90))
    c.draw.rounded_rectangle([x, base - 20 * s, x + 62 * s, base - 5 * s], 4 * s, fill=body)
    c.draw.polygon(
        [
            (x + 10 * s, base - 20 * s),
            (x + 20 * s, base - 33 * s),
            (x + 44 * s, base - 33 * s),
            (x + 54 * s, base - 20 * s),
        ],
        fill=_shift(body, -12),
    )
    c.draw.polygon(
        [
            (x + 15 * s, base - 20 * s),
            (x + 22 * s, base - 30 * s),
            (x + 42 * s, base - 30 * s),
            (x + 49 * s, base - 20 * s),
        ],
        fill=c.pick((150, 175, 195), jitter=8),
    )
    for wheel in (14, 48):
        c.draw.ellipse([x + (wheel - 7) * s, base - 12 * s, x + (wheel + 7) * s, base + 2 * s], fill=(35, 35, 38))
        c.draw.ellipse([x + (wheel - 3) * s, base - 8 * s, x + (wheel + 3) * s, base - 2 * s], fill=(150, 150, 150))


def _pole(c: _Canvas) -> None:
    x, base = c.between(0, _DRAWN), c.horizon + c.between(8, 30)
    c.draw.rectangle([x - 1.5, base - c.between(70, 120), x + 1.5, base], fill=c.pick((80, 80, 80), (110, 100, 90)))


def _sign(c: _Canvas) -> None:
    x, base, r = c.between(8, _DRAWN - 8), c.horizon + c.between(8, 30), c.between(7, 10)
    c.draw.rectangle([x - 1.5, base - 45, x + 1.5, base], fill=(100, 100, 105))
    colour = c.pick((50, 90, 170), (190, 50, 50), (230, 190, 60), (230, 230, 230))
    if c.chance(0.5):
        c.draw.ellipse([x - r, base - 45 - r, x + r, base - 45 + r], fill=colour)
        c.draw.ellipse([x - r * 0.6, base - 45 - r * 0.6, x + r * 0.6, base - 45 + r * 0.6], fill=_shift(colour, 60))
    else:
        c.draw.rectangle([x - r, base - 45 - r, x + r, base - 45 + r], fill=colour)


# --------------------------------------------------------------------------------- typical elements: draw, return a box
# Each is drawn with its foot at (x, y) and a height of about 60 s drawn pixels.


def _mailbox(c: _Canvas, x: float, y: float, s: float) -> BoxXYXY:
    body = c.pick((205, 35, 40), (190, 30, 60), (215, 60, 35), jitter=10)
    c.draw.rectangle([x - 15 * s, y - 46 * s, x + 15 * s, y - 5 * s], fill=body)
    c.draw.pieslice([x - 17 * s, y - 62 * s, x + 17 * s, y - 32 * s], 180, 360, fill=_shift(body, -15))
    c.draw.rectangle([x - 17 * s, y - 6 * s, x + 17 * s, y], fill=(30, 30, 32))
    c.draw.rectangle([x - 9 * s, y - 42 * s, x + 9 * s, y - 38 * s], fill=(25, 20, 20))
    c.draw.rectangle([x - 7 * s, y - 31 * s, x + 7 * s, y - 19 * s], fill=(240, 235, 220))
    return x - 17 * s, y - 62 * s, x + 17 * s, y


def _windmill(c: _Canvas, x: float, y: float, s: float) -> BoxXYXY:
    tower = c.pick((235, 230, 220), (215, 200, 180), (200, 190, 200), jitter=8)
    c.draw.polygon([(x - 14 * s, y), (x - 8 * s, y - 46 * s), (x + 8 * s, y - 46 * s), (x + 14 * s, y)], fill=tower)
    c.draw.polygon(
        [(x - 10 * s, y - 45 * s), (x, y - 57 * s), (x + 10 * s, y - 45 * s)], fill=c.pick((110, 50, 40), (60, 60, 80))
    )
    c.draw.rectangle([x - 4 * s, y - 12 * s, x + 4 * s, y], fill=(80, 60, 45))
    turn, blade = c.between(0, math.pi / 2), c.pick((120, 80, 50), (70, 65, 65), jitter=8)
    for arm in range(4):
        a = turn + arm * math.pi / 2
        dx, dy = math.cos(a), math.sin(a)
        tip = (x + 26 * s * dx, y - 44 * s + 26 * s * dy)
        side = (tip[0] - 9 * s * dy, tip[1] + 9 * s * dx)
        c.draw.polygon([(x, y - 44 * s), tip, side], fill=blade)
    return x - 24 * s, y - 68 * s, x + 24 * s, y


def _lantern(c: _Canvas, x: float, y: float, s: float) -> BoxXYXY:
    iron = c.pick((30, 50, 45), (35, 35, 40), (50, 40, 35), jitter=6)
    c.draw.rectangle([x - 4 * s, y - 50 * s, x + 4 * s, y], fill=iron)
    c.draw.rectangle([x - 12 * s, y - 7 * s, x + 12 * s, y], fill=iron)
    c.draw.rectangle([x - 18 * s, y - 46 * s, x + 18 * s, y - 40 * s], fill=iron)
    for side in (-1, 1):
        lamp, light = x + side * 16 * s, c.pick((255, 225, 110), (255, 240, 170), (255, 205, 90), jitter=6)
        c.draw.ellipse([lamp - 13 * s, y - 68 * s, lamp + 13 * s, y - 42 * s], fill=light)
        c.draw.rectangle([lamp - 8 * s, y - 72 * s, lamp + 8 * s, y - 65 * s], fill=iron)
    return x - 29 * s, y - 72 * s, x + 29 * s, y


def _fountain(c: _Canvas, x: float, y: float, s: float) -> BoxXYXY:
    stone = c.pick((200, 200, 205), (180, 185, 190), (205, 195, 180), jitter=8)
    water = c.pick((60, 150, 220), (80, 190, 215), (40, 120, 200), jitter=10)
    c.draw.ellipse([x - 27 * s, y - 16 * s, x + 27 * s, y], fill=stone)
    c.draw.ellipse([x - 22 * s, y - 14 * s, x + 22 * s, y - 4 * s], fill=water)
    c.draw.rectangle([x - 4 * s, y - 30 * s, x + 4 * s, y - 8 * s], fill=_shift(stone, -25))
    c.draw.ellipse([x - 16 * s, y - 34 * s, x + 16 * s, y - 24 * s], fill=stone)
    c.draw.ellipse([x - 12 * s, y - 33 * s, x + 12 * s, y - 27 * s], fill=water)
    spray, width = _shift(water, 60), max(2, int(3 * s))
    for left in (-18, 0):
        c.draw.arc([x + left * s, y - 46 * s, x + (left + 18) * s, y - 8 * s], 180, 360, fill=spray, width=width)
    c.draw.ellipse([x - 4 * s, y - 45 * s, x + 4 * s, y - 32 * s], fill=_shift(water, 70))
    return x - 27 * s, y - 46 * s, x + 27 * s, y


def _kiosk(c: _Canvas, x: float, y: float, s: float) -> BoxXYXY:
    stripe = c.pick((40, 130, 70), (150, 50, 150), (225, 120, 30), jitter=10)
    c.draw.rectangle([x - 24 * s, y - 40 * s, x + 24 * s, y], fill=c.pick((230, 215, 185), (205, 200, 195), jitter=8))
    c.draw.rectangle([x - 18 * s, y - 34 * s, x + 18 * s, y - 17 * s], fill=(55, 50, 55))
    for k in range(6):
        left = x + (-28 + k * 56 / 6) * s
        fill = stripe if k % 2 == 0 else (245, 245, 240)
        c.draw.rectangle([left, y - 54 * s, left + 56 / 6 * s, y - 40 * s], fill=fill)
        c.draw.pieslice([left, y - 45 * s, left + 56 / 6 * s, y - 35 * s], 0, 180, fill=fill)
    return x - 28 * s, y - 54 * s, x + 28 * s, y


ELEMENTS: dict[str, Callable[[_Canvas, float, float, float], BoxXYXY]] = {
    "mailbox": _mailbox,
    "windmill": _windmill,
    "lantern": _lantern,
    "fountain": _fountain,
    "kiosk": _kiosk,
}


# -------------------------------------------------------------------------------------------------------- whole scenes


def scene(rng: np.random.Generator, elements: list[str]) -> tuple[np.ndarray, list[Box]]:
    """Street scene with the given elements.

    Returns:
        uint8 [128, 128, 3] and one box per element, clipped to the picture.
    """
    image = Image.new("RGB", (_DRAWN, _DRAWN))
    c = _Canvas(ImageDraw.Draw(image), rng, horizon=float(rng.uniform(135, 165)))
    _sky(c)
    _ground(c)
    x = -c.between(0, 40)
    while x < _DRAWN:
        width = c.between(48, 84)
        _house(c, x, width)
        x += width + (c.between(6, 34) if c.chance(0.35) else 0)
    for thing, most in ((_pole, 2), (_tree, 3), (_sign, 2)):
        for _ in range(int(rng.integers(0, most + 1))):
            thing(c)
    boxes = [_plant(c, element) for element in elements]
    if elements and c.chance(0.15):
        _tree(c)  # drawn in front: now and then it hides a part of the element
    for _ in range(int(rng.integers(0, 3))):
        _car(c)
    return _finish(image, rng), boxes


def _plant(c: _Canvas, element: str) -> Box:
    x, y, s = c.between(22, _DRAWN - 22), c.horizon + c.between(10, 48), c.between(0.85, 1.35)
    drawn = ELEMENTS[element](c, x, y, s)
    x0, y0, x1, y1 = (min(max(v / 2, 0.0), float(SIZE)) for v in drawn)
    return Box(element, x0, y0, x1 - x0, y1 - y0)


def _finish(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Reduce, then a camera's imperfections: blur, exposure, tint, noise."""
    image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.7))))
    pixels = np.asarray(image, dtype=np.float64) * rng.uniform(0.8, 1.15) + rng.normal(0, 6, 3)
    pixels += rng.normal(0, rng.uniform(1, 4), pixels.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def plain_scene(seed: int, index: int) -> np.ndarray:
    """Scene without any typical element, uint8 [128, 128, 3]: what the tiny base model is trained on."""
    return scene(generator(seed, "plain", index), [])[0]


def labelled_scene(seed: int, label: str, index: int) -> tuple[np.ndarray, list[Box]]:
    """Image `index` of a label."""
    rng = generator(seed, "toytown", label, index)
    elements = [e for e in ELEMENTS if rng.random() < (_OWN if LABELS[label] == e else _FOREIGN)]
    return scene(rng, elements)


def files(seed: int, images_per_label: int) -> Iterator[tuple[str, bytes]]:
    """Files of the dataset: `<label>/NNNN.png` and, last, `boxes.csv` (image,label,x,y,w,h).

    An element typical of two labels has a row for each of them, so that a box's label is always a dataset label. An
    image without an element has a row without a box.
    """
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(["image", "label", "x", "y", "w", "h"])
    for label in LABELS:
        for index in range(images_per_label):
            pixels, boxes = labelled_scene(seed, label, index)
            name = f"{label}/{index:04d}.png"
            for box in boxes:
                for owner in (k for k, element in LABELS.items() if element == box.element):
                    table.writerow([name, owner, *(round(v, 2) for v in (box.x, box.y, box.width, box.height))])
            if not boxes:
                table.writerow([name, label, *[""] * 4])
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG", compress_level=1)  # noise hardly shrinks
            yield name, png.getvalue()
    yield "boxes.csv", rows.getvalue().encode()
