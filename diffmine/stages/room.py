"""What a process takes of a node, and whether the cluster has it, may get it, or never will.

A cluster that grows tells no job how far: nobody but its autoscaler knows the node types. What the autoscaler does tell
is for which of the requests that wait it starts no node: no node type holds them, or the cluster has its largest size.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
from ray.exceptions import RpcError

from diffmine.config import Config
from diffmine.diffusion.model import weight_files
from diffmine.errors import InputError, StageError
from diffmine.run import fetch_model

_PROCESS_BYTES = 1 << 30  # libraries, and the shards in work
# Copies of the weights in the memory of a training worker: beside them gradients, two moments and their average; and
# on the host what a checkpoint is written from (all but the gradients), and the best weights so far.
_ON_THE_HOST = 5
_TRAINED_COPIES = 5 + _ON_THE_HOST
_LEAST_IMAGES = 4  # of a batch, for a process that trains on a core; each costs memory. Tried on two cores only
_GCS_TIMEOUT_S, _GCS_TRIES = 10, 6  # the head may be busy


@dataclass(frozen=True)
class Room:
    """What a process takes of a node."""

    cpus: float
    gpus: float = 0.0
    memory: int = 0  # bytes of the host's

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU"]
        parts += [f"{self.gpus:g} GPU"] if self.gpus else []
        parts += [f"{_gib(self.memory)} of memory"] if self.memory else []
        return f"{', '.join(parts[:-1])} and {parts[-1]}" if parts[1:] else parts[0]

    def fits(self, node: Mapping[str, float]) -> int:
        """How many a node of these resources holds."""
        wanted = ((self.cpus, "CPU"), (self.gpus, "GPU"), (self.memory, "memory"))
        return math.floor(min((node.get(name, 0) / need for need, name in wanted if need), default=0))


def model_room(config: Config) -> Room:
    """Of a process that holds the model and works on shards."""
    memory = _memory(config, 1)
    return Room(1, 1, memory) if on_gpus(config) else Room(1, 0, memory)


def training_workers(config: Config) -> int:
    """How many train, at most one per image of a step. With auto one per GPU that is there or, on a cluster that grows,
    that `compute.workers` asks for; without GPUs one per core if all is one machine, else one.

    Processes of a core each share their gradients once a step. The threads of one process wait for each other in every
    operation, so that one core that something else uses stops them all. Measured on two cores: threads are a twentieth
    faster than processes where nothing else runs, and three to four times slower beside a busy process.
    """
    if config.finetune.workers != "auto":
        return config.finetune.workers
    if not on_gpus(config):
        return _training_cores(config) if len(_nodes()) == 1 and not grows() else 1
    asked = config.compute.workers if config.compute.workers != "auto" and grows() else 1
    return min(max(gpus(), asked), config.finetune.batch_size)


def training_room(config: Config, workers: int) -> Room:
    """Of each of so many training workers. Without a GPU they share the largest node, but for one CPU."""
    if on_gpus(config):
        return Room(1, 1, _memory(config, 1 + _ON_THE_HOST))
    return Room(max(1, _cores() // workers), 0, _memory(config, _TRAINED_COPIES))


def _training_cores(config: Config) -> int:
    """Processes of a core each: as many as the machine has room for, and a batch images."""
    most = min(_cores(), config.finetune.batch_size // _LEAST_IMAGES)
    return max(1, min(most, fitting(training_room(config, max(1, most)))))


def _cores() -> int:
    """Of the largest node, but for one CPU."""
    return int(max(node.get("CPU", 0) for node in _nodes()) - 1)


def gpus() -> int:
    """GPUs that the cluster has now."""
    return int(ray.cluster_resources().get("GPU", 0))


def on_gpus(config: Config) -> bool:
    """Whether models run on GPUs."""
    return config.compute.device == "gpu" or (config.compute.device == "auto" and gpus() > 0)


def embedded() -> bool:
    """Whether Ray is one of diffmine's own, as no cluster is named that would be joined."""
    return not os.environ.get("RAY_ADDRESS")


def grows() -> bool:
    """Whether an autoscaler looks after the cluster, so that what is missing may come."""
    return _status().autoscaling_state.autoscaler_state_version > 0


def actors(config: Config, each: Room, shards: int, beside: float) -> tuple[int, int]:
    """How many actors a model pool starts with, and how many it has at most.

    At most `compute.workers`; with auto one per GPU, without GPUs one per CPU but for one that reads, and on a cluster
    that grows as many as it gives. It starts with what fits now and leaves the CPUs `beside` for what feeds it; on a
    cluster that grows with all the GPU actors that are wished for, so that their nodes are asked for at once.
    """
    wanted, growing = config.compute.workers, grows()
    there = gpus() if each.gpus else int(ray.cluster_resources().get("CPU", 0)) - 1
    most = wanted if wanted != "auto" else shards if growing else there
    most = min(max(1, most), shards)
    if growing and each.gpus and wanted != "auto":
        return most, most
    spare = ray.cluster_resources().get("CPU", 0) - beside
    return max(1, min(most, fitting(each), int(spare / each.cpus))), most


