"""The files of cluster/ against the schemas of the tools that read them, and against each other."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray._private import ray_constants
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME
from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from diffmine.stages.metrics import COUNTERS

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERNETES = "1.36"
PYTHON = "3.11"
Tree = dict[str, Any]


def load(name: str) -> Tree:
    return yaml.safe_load((CLUSTER / name).read_text())


# ---------------------------------------------------------------------------------------------------- Ray's launcher


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_the_launcher_accepts_its_files(name: str) -> None:
    config = load(name)
    validate_config(prepare_config(copy.deepcopy(config)))
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    others = [each for key, each in config["available_node_types"].items() if key != config["head_node_type"]]
    assert all(each["min_workers"] == 0 for each in others), "no GPUs at rest"
    assert [each["resources"]["GPU"] for each in others] == [1] * len(others)
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
@pytest.mark.parametrize(
    "break_it",
    [
        lambda c: c.update(max_worker=4),
        lambda c: c["available_node_types"].pop("head"),
        lambda c: c["available_node_types"]["gpu_on_demand"].update(min_workers="two"),
    ],
)
def test_the_launcher_refuses_mistakes(name: str, break_it: Callable[[Tree], object]) -> None:
    """Negative control."""
    config = load(name)
    break_it(config)
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        validate_config(prepare_config(config))


def test_spot_and_on_demand_are_of_different_types() -> None:
    types = load("aws.yaml")["available_node_types"]
    spot = {name for name, each in types.items() if "InstanceMarketOptions" in each["node_config"]}
    assert spot == {"gpu_spot_l40s", "gpu_spot_a10g"}
    types = load("gcp.yaml")["available_node_types"]
    spot = {n for n, each in types.items() if each["node_config"].get("scheduling", {}).get("provisioningModel")}
    assert spot == {"gpu_spot"}


def asked_for(workers: int, **most: int) -> dict[str, int]:
    """Nodes of each type of aws.yaml that Ray's autoscaler asks for; `most`: other values of max_workers."""
    config = load("aws.yaml")
    types = {
        name: NodeTypeConfig(name, 0, most.get(name, each["max_workers"]), resources=each["resources"])
        for name, each in config["available_node_types"].items()
        if name != config["head_node_type"]
    }
    wanted = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"CPU": 1, "GPU": 1})] * workers)
    request = SchedulingRequest(
        disable_launch_config_check=True, node_type_configs=types, max_num_nodes=config["max_workers"],
        resource_requests=wanted,
    )  # fmt: skip
    reply = ResourceDemandScheduler(AutoscalerEventLogger(None)).schedule(request)
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def test_eight_workers_are_of_both_spot_types() -> None:
    assert asked_for(4) == {"gpu_spot_l40s": 4}
    assert asked_for(8) == {"gpu_spot_l40s": 4, "gpu_spot_a10g": 4}
    assert asked_for(8, gpu_spot_l40s=8) == {"gpu_spot_l40s": 8}, "negative control"
    none = {"gpu_spot_l40s": 0}
    assert asked_for(8, **none) == {"gpu_spot_a10g": 8}
    assert asked_for(8, **none, gpu_spot_a10g=0, gpu_on_demand=8) == {"gpu_on_demand": 8}


@pytest.mark.parametrize(("name", "cloud"), [("aws.yaml", "aws"), ("gcp.yaml", "gcp")])
def test_a_worker_asks_for_its_notice(name: str, cloud: str, tmp_path: Path) -> None:
    """Its last start command, as bash runs it with what Ray's launcher exports, with a `python` and a `ray` that only
    say what they were asked to do, the second after the first."""
    wait = f"while [ ! -s {tmp_path}/python.said ]; do sleep 0.05; done"
    for tool, first in (("python", ""), ("ray", wait)):
        (tmp_path / tool).write_text(f'#!/bin/sh\n{first}\necho "$@" > {tmp_path}/{tool}.said\n')
        (tmp_path / tool).chmod(0o755)
    command = load(name)["worker_start_ray_commands"][-1].replace("/tmp/", f"{tmp_path}/")
    exported = "export RAY_HEAD_IP=10.0.0.1; export RAY_CLOUD_INSTANCE_ID=i-12; export RAY_NODE_TYPE_NAME=gpu; "
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", exported + command], env=environment, check=True, timeout=60)
    watcher, *asked = (tmp_path / "python.said").read_text().split()
    assert asked == [cloud, "--address", "10.0.0.1:6379", "--instance", "i-12"]
    assert (ROOT / Path(watcher).relative_to(workdir())).is_file(), "the image has it"
    assert "cluster" not in (ROOT / ".dockerignore").read_text().split()
    assert (tmp_path / "ray.said").read_text() == "start --address=10.0.0.1:6379\n"
    options = load("aws.yaml")["available_node_types"]["gpu_spot_l40s"]["node_config"]["MetadataOptions"]
    assert options["HttpPutResponseHopLimit"] >= 2, "a container may ask"


