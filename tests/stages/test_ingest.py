"""Latents stream from their shards: the images of a step are the same wherever training begins."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from diffmine.config import Dataset, Finetune
from diffmine.run import Run, rows_to_table
from diffmine.stages.ingest import Ingest, balance

IMAGES = {f"{i // 7}/{i:03d}.png": (8, 4 + 4 * (i % 3 == 0)) for i in range(40)}


def latent(image_id: str) -> np.ndarray:
    h, w = IMAGES[image_id]
    return np.random.default_rng(list(image_id.encode())).normal(size=(4, h, w)).astype(np.float16)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run, ids = Run(str(tmp_path / "run")), sorted(IMAGES)
    rows = [{"image_id": i, "uri": i, "labels": [i[0], "all"], "boxes": None} for i in [*ids, "9/failed.png"]]
    table = rows_to_table("manifest", rows)
    panoramas = pa.array([int(i) // 2 if i.isdigit() else None for i in (row["uri"][2:5] for row in rows)])
    run.write_part("manifest", 0, table.append_column("panorama", panoramas))
    for part in range(0, 40, 6):
        shard = [
            {"image_id": i, "width": 0, "height": 0, "h": IMAGES[i][0], "w": IMAGES[i][1], "latent": latent(i).ravel(),
             "latent_std": np.abs(latent(i)).ravel(), "scale": 1.0, "crop_x": 0, "crop_y": 0}
            for i in ids[part : part + 6]
        ]  # fmt: skip
        run.write_part("latents", part // 6, rows_to_table("latents", shard))
    return run


def ingest_of(
    run: Run, batch_size: int, window: int = 100, split: float = 0, group: str | None = None, **more: Any
) -> Ingest:
    """Images of a run for training with these settings, and a share of them held out."""
    dataset = Dataset(source="images", finetune_split=split, group_column=group)
    return Ingest(run, 0, dataset, Finetune(batch_size=batch_size, **more), window)


@pytest.mark.parametrize("window", [100, 10])
def test_a_step_sees_the_same_images_wherever_training_begins(run: Run, window: int) -> None:
    def names(start: int, count: int) -> list[list[str]]:
        batches = ingest_of(run, 4, window=window).batches(start)
        return [[image.image_id for _, image in batch] for _, batch in islice(batches, count)]

    whole = names(0, 40)
    assert len({name for batch in whole[:16] for name in batch}) == 40
    for start in (1, 9, 10, 11, 25):
        assert names(start, 40 - start) == whole[start:]


@pytest.mark.parametrize("window", [100, 10])
def test_images_are_whole_and_have_their_labels(run: Run, window: int) -> None:
    ingest = ingest_of(run, 4, window=window)
    for (h, w), batch in islice(ingest.batches(0), 20):
        assert [h, w] == np.min([image.latent.shape[1:] for _, image in batch], axis=0).tolist()
        for _, image in batch:
            assert np.array_equal(image.latent, latent(image.image_id))
            assert image.labels == [image.image_id[0], "all"]
    assert ingest.images == 40
    assert ingest.untrained_ids() == ["9/failed.png"]
    assert ingest.label_counts() == {"0": 7, "1": 7, "2": 7, "3": 7, "4": 7, "5": 5, "all": 40}
    assert (ingest.common_shape(), ingest.largest_shape(0, 20)) == ((8, 4), (8, 8))


def test_images_for_validation_hold_no_others(run: Run) -> None:
    """They stay in memory to the end, and each comes from another shard of a large dataset."""
    ingest, before = ingest_of(run, 4, split=0.2), pa.total_allocated_bytes()
    held = ingest.validation(1)
    assert len(held) == 7
    assert pa.total_allocated_bytes() - before <= 1.5 * sum(image.latent.nbytes for _, image in held)


def test_the_largest_shape_is_one_that_a_step_has(run: Run) -> None:
    """A lone panorama is cropped to what its batch shares."""
    ingest = ingest_of(run, 4)
    ingest.sizes[:] = 8
    ingest.sizes[3] = 8, 64
    assert ingest.largest_shape(0, 1000) == (8, 8)
    ingest.sizes[4:8] = 8, 64
    assert ingest.largest_shape(0, 1000) == (8, 64)


def test_crops_of_one_size_share_batches(run: Run) -> None:
    ingest = ingest_of(run, 20, crop=4)
    batches = [*islice(ingest.batches(0), 2)]
    assert len({image.image_id for _, batch in batches for _, image in batch}) == 40
    assert {shape for shape, _ in batches} == {ingest.largest_shape(0, 2)} == {(4, 4)}


@pytest.mark.parametrize("window", [100, 10])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_see_together_what_one_would_see(run: Run, window: int, world: int) -> None:
    whole = list(islice(ingest_of(run, 8, window=window).batches(3), 20))
    each = [list(islice(ingest_of(run, 8, window=window).batches(3, rank, world), 20)) for rank in range(world)]
    for step, (shape, batch) in enumerate(whole):
        assert {own[step][0] for own in each} == {shape}
        together = sorted((item for own in each for item in own[step][1]), key=lambda item: item[0])
        assert [(place, image.image_id) for place, image in together] == [(p, image.image_id) for p, image in batch]


def test_a_process_reads_its_share_of_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 shards in two windows each of 8 processes reads 8 and a few more, which its parts of the windows touch."""
    run, ids, reads = Run(str(tmp_path)), [f"{i:04d}" for i in range(640)], []
    rows = [{"image_id": i, "uri": i, "labels": ["a"], "boxes": None} for i in ids]
    run.write_part("manifest", 0, rows_to_table("manifest", rows))
    for part in range(64):
        shard = [
            {"image_id": i, "h": 1, "w": 1, "latent": np.zeros(1, np.float16)} for i in ids[10 * part : 10 * part + 10]
        ]
        run.write_part("latents", part, rows_to_table("latents", shard))
    read = Ingest._images
    monkeypatch.setattr(Ingest, "_images", lambda self, shard, rows: reads.append(shard) or read(self, shard, rows))
    for rank in range(8):
        reads.clear()
        batches = ingest_of(run, 16, window=320).batches(0, rank, 8)
        first_epoch = [image.image_id for _, batch in islice(batches, 40) for _, image in batch]
        assert len(set(first_epoch)) == 80
        assert len(reads) <= 2 * (64 // 8 + 2 * 4)  # two epochs, of which the second is being read


@pytest.mark.parametrize("window", [100, 10])
def test_images_that_are_held_out_are_never_trained_on(run: Run, window: int) -> None:
    ingest = ingest_of(run, 4, window, split=0.3, group="panorama")
    held = set(ingest.held_out_ids())
    assert len(held) + ingest.images == 40
    assert 8 <= len(held) <= 12
    assert all((f"{i // 7}/{i:03d}.png" in held) == (f"{(i ^ 1) // 7}/{i ^ 1:03d}.png" in held) for i in range(40))
    seen = {image.image_id for _, batch in islice(ingest.batches(0), 60) for _, image in batch}
    assert seen == set(IMAGES) - held
    assert sum(ingest.label_counts().values()) == 2 * ingest.images


def test_validation_takes_a_few_held_out_images_of_each_label(run: Run) -> None:
    ingest = ingest_of(run, 4, split=0.4)
    (items, again), held = (ingest.validation(2) for _ in range(2)), ingest.held_out_ids()
    assert [(label, image.image_id) for label, image in items] == [(label, image.image_id) for label, image in again]
    assert {image.image_id for _, image in items} <= set(held)
    for label, count in {"0": 2, "all": 2}.items():
        own = [image for found, image in items if found == label]
        assert len(own) == count
        assert all(np.array_equal(image.latent, latent(image.image_id)) for image in own)


def test_columns_and_the_posterior_come_along_where_they_are_wanted(run: Run) -> None:
    ingest = ingest_of(run, 4, prompt_columns={"panorama": 1.0}, posterior="sample")
    for _, batch in islice(ingest.batches(0), 20):
        for _, image in batch:
            assert image.columns == {"panorama": str(int(image.image_id[2:5]) // 2)}
            assert np.array_equal(image.spread, np.abs(latent(image.image_id)))


def test_labels_are_balanced_where_images_have_one() -> None:
    labels = pa.array([["a"]] * 30 + [["b"]] * 6 + [["c"]] * 4)
    wanted = np.ones(40, bool)
    wanted[:10] = False
    weights = balance(labels, wanted)
    assert weights[wanted].mean() == pytest.approx(1)
    own = np.repeat([0, 1, 2], [30, 6, 4])
    assert [weights[wanted & (own == label)].sum() for label in range(3)] == pytest.approx([10] * 3)
