"""What tests of charts share: manifests to draw from, and charts read back."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import pyarrow as pa

ASSETS = files("diffmine.report") / "assets"


def manifest(labels: Sequence[str] | Sequence[list[str]] = (), **columns: Any) -> pa.Table:
    """Images a000, a001 ... with these columns; the label is "x" where none is given."""
    count = len(labels) or len(next(iter(columns.values()), ()))
    lists = [[label] if isinstance(label, str) else label for label in labels or ["x"] * count]
    ids = pa.array([f"a{i:03d}" for i in range(count)], pa.string())
    return pa.table({"image_id": ids, "labels": pa.array(lists, pa.list_(pa.string())), **columns})


def parsed(svg: str | None) -> ET.Element:
    """A chart as an element, checked for what every chart must be."""
    assert svg is not None
    root = ET.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert "style" not in svg
    assert "script" not in {element.tag for element in root.iter()}
    assert len(svg) < 40_000
    numbers = " ".join(v for element in root.iter() for key, v in element.items() if key not in ("class", "aria-label"))
    assert not re.search(r"nan|inf|e-|\.\d\d", numbers)
    return root


def label_of(svg: str | None) -> str:
    return parsed(svg).get("aria-label", "")


def texts(svg: str | None) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter("text")]
