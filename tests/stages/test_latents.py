"""The reader's rows, whose files are read ahead; the encoder's: the posterior's mean, and its standard deviation."""

import io
import socket
from pathlib import Path
from threading import Barrier

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from diffmine.data import reading
from diffmine.diffusion.model import load
from diffmine.errors import ImageError, StoreError
from diffmine.run import TINY, Run
from diffmine.stages.latents import _PREPARED, _Encoder, _Reader

PIXELS = np.random.default_rng(0).integers(256, size=(64, 96, 3), dtype=np.uint8)
GIVEN = {"prepared_height": 64, "prepared_width": 96, "width": 96, "height": 64, "scale": 1.0, "crop_x": 0, "crop_y": 0}


def test_files_are_read_ahead_and_rows_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """No read ends before four have begun; and one in seven fails."""
    together = Barrier(4, timeout=10)

    def read_file(uri: str, _: int) -> bytes:
        together.wait()
        if int(uri) % 7 == 0:
            raise ImageError("missing", uri)
        file = io.BytesIO()
        Image.fromarray(PIXELS[: 32 + int(uri)]).save(file, "png")
        return file.getvalue()

    monkeypatch.setattr(reading, "read_file", read_file)
    images = [{"image_id": f"{i}.png", "uri": str(i)} for i in range(24)]
    rows = [*_Reader(64, 8, 10**8, 10**8).rows(images)]
    assert [row["image_id"] for row in rows] == [image["image_id"] for image in images]
    assert [row.get("height") for row in rows] == [None if i % 7 == 0 else 32 + i for i in range(24)]
    assert {row["reason"] for row in rows if "reason" in row} == {"missing"}


def test_few_files_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is asked for before one of those on their way is taken."""
    monkeypatch.setattr(reading, "read_file", lambda uri, _: uri.encode())
    left = iter(map(str, range(100)))
    files = reading.files_ahead(left, 0)
    assert next(files).result() == b"0"
    assert next(left) == str(reading._AHEAD + 1)
    assert [file.result() for file in files] == [b"%d" % i for i in range(1, 100) if i != reading._AHEAD + 1]


@pytest.mark.parametrize("absent", ["photos", "photos, a mount point", "photos/a, a link", "elsewhere"])
def test_images_of_a_disk_that_is_not_mounted_are_not_missing(tmp_path: Path, absent: str) -> None:
    """The dataset's folder or one elsewhere is gone, or empty, or a link that leads nowhere."""
    photos = tmp_path / "photos"
    if "," in absent:
        photos.mkdir()
    if "link" in absent:
        (photos / "b.png").write_bytes(b"")
        (photos / "a").symlink_to(tmp_path / "nowhere")
    image_id = f"{photos}/a/1.png" if absent == "elsewhere" else "a/1.png"
    with pytest.raises(StoreError, match=rf"1\.png: not found, and {tmp_path}.* on {socket.gethostname()}"):
        [*_Reader(64, 8, 10**8, 10**8).rows([{"image_id": image_id, "uri": f"{photos}/a/1.png"}])]


def test_images_that_are_gone_are_missing(tmp_path: Path) -> None:
    """The control: one image, a label's folder, and an image among others elsewhere."""
    (tmp_path / "a").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "a" / "0.png")
    ids = ["a/0.png", "a/1.png", "b/c/1.png", f"{tmp_path}/a/2.png"]
    images = [{"image_id": i, "uri": str(tmp_path / i)} for i in ids]
    rows = [*_Reader(64, 8, 10**8, 10**8).rows(images)]
    assert [row.get("reason") for row in rows] == [None, "missing", "missing", "missing"]


@pytest.mark.parametrize("refusal", [PermissionError("Access Denied"), OSError("Forbidden: storage.objects.get")])
def test_a_machine_that_may_read_no_image_has_no_missing_images(
    refusal: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that may be read, or a file that is gone, is enough of a control; so is an image that is alone."""
    run, reader = Run(str(tmp_path)), _Reader(64, 8, 10**8, 10**8)
    rows = [{"image_id": f"{i}.png", "uri": f"s3://b/{i}.png"} for i in range(3)]
    monkeypatch.setattr("diffmine.stages.latents.read_shard", lambda *_: pa.Table.from_pylist(rows))
    answers: dict[str, bytes | OSError] = {}

    def read_uri(uri: str, _: int) -> bytes:
        answer = answers.get(uri, refusal)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(reading, "read_uri", read_uri)
    with pytest.raises(StoreError, match=rf"{socket.gethostname()} may read none of 3 images in a row"):
        reader(run, 0, b"")
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "png")
    for answer in (file.getvalue(), FileNotFoundError("gone")):
        answers["s3://b/1.png"] = answer
        reasons = reader(run, 0, b"")["images"]["reason"].to_pylist()
        assert reasons == ["missing", None if isinstance(answer, bytes) else "missing", "missing"]
    del rows[1:]
    assert reader(run, 0, b"")["images"]["reason"].to_pylist() == ["missing"]


@pytest.mark.parametrize("with_std", [False, True])
def test_a_row_holds_the_posterior(with_std: bool) -> None:
    """Against diffusers' own distribution; a file that could not be read stays a failure beside it."""
    rows = [
        {"image_id": "a.png", "uri": "a.png", "pixels": PIXELS.tobytes(), **GIVEN},
        {"image_id": "b.png", "uri": "b.png", "reason": "truncated", "detail": "half a file"},
    ]
    part = _Encoder("tiny", "float32", with_std)({"images": pa.Table.from_pylist(rows, schema=_PREPARED)})
    assert [failed["reason"] for failed in part.failures] == ["truncated"]
    [row] = part.rows.to_pylist()
    vae = load(TINY).vae
    with torch.no_grad():
        found = vae.encode(torch.from_numpy(PIXELS).permute(2, 0, 1)[None].float() / 127.5 - 1).latent_dist
    scale = vae.config.scaling_factor
    assert np.allclose(row["latent"], (found.mean * scale).ravel(), atol=2e-3)
    if with_std:
        assert np.allclose(row["latent_std"], (found.std * scale).ravel(), atol=2e-3)
        assert min(row["latent_std"]) > 0
    else:
        assert row["latent_std"] is None


def test_images_too_large_for_one_pass_are_encoded_in_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that holds two images at a time gives the rows of one that holds all."""
    rows = [{"image_id": f"{i}.png", "uri": "x", "pixels": PIXELS[..., ::-1].tobytes(), **GIVEN} for i in range(5)]
    payload = {"images": pa.Table.from_pylist(rows, schema=_PREPARED)}
    encoder = _Encoder("tiny", "float32", True)
    whole, posterior, sizes = encoder(payload), type(encoder.model).posterior, []

    def small(model: object, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError
        return posterior(model, images)

    monkeypatch.setattr(type(encoder.model), "posterior", small)
    found = encoder(payload)
    assert sizes == [5, 5, 4, 2, 2, 1]
    assert found.notes == ["the device is out of memory; passes now hold 2 samples"]
    for one, other in zip(found.rows.to_pylist(), whole.rows.to_pylist(), strict=True):
        assert np.allclose(one.pop("latent"), other.pop("latent"), atol=2e-3)
        assert np.allclose(one.pop("latent_std"), other.pop("latent_std"), atol=2e-3)
        assert one == other