def statements(name: str) -> list[Tree]:
    return json.loads((CLUSTER / name).read_text())["Statement"]


def test_the_policies_give_least() -> None:
    for statement in [*statements("aws-policy.json"), *statements("aws-head-policy.json")]:
        assert statement["Effect"] == "Allow"
        assert not [action for action in statement["Action"] if "*" in action]
        looks = all(action.startswith("ec2:Describe") for action in statement["Action"])
        assert looks or statement["Resource"] != "*", "only what reads has no resource of its own"
    writes = [s for s in statements("aws-policy.json") if "s3:PutObject" in s["Action"]]
    assert [s["Resource"] for s in writes] == ["arn:aws:s3:::BUCKET/runs/*"]
    [read] = [s for s in statements("aws-policy.json") if s["Action"] == ["s3:GetObject"]]
    assert "arn:aws:s3:::BUCKET/photos" in read["Resource"], "looked at before it is listed"


def test_only_the_head_may_start_machines() -> None:
    """Ray adds no role to a head that has one of ours; a worker needs the bucket only."""
    config = load("aws.yaml")
    types, head = config["available_node_types"], config["head_node_type"]
    profiles = {n: each["node_config"]["IamInstanceProfile"]["Arn"].partition("/")[2] for n, each in types.items()}
    assert profiles.pop(head) == "diffmine-head"
    assert set(profiles.values()) == {"diffmine-worker"}
    by_sid = {s["Sid"]: s for s in statements("aws-head-policy.json")}
    assert by_sid["GiveWorkersTheirRole"]["Resource"].endswith(":role/diffmine-worker")
    [own] = by_sid["EndWorkers"]["Condition"]["StringEquals"].items()
    assert own == (f"aws:ResourceTag/{TAG_RAY_CLUSTER_NAME}", config["cluster_name"])
    config = load("gcp.yaml")
    types, head = config["available_node_types"], config["head_node_type"]
    accounts = {n: each["node_config"]["serviceAccounts"][0]["email"].partition("@")[0] for n, each in types.items()}
    assert accounts.pop(head) == "diffmine-head"
    assert set(accounts.values()) == {"diffmine-worker"}


# -------------------------------------------------------------------------------------------------------- Kubernetes


def check_kuberay(job: Tree) -> None:
    jsonschema.validate(job, json.loads((Path(__file__).parent / "schemas" / "kuberay.json").read_text()))
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_kuberay_accepts_the_job() -> None:
    job = load("kuberay.yaml")
    check_kuberay(job)
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["minReplicas"] for group in cluster["workerGroupSpecs"]] == [0]
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["working_dir"] == workdir()


