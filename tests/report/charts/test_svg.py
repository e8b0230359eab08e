"""What all charts have in common."""

import re

import numpy as np
import pyarrow as pa
from drawn import ASSETS, parsed

from diffmine.report.charts.facets import Facets
from diffmine.report.charts.histogram import histogram_svg, spark_svg
from diffmine.report.charts.losses import training_svg, validation_svg
from diffmine.report.charts.maps import map_svg
from diffmine.report.charts.timeline import timeline_svg


def test_every_class_has_its_rule() -> None:
    """A class without a rule would be drawn black."""
    facets = Facets(pa.array(["a"]), *(np.array([v], np.float32) for v in (2.0, 48.0, np.nan, 1930)))
    drawn = [map_svg(facets, ["a"], ["a"]), timeline_svg(facets, ["a"], ["a"]), spark_svg(np.ones(3), -1, 1)]
    drawn.append(histogram_svg({"a": np.ones(3), "b": np.zeros(3), "c": -np.ones(3)}))
    drawn += [training_svg([0.0] * 20, 20), validation_svg([0, 1], [1.0, 2.0], 0, "Loss")]
    tags = ("path", "g", "rect", "circle")
    shapes = {e.get("class") for svg in drawn for e in parsed(svg).iter() if e.tag in tags} - {None}  # dots in groups
    css = (ASSETS / "charts.css").read_text()
    assert {name for name in shapes if not re.search(rf"\.{name}\b[^}}]*\bfill:", css)} == set()
