"""Tables of a run -> patches with what the other tables say of them."""

import json
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

_OF_EVERY = ("image_id", "uri", "labels", "boxes")  # columns of every manifest
_ARE_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)


def patches_with_images(tables: Mapping[str, pa.Table]) -> pa.Table:
    """The table of patches with the image's uri, cluster, cluster_rank and distance, and the manifest's own columns.

    A patch that is in no cluster has null there.

    Args:
        tables: manifest, patches, clusters, members.
    """
    patches, manifest, members = tables["patches"], tables["manifest"], tables["members"]
    ranks = cluster_ranks(tables["clusters"])
    joint = {label for label, _ in ranks} == {None}
    at = pc.index_in(patches["patch_id"], members["patch_id"])
    cluster, distance = members["cluster"].take(at), members["distance"].take(at)
    labels = [None] * len(patches) if joint else patches["label"].to_pylist()
    rank = [ranks.get(key) for key in zip(labels, cluster.to_pylist(), strict=True)]
    place = pc.index_in(patches["image_id"], manifest["image_id"])
    joined = (
        patches.append_column("uri", manifest["uri"].take(place))
        .append_column("cluster", cluster)
        .append_column("cluster_rank", pa.array(rank, pa.int32()))
        .append_column("distance", distance)
    )
    for name in manifest.column_names:
        if name not in _OF_EVERY:
            joined = joined.append_column(
                name if name not in joined.column_names else f"manifest_{name}", manifest[name].take(place)
            )
    return joined


def cluster_ranks(clusters: pa.Table) -> dict[tuple[str | None, int], int]:
    """Label and cluster -> its rank."""
    return {(row["label"], row["cluster"]): row["rank"] for row in clusters.to_pylist()}


def flat(table: pa.Table) -> pa.Table:
    """Columns of lists, structs and bytes as JSON text, and categories as their values: not every format holds them."""
    for i, field in enumerate(table.schema):
        kind = field.type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
            table = table.set_column(i, field.name, table[field.name].cast(kind))
        if pa.types.is_nested(kind) or any(is_bytes(kind) for is_bytes in _ARE_BYTES):
            texts = [None if v is None else json.dumps(v, default=str) for v in table[field.name].to_pylist()]
            table = table.set_column(i, field.name, pa.array(texts, pa.string()))
    return table
