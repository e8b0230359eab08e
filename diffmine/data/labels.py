"""What a manifest says of its labels."""

import pyarrow as pa
import pyarrow.compute as pc


def label_sizes(manifest: pa.Table) -> dict[str, int]:
    """label -> its images in a manifest, sorted by label."""
    counts = pc.value_counts(pc.list_flatten(manifest["labels"].combine_chunks()))
    return dict(sorted((c["values"], c["counts"]) for c in counts.to_pylist()))
