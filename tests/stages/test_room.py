"""What a process takes, and what nodes hold of it."""

from functools import partial
from pathlib import Path
from socket import gethostname
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.exceptions import RpcError

from diffmine.diffusion.parallel import accelerator
from diffmine.errors import InputError, StageError
from diffmine.run import MARKER, TINY
from diffmine.stages import room, session, shards
from diffmine.stages.latents import _Encoder
from diffmine.stages.room import Room, actors, fitting, model_room, require_device, require_training, training_room

NODE = {"CPU": 8.0, "GPU": 2.0, "memory": 10 * 2.0**30}


def config(device: str = "auto", workers: int | str = "auto", training: int | str = "auto", batch: int = 64) -> Any:
    return SimpleNamespace(
        compute=SimpleNamespace(device=device, workers=workers), model=SimpleNamespace(base="tiny"),
        finetune=SimpleNamespace(workers=training, batch_size=batch),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("each", "times", "text"),
    [
        (Room(1), 8, "1 CPU"),
        (Room(0.5, 1), 2, "0.5 CPU and 1 GPU"),
        (Room(1, 0, 3 << 30), 3, "1 CPU and 3.0 GiB of memory"),
        (Room(1, 1, 11 << 30), 0, "1 CPU, 1 GPU and 11.0 GiB of memory"),
        (Room(3), 2, "3 CPU"),
        (Room(0), 0, "0 CPU"),
    ],
)
def test_a_node_holds_as_many_as_its_scarcest_resource_allows(each: Room, times: int, text: str) -> None:
    assert each.fits(NODE) == times
    assert Room(1, 1).fits({"CPU": 8.0}) == 0
    assert str(each) == text


@pytest.mark.parametrize(
    ("asked", "there", "grows", "workers"),
    [
        (config(training=3), 8, False, 3),
        (config(), 8, False, 8),
        (config("cpu"), 8, False, 7),  # one per core of the machine, which has 8 CPUs, but for one that reads
        (config(batch=16), 0, False, 4),  # which share a batch by four images
        (config(batch=3), 0, False, 1),
        (config(), 0, True, 1),
        (config("gpu", workers=8), 0, True, 8),
        (config("gpu", workers=8), 2, False, 2),  # a cluster that does not grow has what it has
        (config("gpu"), 0, True, 1),
        (config("gpu", batch=4), 8, False, 4),
    ],
)
def test_training_workers(asked: Any, there: int, grows: bool, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "gpus", lambda: there)
    monkeypatch.setattr(room, "grows", lambda: grows)
    monkeypatch.setattr(room, "_nodes", lambda: [NODE])
    assert room.training_workers(asked) == workers


def test_training_on_cores_keeps_to_the_memory_and_to_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "gpus", lambda: 0)
    monkeypatch.setattr(room, "grows", lambda: False)
    one = room._memory(config(), 10)
    for nodes, workers in (([NODE | {"memory": 2.9 * one}], 2), ([NODE | {"memory": 0.5 * one}], 1), ([NODE, NODE], 1)):
        monkeypatch.setattr(room, "_nodes", lambda nodes=nodes: nodes)
        assert room.training_workers(config()) == workers


@pytest.mark.usefixtures("ray_session")  # 4 CPUs, no GPU, nothing that grows
def test_a_cluster_that_does_not_grow() -> None:
    weights = sum(file.stat().st_size for file in TINY.rglob("*.safetensors"))
    assert model_room(config()) == Room(1, 0, (1 << 30) + weights)
    assert model_room(config("gpu")) == Room(1, 1, (1 << 30) + weights)
    assert training_room(config(), 1).cpus == 3
    assert training_room(config(), 2).cpus == 1
    assert fitting(Room(1)) == 4
    assert [actors(config(workers=w), Room(1), 9, 0.5) for w in ("auto", 2, 30)] == [(3, 3), (2, 2), (3, 9)]
    assert actors(config(), Room(1), 2, 0.5) == (2, 2)
    require_device(config("cpu"))
    with pytest.raises(
        InputError, match=r"compute\.device is gpu; the cluster has 4 CPUs, 0 GPUs, .* and no autoscaler"
    ):
        require_device(config("gpu"))


@pytest.mark.usefixtures("ray_session")
def test_more_training_workers_than_there_is_room_for_are_bad_input() -> None:
    for workers in ("auto", 1, 4):
        require_training(config(training=workers))
    with pytest.raises(InputError, match=r"^finetune: needs 5 x 1 CPU .*; the cluster has 4 CPUs.* use fewer finetune"):
        require_training(config(training=5))