def fitting(each: Room) -> int:
    """Processes that the nodes there are now can hold."""
    return sum(each.fits(node) for node in _nodes())


def require(stage: str, each: Room, count: int = 1, beside: float = 0.0) -> None:
    """Refuse to start what could never run: `count` processes of `each`, and `beside` CPUs for what feeds them.

    On a cluster that grows nothing is refused here: `never` says later what its autoscaler cannot give.

    Raises:
        StageError: with what is needed and what there is.
    """
    total = sum(node.get("CPU", 0) for node in _nodes())
    if (fitting(each) < count or total < count * each.cpus + beside) and not grows():
        extra = f", and {beside:g} CPU to read beside" if beside else ""
        needed = f"{count} x {each}" if count > 1 else f"a process with {each} on one node"
        own = " (where diffmine starts Ray, one CPU more than there are cores)" if embedded() else ""
        raise StageError(f"{stage}: needs {needed}{extra}; the cluster has {resources(ray.cluster_resources())}{own}")


def require_training(config: Config) -> None:
    """Refuse a training that could never run, before the stages that come first.

    Raises:
        InputError: with what is needed and what there is.
    """
    workers = training_workers(config)
    try:
        require("finetune", training_room(config, workers), workers)
    except StageError as error:
        fewer = "; use fewer finetune.workers, or a larger cluster" if workers > 1 else ""
        raise InputError(f"{error}{fewer}") from error


def require_device(config: Config) -> None:
    """
    Raises:
        InputError: the config wants GPUs, and the cluster has none and does not grow.
    """
    if config.compute.device == "gpu" and not gpus() and not grows():
        raise InputError(
            f"compute.device is gpu; the cluster has {resources(ray.cluster_resources())}, and no autoscaler that "
            "could add any; use a cluster with GPUs, or --compute.device cpu"
        )


def require_own_device(config: Config) -> None:
    """As `require_device`, before Ray is there: one that diffmine starts has what this machine has.

    Raises:
        InputError: the config wants GPUs, no cluster is to be joined, and this machine has none.
    """
    if config.compute.device != "gpu" or ray.is_initialized() or not embedded():
        return
    import torch  # takes seconds

    if not torch.cuda.is_available():
        raise InputError(
            "compute.device is gpu, and PyTorch finds no GPU on this machine; use --compute.device auto, or set "
            "RAY_ADDRESS to a cluster with GPUs"
        )


def never(each: Room) -> bool:
    """Whether no node type can hold a process that waits for so much.

    So it seems when the autoscaler starts no node for it, although none that is there holds it: a cluster of its
    largest size has one, busy or not. One that was asked for, or refused by the cloud, may be it.
    """
    state = _status().autoscaling_state
    if state.pending_instance_requests or state.pending_instances or state.failed_instance_requests or fitting(each):
        return False
    waiting = [*state.infeasible_resource_requests]
    waiting += [request for gang in state.infeasible_gang_resource_requests for request in gang.requests]
    wanted = {"CPU": each.cpus, "GPU": each.gpus, "memory": each.memory}
    wanted = {name: need for name, need in wanted.items() if need}  # others on the cluster may want more kinds
    return any({k: v for k, v in dict(request.resources_bundle).items() if v} == wanted for request in waiting)


def nodes_asked_for() -> str:
    """The nodes that the autoscaler has asked for and that are not there yet, and why one was refused; or nothing."""
    state = _status().autoscaling_state
    asked = Counter[str]()
    for request in state.pending_instance_requests:
        asked[request.ray_node_type_name] += request.count
    asked.update(instance.ray_node_type_name for instance in state.pending_instances)
    if not asked:
        return ""
    refused = max(state.failed_instance_requests, key=lambda request: request.failed_ts, default=None)
    nodes = ", ".join(f"{count} x {kind}" for kind, count in sorted(asked.items()))
    return f"{nodes} asked for" + (f" (the last one refused: {refused.reason})" if refused else "")


def resources(of: Mapping[str, Any]) -> str:
    """{"CPU": 4.0, "memory": 2147483648.0, ...} -> '4 CPUs, 0 GPUs, 2.0 GiB of memory'"""
    return f"{of.get('CPU', 0):g} CPUs, {of.get('GPU', 0):g} GPUs, {_gib(of.get('memory', 0))} of memory"


def cluster_status(address: str) -> Any:
    """Nodes and the autoscaler's state, of a cluster that this process need not have joined; "host:port"."""
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(address=address).get_cluster_status(timeout_s=_GCS_TIMEOUT_S))
    return reply


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _status() -> Any:
    address = ray.get_runtime_context().gcs_address
    for _ in range(_GCS_TRIES - 1):
        with suppress(RpcError):
            return cluster_status(address)
    return cluster_status(address)


def _memory(config: Config, copies: int) -> int:
    """Bytes for a process with copies of the model's weights; 0 on a cluster that grows.

    Node types seldom declare their memory, and none that does not is ever started for a process that asks for some.
    """
    if grows():
        return 0
    base = fetch_model(config.model.base)
    weights = sum(file.stat().st_size for part in ("unet", "vae", "text_encoder") for file in weight_files(base, part))
    return _PROCESS_BYTES + copies * weights


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
