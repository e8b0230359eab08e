"""A run folder -> its tables, and what a notebook shows of it. Needs no Ray.

>>> run = diffmine.open_run("s3://bucket/runs/geo")
>>> run["patches"].to_pandas()
>>> run                            # in a notebook: the leading cluster of each label
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from diffmine.audit import open_run as open_folder
from diffmine.curate import kept, page_labels
from diffmine.data.labels import label_sizes
from diffmine.report.images import CELL
from diffmine.report.rendering import short
from diffmine.report.text import leading
from diffmine.run import SCHEMAS

_SHOWN_LABELS, _SHOWN_PATCHES = 12, 8
TABLES = tuple(sorted(set(SCHEMAS) - {"rounds"}))


class OpenedRun:
    """A run on any filesystem; tables are read when they are asked for.

    Raises:
        InputError: there is no run.
    """

    def __init__(self, uri: str) -> None:
        self._run, self._config = open_folder(uri)

    @property
    def uri(self) -> str:
        return self._run.uri

    @property
    def config(self) -> dict[str, Any]:
        """All settings of the run, nested as in its YAML file."""
        return self._config.model_dump(mode="json")

    def __getitem__(self, table: str) -> pa.Table:
        """A whole table; an empty one where the run has not made it yet. `run.table` reads only some columns.

        Raises:
            KeyError: there is no such table.
        """
        return self.table(table)

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        if name not in TABLES:
            raise KeyError(f"{name}; tables are {', '.join(TABLES)}")
        return self._run.failures() if name == "failures" else self._run.table(name, columns)

    def __repr__(self) -> str:
        manifest = self.table("manifest", ["labels"])
        return f"<diffmine run {self.uri}: {len(manifest):,} images, {len(label_sizes(manifest)):,} labels>"

    def _repr_html_(self) -> str:
        clusters, curation, pages = leading(self["clusters"]), kept(self._run), page_labels(self._run)
        names = {(words.label, words.cluster): words.name for words in curation.clusters} if curation else {}
        rows = [
            f"<tr><th>{html.escape(short(row['label'] or 'All labels', 60))}</th>"
            f"<td>{html.escape(short(names.get((row['label'], row['cluster']), ''), 60))}</td>"
            f"<td>{row['median_typicality']:+.4f}</td><td>{row['size']:,}</td><td>{self._strip(row, pages)}</td></tr>"
            for row in clusters[:_SHOWN_LABELS]
        ]
        more = f"<p>and {len(clusters) - _SHOWN_LABELS} more labels</p>" if len(clusters) > _SHOWN_LABELS else ""
        head = "<tr><th>label</th><th></th><th>median T</th><th>patches</th><th>leading cluster</th></tr>"
        return f"<p>{html.escape(repr(self)[1:-1])}</p><table>{head}{''.join(rows)}</table>{more}"

    def _strip(self, cluster: Mapping[str, Any], pages: Sequence[str | None]) -> str:
        """The first patches of a cluster, as the report has them on one of its pages."""
        name = f"report/images/{pages.index(cluster['label']):04d}/cluster-{cluster['rank']:03d}.webp"
        if not self._run.exists(name):
            return ""
        picture = Image.open(io.BytesIO(self._run.read(name)))
        out = io.BytesIO()
        width = min(picture.width, picture.height * _SHOWN_PATCHES)
        picture.crop((0, 0, width, picture.height)).save(out, "WEBP", quality=80)
        data = base64.b64encode(out.getvalue()).decode()
        return f'<img height="{CELL}" alt="its most typical patches" src="data:image/webp;base64,{data}">'
