"""A pass that does not fit is made smaller, once and for all."""

import pytest
import torch

from diffmine.diffusion.memory import Batch, Batches


class Device:
    """Work that fits up to `most` samples, and notes the sizes that were tried."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.tried: list[int] = []

    def __call__(self, size: int) -> str:
        self.tried.append(size)
        if size > self.most:
            raise torch.OutOfMemoryError("too much")
        return f"done with {size}"


def test_a_size_that_does_not_fit_is_halved_and_kept() -> None:
    batch, device = Batch(100), Device(30)
    assert batch(device) == "done with 25"
    assert batch.notes == ["the device is out of memory; passes now hold 25 samples"]
    assert batch(device) == "done with 25"
    assert device.tried == [100, 50, 25, 25]
    assert len(batch.notes) == 1


def test_what_fits_is_left_as_it_is() -> None:
    batch, device = Batch(64), Device(64)
    assert batch(device) == "done with 64"
    assert (batch.size, batch.notes) == (64, [])


def test_one_sample_that_does_not_fit_is_an_error() -> None:
    batch, device = Batch(5), Device(0)
    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        batch(device)
    assert device.tried == [5, 2, 1]


@pytest.mark.parametrize(
    "said",
    [
        "GET was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_a_library_without_room_to_work_in_is_out_of_memory(said: str) -> None:
    def work(size: int) -> int:
        if size > 2:
            raise RuntimeError(said)
        return size

    assert Batch(8)(work) == 2


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    tried = []

    def work(size: int) -> None:
        tried.append(size)
        raise RuntimeError("another fault")

    with pytest.raises(RuntimeError, match="another fault"):
        Batch(8)(work)
    assert tried == [8]


def test_large_latents_begin_with_fewer_samples_but_never_none() -> None:
    sizes = [Batches("auto", "cpu").of(side, side).size for side in (8, 16, 64, 1024)]
    assert sizes[0] == 4 * sizes[1] == 64 * sizes[2]
    assert sizes[-1] == 1
