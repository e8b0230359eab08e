"""Numbers of a running job for Prometheus, by way of Ray's metrics; cluster/grafana.json draws them.

Every process of a stage may count; Ray's agents on the nodes gather what they count, and Prometheus adds it up.
"""

from functools import cache

from ray.util.metrics import Counter, Gauge

COUNTERS = {  # Prometheus adds "_total" to these names
    "diffmine_images": "images that a stage has worked on, failed ones included",
    "diffmine_failures": "images that a stage could not use",
    "diffmine_unet_passes": "UNet samples that scoring has evaluated",
    "diffmine_actor_seconds": "seconds that actors spent on shards; their rate is the number of busy actors",
}
STAGE_SECONDS = "diffmine_stage_seconds"


def count(name: str, stage: str, value: float) -> None:
    """Add to one of `COUNTERS`."""
    if value > 0:
        _counter(name).inc(value, {"stage": stage})


def stage_took(stage: str, seconds: float) -> None:
    """A stage has ended."""
    _stage_seconds().set(seconds, {"stage": stage})


@cache
def _counter(name: str) -> Counter:
    return Counter(name, COUNTERS[name], ("stage",))


@cache
def _stage_seconds() -> Gauge:
    return Gauge(STAGE_SECONDS, "seconds that a finished stage took", ("stage",))