def test_a_pod_that_goes_drains_its_node_first() -> None:
    """`ray start --block` does so on SIGTERM, for so many seconds; then Kubernetes kills it."""
    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    [workers] = load("kuberay.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    variables = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    drains = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert drains + 10 <= pod["terminationGracePeriodSeconds"] <= 120


@pytest.mark.parametrize(
    "break_it",
    [
        lambda j: j["spec"].update(shutDownAfterJobFinishes=True),
        lambda j: j["spec"].update(submissionMode="Kubernetes"),
        lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda j: j["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop("maxReplicas"),
        lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(container=[]),
    ],
)
def test_kuberay_refuses_mistakes(break_it: Callable[[Tree], object]) -> None:
    """Negative control."""
    job = load("kuberay.yaml")
    break_it(job)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_kuberay(job)


# -------------------------------------------------------------------------------------------------------- containers


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments); lines that go on are joined, comments left out."""
    text = re.sub(r"(?m)^#.*\n", "", (CLUSTER / "Dockerfile").read_text())
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    return [(line.split()[0], line.partition(" ")[2]) for line in lines]


def target(name: str) -> list[tuple[str, str]]:
    """Its own steps, without those of what it is built on."""
    steps = dockerfile()
    start = next(i for i, (what, of) in enumerate(steps) if what == "FROM" and of.endswith(f" AS {name}"))
    return steps[start : start + 1 + next((i for i, s in enumerate(steps[start + 1 :]) if s[0] == "FROM"), 99)]


def workdir() -> str:
    return next(arguments for instruction, arguments in dockerfile() if instruction == "WORKDIR")


def test_the_image_is_pinned_small_and_not_run_by_root() -> None:
    """Rules that hadolint has, too."""
    steps = dockerfile()
    base, *stages = [arguments for instruction, arguments in steps if instruction == "FROM"]
    assert re.fullmatch(rf"python:{re.escape(PYTHON)}\.\d+-slim-\w+ AS cpu", base), base
    assert stages == ["cpu AS gpu"]
    installs = [(what, of) for what, of in steps if "pip install" in of or (what == "COPY" and of.endswith(". ."))]
    assert "--requirement" in installs[0][1], "the packages, which seldom change, come before the code"
    assert [what for what, _ in installs] == ["RUN", "COPY", "RUN"]
    assert [arguments for instruction, arguments in steps if instruction == "USER"] == ["ray"]
    runs = [arguments for instruction, arguments in steps if instruction == "RUN"]
    [system] = [run for run in runs if "apt-get" in run]
    assert "--no-install-recommends" in system
    assert "rm -rf /var/lib/apt/lists/*" in system
    assert all("--constraint constraints.txt" in run or "--no-deps" in run for run in runs if "pip install" in run)
    assert not [instruction for instruction, _ in steps if instruction == "ADD"]
    assert not [arguments for _, arguments in steps if re.search(r":latest\b|\bsudo\b", arguments)]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)


def test_the_image_holds_what_the_package_needs() -> None:
    command = [sys.executable, str(CLUSTER / "requirements.py"), "s3"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert any(line.startswith("ray[") for line in lines)
    assert any(line.startswith("s3fs") for line in lines)
    assert not any(line.startswith("pytest") for line in lines)
    [asked] = [arguments for _, arguments in dockerfile() if "requirements.py " in arguments and "pip" in arguments]
    assert all(f" {extra} " in asked for extra in ("s3", "gcs", "aws", "gcp"))
    pinned = (ROOT / "constraints.txt").read_text()
    assert f"ray=={ray.__version__}\n" in pinned


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_the_launchers_image_sets_up_workers(name: str) -> None:
    """Ray runs ssh and rsync in the head's container (its `SSHCommandRunner`)."""
    assert target(load(name)["docker"]["image"].partition(":")[2])
    [system] = [arguments for instruction, arguments in dockerfile() if instruction == "RUN" and "apt-get" in arguments]
    assert {"openssh-client", "rsync"} <= set(system.split())


def test_the_gpu_image_asks_for_its_devices() -> None:
    """Ray adds `--runtime=nvidia` alone, with which a container gets those that its environment names."""
    variables = {word for instruction, arguments in target("gpu") if instruction == "ENV" for word in arguments.split()}
    assert {"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"} <= variables
    assert "NVIDIA" not in str(target("cpu"))
    for name in ("aws.yaml", "gcp.yaml"):
        assert load(name)["docker"]["image"].endswith(":gpu")
    head = load("kuberay.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in head["env"], "it has no GPU of its own"


def test_compose_publishes_the_dashboard_on_loopback_only() -> None:
    services = load("compose.yaml")["services"]
    assert services["head"]["ports"] == ["127.0.0.1:8265:8265"]
    assert "--num-cpus=0" in services["head"]["command"]
    for service in services.values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert "ports" not in service or service is services["head"]


def test_the_job_takes_no_data_along() -> None:
    environment = load("runtime_env.yaml")
    assert set(environment) == {"excludes", "env_vars"}
    assert {"/runs/", "/photos/", "/data/"} <= set(environment["excludes"])
    assert {"/runs/", "/photos/", "/data/"} <= set((ROOT / ".gitignore").read_text().split())
    assert {"runs", "photos", "data"} <= set((ROOT / ".dockerignore").read_text().split())
    for folder in environment["excludes"]:
        assert folder.startswith("/"), "of the repository's root only, not of the package's own folders"
    ray.runtime_env.RuntimeEnv(**environment)


# ----------------------------------------------------------------------------------------------------------- metrics


def test_the_dashboard_draws_what_is_counted() -> None:
    """Every number of ours is drawn, and nothing else of that name."""
    drawn = (CLUSTER / "grafana.json").read_text()
    names = set(re.findall(r"ray_(diffmine_\w+)", drawn))
    assert names == {f"{name}_total" for name in COUNTERS}
    panels = json.loads(drawn)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == 6
    assert all(panel["targets"][0]["expr"].count("(") == panel["targets"][0]["expr"].count(")") for panel in panels)
