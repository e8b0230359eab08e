"""Numbers of a running job for Prometheus, by way of Ray's metrics; cluster/grafana.json draws them.

Every process of a stage may count; Ray's agents on the nodes gather what they count, and Prometheus adds it up.
"""

from functools import cache

from ray.util.metrics import Counter

COUNTERS = {  # Prometheus puts "ray_" before these names and "_total" behind
    "diffmine_images": "images that a stage has worked on, failed ones included",
    "diffmine_patches": "patches that features were taken of",
    "diffmine_failures": "images that a stage could not use",
    "diffmine_unet_passes": "UNet samples that scoring has evaluated",
    "diffmine_actor_seconds": "seconds that actors spent on shards; their rate is the number of busy actors",
    "diffmine_stage_seconds": "seconds that stages took, counted at their end",
}


def count(name: str, stage: str, value: float) -> None:
    """Add to one of `COUNTERS`."""
    if value > 0:
        _counter(name).inc(value, {"stage": stage})


@cache
def _counter(name: str) -> Counter:
    return Counter(name, COUNTERS[name], ("stage",))
