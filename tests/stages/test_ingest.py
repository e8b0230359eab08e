"""Latents stream from their shards: the images of a step are the same wherever training begins."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from diffmine.run import Run, rows_to_table
from diffmine.stages.ingest import Ingest

IMAGES = {f"{i // 7}/{i:03d}.png": (8, 4 + 4 * (i % 3 == 0)) for i in range(40)}


def latent(image_id: str) -> np.ndarray:
    h, w = IMAGES[image_id]
    return np.random.default_rng(list(image_id.encode())).normal(size=(4, h, w)).astype(np.float16)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run, ids = Run(str(tmp_path / "run")), sorted(IMAGES)
    rows = [{"image_id": i, "uri": i, "labels": [i[0], "all"], "boxes": None} for i in [*ids, "9/failed.png"]]
    run.write_part("manifest", 0, rows_to_table("manifest", rows))
    for part in range(0, 40, 6):
        shard = [
            {"image_id": i, "width": 0, "height": 0, "h": IMAGES[i][0], "w": IMAGES[i][1], "latent": latent(i).ravel(),
             "scale": 1.0, "crop_x": 0, "crop_y": 0}
            for i in ids[part : part + 6]
        ]  # fmt: skip
        run.write_part("latents", part // 6, rows_to_table("latents", shard))
    return run


@pytest.mark.parametrize("window", [100, 10])
def test_a_step_sees_the_same_images_wherever_training_begins(run: Run, window: int) -> None:
    def names(start: int, count: int) -> list[list[str]]:
        batches = Ingest(run, 0, 4, None, window).batches(start)
        return [[image.image_id for image in batch] for batch in islice(batches, count)]

    whole = names(0, 40)
    assert len({name for batch in whole[:16] for name in batch}) == 40
    for start in (1, 9, 10, 11, 25):
        assert names(start, 40 - start) == whole[start:]


@pytest.mark.parametrize("window", [100, 10])
def test_images_are_whole_and_have_their_labels(run: Run, window: int) -> None:
    ingest = Ingest(run, 0, 4, None, window)
    for batch in islice(ingest.batches(0), 20):
        for image in batch:
            assert np.array_equal(image.latent, latent(image.image_id))
            assert image.labels == [image.image_id[0], "all"]
    assert ingest.images == 40
    assert ingest.label_counts() == {"0": 7, "1": 7, "2": 7, "3": 7, "4": 7, "5": 5, "all": 40}
    assert ingest.common_shape() == (8, 4)


def test_crops_of_one_size_share_batches(run: Run) -> None:
    batches = Ingest(run, 0, 20, 4, 100).batches(0)
    assert len({image.image_id for batch in islice(batches, 2) for image in batch}) == 40
