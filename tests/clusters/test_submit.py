"""`ray job submit` for real: a head with its job server on loopback and a token, a worker node, results on S3."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from local import RAY, LocalCluster, free_port
from s3 import BUCKET, CANARY, S3, serving
from whole import CONFIG, ROOT, differing, names, put_images, stored, tables

from diffmine.stages.metrics import COUNTERS

pytestmark = pytest.mark.release
LONGEST_S = 300
TOKEN = "0123456789abcdef" * 2


@dataclass
class Jobs:
    """The job server, as the `ray job` command reaches it."""

    cluster: LocalCluster
    server: str
    token: Path
    config: Path

    def ray(self, *arguments: str, token: str = TOKEN) -> "subprocess.CompletedProcess[str]":
        self.token.write_text(token)
        command = [str(RAY), "job", arguments[0], "--address", self.server, *arguments[1:]]
        return subprocess.run(
            command, env=self.cluster.environment, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST_S
        )

    def submit(self, *entry: str, token: str = TOKEN, wait: bool = True) -> "subprocess.CompletedProcess[str]":
        """The command of README.md."""
        options = ["--runtime-env", "cluster/runtime_env.yaml", "--working-dir", ".", *([] if wait else ["--no-wait"])]
        return self.ray("submit", *options, "--", "python", "jobs/mine.py", *entry, token=token)


@pytest.fixture(scope="module")
def s3(whole_run: dict[str, bytes]) -> Iterator[S3]:
    """Empties its bucket first: the run that others are compared with has ended."""
    with serving(seed=5) as server:
        put_images(server)
        yield server


@pytest.fixture(scope="module")
def jobs(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """A head that does no work, and a node that does."""
    place, port = tmp_path_factory.mktemp("jobs"), free_port()
    (place / "cluster-token").write_text(TOKEN)
    (place / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    environment = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(place / "cluster-token"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    with (
        tempfile.TemporaryDirectory(prefix="dm", ignore_cleanup_errors=True) as folder,
        LocalCluster(Path(folder), dashboard=port, environment=environment) as cluster,
    ):
        cluster.add_node(3)  # as many as an embedded Ray has on two cores: training sums in the same order
        cluster.environment["RAY_AUTH_TOKEN_PATH"] = str(place / "token")  # of whoever submits
        yield Jobs(cluster, f"http://127.0.0.1:{port}", place / "token", place / "config.yaml")


def test_a_job_is_mined_and_a_second_one_continues(jobs: Jobs, s3: S3, whole_run: dict[str, bytes]) -> None:
    output = f"s3://{BUCKET}/job"
    first = jobs.submit(str(jobs.config), "--output", output, wait=False)
    assert first.returncode == 0, first.stderr
    job = next(word.strip("'") for word in first.stdout.split() if word.startswith("'raysubmit_"))
    start = time.monotonic()
    while "typicality/part-00000.parquet" not in names(s3, "job"):  # in the middle of the run
        assert time.monotonic() - start < LONGEST_S, jobs.ray("logs", job).stdout[-3000:]
        time.sleep(0.3)
    assert jobs.ray("stop", job).returncode == 0
    before = stored(s3, "job")
    second = jobs.submit(str(jobs.config), "--output", output)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-2000:]
    print(second.stdout)
    assert "finetune: " not in second.stdout, "it was done"
    assert "report: done" in second.stdout
    assert output in second.stdout.splitlines()
    assert CANARY not in first.stdout + second.stdout + second.stderr
    files = stored(s3, "job")
    assert [name for name in tables(before) if files[name] != before[name]] == []
    assert differing(tables(files), tables(whole_run)) == []


def test_prometheus_can_read_what_jobs_counted(jobs: Jobs) -> None:
    """Where Ray says that Prometheus finds its nodes; what counts is sent every ten seconds."""
    [group] = json.loads((jobs.cluster.folder / "0" / "prom_metrics_service_discovery.json").read_text())
    named = COUNTERS.keys() - {"diffmine_failures"}  # there were none
    wanted = {rf"^ray_{name}_total{{" for name in named}
    # A job that is stopped loses its last ten seconds of counts: typicality's, which may be all that there were.
    wanted |= {r'^ray_diffmine_images_total{.*stage="latents".*} 8\.0$'}
    wanted |= {r'^ray_diffmine_patches_total{.*stage="features".*} 8\.0$'}
    seen, start = "", time.monotonic()
    while missing := {line for line in wanted if not re.search(line, seen, re.MULTILINE)}:
        assert time.monotonic() - start < 60, missing
        for target in group["targets"]:
            with suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as answer:
                seen += answer.read().decode()
        time.sleep(1)


def test_who_has_no_token_is_refused(jobs: Jobs) -> None:
    wrong = jobs.submit(str(jobs.config), token="f" * 32)
    assert wrong.returncode != 0
    assert "401" in wrong.stdout + wrong.stderr or "nvalid" in wrong.stdout + wrong.stderr


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (["--output", "s3://no-such-bucket/run"], "diffmine: output: s3://no-such-bucket/run"),
        (
            ["--compute.device", "gpu", "--output", f"s3://{BUCKET}/gpu"],
            "compute.device is gpu; the cluster has 3 CPUs",
        ),
    ],
)
def test_bad_input_ends_a_job_with_a_sentence(jobs: Jobs, entry: list[str], said: str) -> None:
    ended = jobs.submit(str(jobs.config), *entry)
    assert ended.returncode == 1  # Ray's own: a job that failed
    assert said in ended.stdout, ended.stdout[-2000:]
    assert "Traceback" not in ended.stdout
    assert "exit code 2" in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RAY_ADDRESS": "127.0.0.1:9"}, "no Ray cluster answers at 127.0.0.1:9"),
        ({"RAY_AUTH_MODE": "disabled"}, "would be joined without a token"),
        ({"RAY_AUTH_TOKEN": "f" * 32}, "does not take the token"),
    ],
)
def test_a_cluster_that_cannot_be_joined(jobs: Jobs, environment: dict[str, str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, "jobs/mine.py", str(jobs.config), "--output", str(tmp_path / "run")]
    variables = {**jobs.cluster.environment, "RAY_ADDRESS": jobs.cluster.address, **environment}
    jobs.token.write_text(TOKEN)
    start = time.monotonic()
    ended = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST_S)
    assert said in ended.stderr, ended.stderr[-2000:]
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - start < 60
    assert json.dumps(TOKEN) not in ended.stderr
