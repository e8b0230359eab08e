"""The notice that a spot machine gets -> its Ray node is drained, which training answers with a checkpoint.

python cluster/notice.py aws --address $RAY_HEAD_IP:6379 --instance $RAY_CLOUD_INSTANCE_ID

Ray does not ask for notices. This asks the machine's metadata service every two seconds, and ends after the first one.
Ray's launcher sets both variables for the commands that start a worker (`worker_start_ray_commands`).
"""

import argparse
import json
import time
from collections.abc import Callable
from datetime import datetime
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]
from ray.exceptions import RayError

SERVICE = "http://169.254.169.254"  # of both clouds
EVERY_S = 2.0
GCP_NOTICE_S = 30.0  # Google says that a machine goes, not when
_ANSWER_S = 5.0


def aws(service: str) -> float | None:
    """When the machine goes, in seconds since 1970; None if nothing is known of it.

    Raises: OSError if the service does not answer.
    """
    headers = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _answer(Request(f"{service}/latest/api/token", method="PUT", headers=headers))
    action = f"{service}/latest/meta-data/spot/instance-action"
    try:
        notice = json.loads(_answer(Request(action, headers={"X-aws-ec2-metadata-token": token})))
    except HTTPError as error:
        if error.code == 404:
            return None
        raise
    return datetime.fromisoformat(notice["time"]).timestamp()


def gcp(service: str) -> float | None:
    """As `aws`."""
    preempted = Request(f"{service}/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"})
    return time.time() + GCP_NOTICE_S if _answer(preempted) == "TRUE" else None


CLOUDS: dict[str, Callable[[str], float | None]] = {"aws": aws, "gcp": gcp}


def drain(address: str, instance: str, deadline: float) -> bool:
    """Whether the machine's node is there and is drained now.

    address: of the cluster. instance: the machine's name, as its node told the cluster.
    deadline: when it goes, in seconds since 1970.
    Raises: RayError if the cluster does not answer.
    """
    client = GcsClient(address=address)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    for node_id, node in client.get_all_node_info().items():
        if node.instance_id == instance and node.state == GcsNodeInfo.ALIVE:
            accepted, _ = client.drain_node(node_id.hex(), reason, "the machine is taken away", int(1000 * deadline))
            return bool(accepted)
    return False


def watch(cloud: str, service: str, address: str, instance: str) -> None:
    """Returns when the node is drained; what goes wrong is tried again."""
    last = ""
    while True:
        try:
            deadline = CLOUDS[cloud](service)
            if deadline is not None and drain(address, instance, deadline):
                print(f"notice: {instance} goes in {deadline - time.time():.0f} s, its node is drained", flush=True)
                return
        except (OSError, RayError) as error:
            if str(error) != last:
                last = str(error)
                print(f"notice: {last}", flush=True)
        time.sleep(EVERY_S)


def _answer(request: Request) -> str:
    with build_opener(ProxyHandler({})).open(request, timeout=_ANSWER_S) as answer:
        return answer.read().decode().strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cloud", choices=CLOUDS)
    parser.add_argument("--address", required=True, help="the cluster's")
    parser.add_argument("--instance", required=True, help="the machine's name, as its node told the cluster")
    parser.add_argument("--service", default=SERVICE, help="the metadata service's address")
    watch(**vars(parser.parse_args()))
