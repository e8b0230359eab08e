"""The clusters of another run of the same images -> files of this report, to stand side by side: base and finetuned."""

import json
from collections.abc import Callable, Mapping, Sequence

from diffmine.report.page import Files, script
from diffmine.report.rendering import data_name


def beside_files(labels: Mapping[str | None, int], others: Sequence[str | None], read: Callable[[str], bytes]) -> Files:
    """Data and strips of the other report's pages for labels that this one has too, under this one's numbers.

    Args:
        labels: of this report's pages -> their numbers.
        others: labels of the other report's pages, in their order.
        read: file of the other report -> its bytes.
    """
    for number, label in enumerate(others):
        if label not in labels:
            continue
        text = read(data_name(number)).decode()
        found = json.loads(text[text.index("{", text.index("]")) :].rstrip(";\n"))
        for cluster in found["clusters"]:
            data = read(cluster["strip"])
            cluster["strip"] = f"beside/{labels[label]:04d}-{cluster['rank']:03d}.webp"
            yield cluster["strip"], data
        kept = {key: found[key] for key in ("label", "decimals", "clusters")}
        kept["images"] = {"id": found["images"]["id"]}
        kept["patches"] = {key: found["patches"][key] for key in ("image", "typicality")}
        yield f"beside/{labels[label]:04d}.js", script(f"beside-{labels[label]:04d}", kept)
