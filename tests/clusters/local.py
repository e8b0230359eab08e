"""A Ray cluster of many nodes on this machine: a head without CPUs for work, nodes that are added and killed.

Nodes that the autoscaler adds are Ray's own fake ones: real raylets on this machine, started by the real autoscaler
(version 2) when something waits for their resources, and stopped when they are idle.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from processes import end, family, kill
from ray._private.services import get_node_ip_address

from diffmine.stages.room import cluster_status

RAY = Path(sys.executable).with_name("ray")
NOTICE = Path(__file__).parents[2] / "cluster" / "notice.py"
STARTED_S = 60  # that a node may take to come up
_STORE_BYTES = 100 << 20  # of each node
_HEAD_ID = "f" * 51 + "00000"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LocalCluster:
    """Use as a context; every process is ended with it."""

    def __init__(
        self,
        folder: Path,  # short: Ray puts sockets into it
        grows: dict[str, tuple[dict[str, float], int]] | None = None,  # node type -> its resources, nodes at most
        idle_s: float = 6.0,
        dashboard: int | None = None,  # port of the job server, on loopback
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"{get_node_ip_address()}:{self.port}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("OMP_")},
            "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **(environment or {}),
        }  # fmt: skip
        self._nodes: list[subprocess.Popen] = []
        self._number: dict[subprocess.Popen, int] = {}  # names a node's folder and machine
        arguments = ["--head", f"--port={self.port}", "--num-cpus=0", f"--ray-client-server-port={free_port()}"]
        arguments += [f"--include-dashboard={'true' if dashboard else 'false'}"]
        if dashboard:
            arguments += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        if grows is not None:
            config = folder / "autoscaling.json"
            config.write_text(json.dumps(self._autoscaling(grows, idle_s)))
            arguments += [f"--autoscaling-config={config}"]
            self.environment |= {
                "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_CLOUD_INSTANCE_ID": _HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
                "RAY_NODE_TYPE_NAME": "ray.head.default",
            }  # fmt: skip
        self._head = arguments

    def __enter__(self) -> "LocalCluster":
        try:
            self._start(self._head)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self._nodes):
            with suppress(psutil.NoSuchProcess):
                psutil.Process(node.pid).send_signal(signal.SIGTERM)
        for node in reversed(self._nodes):
            end(node)

    def add_node(self, cpus: int) -> subprocess.Popen:
        """A node; `kill_node` ends it as a preempted machine ends."""
        return self._start([f"--address={self.address}", f"--num-cpus={cpus}"])

    def kill_node(self, node: subprocess.Popen) -> None:
        """All its processes at once."""
        for pid in family(node):
            kill(pid)
        end(node)
        self._nodes.remove(node)

    @contextmanager
    def watched(self, node: subprocess.Popen, cloud: str, service: str) -> Iterator[Path]:
        """cluster/notice.py beside a node, as the launcher's files start it; what it says is in the file.

        service: of the machine's metadata.
        """
        command = [sys.executable, str(NOTICE), cloud, "--service", service, "--address", self.address]
        command += ["--instance", f"machine-{self._number[node]}"]
        said = self.folder / "notice.log"
        with said.open("wb") as log:
            watcher = subprocess.Popen(
                command, cwd=self.folder, env=self.environment,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            yield said
        finally:
            end(watcher)

    def alive(self) -> list[str]:
        """Types of the nodes that are there, the head's first."""
        dead = 2
        states = [n for n in cluster_status(self.address).cluster_resource_state.node_states if n.status != dead]
        return sorted((n.ray_node_type_name for n in states), reverse=True)

    def _start(self, arguments: list[str]) -> subprocess.Popen:
        number = len(list(self.folder.glob("node-*")))  # a folder each, as machines have: they unpack the job's code
        command = [
            str(RAY),
            "start",
            "--block",
            f"--object-store-memory={_STORE_BYTES}",
            f"--temp-dir={self.folder}/{number}",
        ]
        command += ["--dashboard-agent-listen-port=0", "--disable-usage-stats", *arguments]
        said = self.folder / f"node-{number}.log"
        with said.open("wb") as log:
            node = subprocess.Popen(
                command, cwd=self.folder, env={"RAY_CLOUD_INSTANCE_ID": f"machine-{number}", **self.environment},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._nodes.append(node)
        self._number[node] = number
        start = time.monotonic()
        while "Ray runtime started" not in said.read_text():
            assert node.poll() is None, said.read_text()[-2000:]
            assert time.monotonic() - start < STARTED_S, said.read_text()[-2000:]
            time.sleep(0.1)
        return node

    def _autoscaling(self, grows: dict[str, tuple[dict[str, float], int]], idle_s: float) -> dict[str, Any]:
        types = {
            name: {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": most}
            for name, (resources, most) in grows.items()
        }
        types["ray.head.default"] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        provider = {
            "type": "external", "head_node_id": _HEAD_ID, "launch_multiple": True, "gcs_address": self.address,
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "disable_node_updaters": True,
        }  # fmt: skip
        empty_lists = (
            "cluster_synced_files initialization_commands setup_commands head_setup_commands worker_setup_commands "
            "head_start_ray_commands worker_start_ray_commands rsync_exclude rsync_filter"
        )
        return {
            "cluster_name": "local", "max_workers": 8, "upscaling_speed": 1.0, "idle_timeout_minutes": idle_s / 60,
            "provider": provider, "auth": {}, "docker": {}, "head_node_type": "ray.head.default",
            "available_node_types": types, "head_node": {}, "worker_nodes": {}, "file_mounts": {},
            "file_mounts_sync_continuously": False, **{name: [] for name in empty_lists.split()},
        }  # fmt: skip