def begun_in(folder: Path) -> str:
    """URI of a run with a manifest."""
    (folder / "manifest").mkdir()
    (folder / "manifest" / MARKER).touch()
    return str(folder)


@pytest.mark.parametrize("given", [False, True])
def test_a_gpu_is_for_who_was_given_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: bool) -> None:
    """With compute.device cpu on a machine that has GPUs, which Ray shows to all its processes."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    told: list[str] = []
    shards._Actor(begun_in(tmp_path), "latents", lambda device: told.append(device), given)
    assert told == ["cuda" if given else "cpu"]
    if not given:
        assert accelerator(on_gpu=given).device.type == "cpu"


@pytest.mark.parametrize(("allowed", "quota", "cores"), [(2, 64, 2), (64, 2, 2), (3, 0, 1)])
def test_only_cores_that_may_be_used_count(
    monkeypatch: pytest.MonkeyPatch, allowed: int, quota: int, cores: int
) -> None:
    """By taskset or a batch system, and by a container's quota; half a core is one."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(allowed)))
    monkeypatch.setattr(session, "get_num_cpus", lambda **_: quota)
    assert session._cores() == cores


def test_nodes_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    status = GetClusterStatusReply()
    monkeypatch.setattr(room, "_status", lambda: status)
    state = status.autoscaling_state
    assert room.nodes_asked_for() == ""
    state.failed_instance_requests.add(ray_node_type_name="gpu_spot", reason="no quota", failed_ts=1)
    state.failed_instance_requests.add(ray_node_type_name="gpu_spot", reason="no capacity", failed_ts=2)
    assert room.nodes_asked_for() == "", "it has given up"
    state.pending_instance_requests.add(ray_node_type_name="gpu_spot", count=2)
    state.pending_instances.add(ray_node_type_name="gpu_on_demand")
    assert room.nodes_asked_for() == "1 x gpu_on_demand, 2 x gpu_spot asked for (the last one refused: no capacity)"


@pytest.mark.parametrize(
    ("waiting", "nodes", "coming", "hopeless"),
    [
        ({"CPU": 1, "GPU": 1}, [{"CPU": 8.0}], "", True),
        ({"CPU": 1, "GPU": 1}, [{"CPU": 8.0}, NODE], "", False),  # a node of its largest size, whoever works there
        ({"CPU": 1, "GPU": 1}, [{"CPU": 8.0}], "pending_instance_requests", False),  # more wait than may come
        ({"CPU": 1, "GPU": 1}, [{"CPU": 8.0}], "pending_instances", False),
        ({"CPU": 1, "GPU": 1}, [{"CPU": 8.0}], "failed_instance_requests", False),  # it is tried again
        ({"CPU": 1, "GPU": 1, "accelerator_type:H100": 0.001}, [{"CPU": 8.0}], "", False),  # somebody else's
        ({"CPU": 2, "GPU": 1}, [{"CPU": 8.0}], "", False),
    ],
)
def test_what_never_comes(
    monkeypatch: pytest.MonkeyPatch, waiting: dict[str, float], nodes: Any, coming: str, hopeless: bool
) -> None:
    """The autoscaler lists what no node type holds, and in the same list what its largest size has no room for."""
    status = GetClusterStatusReply()
    status.autoscaling_state.infeasible_resource_requests.add(resources_bundle=waiting)
    if coming:
        getattr(status.autoscaling_state, coming).add(ray_node_type_name="gpu")
    monkeypatch.setattr(room, "_status", lambda: status)
    monkeypatch.setattr(room, "_nodes", lambda: nodes)
    assert room.never(Room(1, 1)) == hopeless


@pytest.mark.usefixtures("ray_session")
def test_a_head_that_is_busy_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [RpcError("Deadline Exceeded"), RpcError("Deadline Exceeded"), GetClusterStatusReply()]

    def answer(address: str) -> Any:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(room, "cluster_status", answer)
    assert not room.grows()
    assert not answers


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_actor_that_was_given_a_gpu_never_computes_on_a_core(tmp_path: Path) -> None:
    """Its node's driver may be broken: what then cannot start says where."""
    with pytest.raises(StageError, match=rf"latents: cannot start on {gethostname()} \(.*(CUDA|NVIDIA)"):
        shards._Actor(begun_in(tmp_path), "latents", partial(_Encoder, str(TINY), "float32", False), on_gpu=True)
