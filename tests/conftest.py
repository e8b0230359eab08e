"""Settings and fixtures that all tests share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images, named by DIFFMINE_TEST_DATA."""
    folder = Path(os.environ.get("DIFFMINE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "facades").is_dir():
        pytest.skip(f"no real images in {folder}; set DIFFMINE_TEST_DATA to the folder that holds facades/ and ahe64/")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for all tests that do not need their own."""
    import ray

    from diffmine.stages.session import start_embedded

    start_embedded(cpus=3)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the small run of whole.py: its images on S3, its output in a local folder, and no faults."""
    from s3 import serving
    from whole import mine, put_images

    folder = tmp_path_factory.mktemp("whole")
    run = folder / "run"
    with serving() as server:
        put_images(server)
        ended = mine(folder, str(run))
    print(f"no faults: {ended.seconds:.0f} s")
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1] == str(run)
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*") if p.is_file()}
