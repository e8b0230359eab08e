"""How many samples fit into a pass."""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")
_OUT_OF_MEMORY = (  # in the words of libraries beneath PyTorch: no engine, no workspace, no handle
    "unable to find an engine", "CUDNN_STATUS_NOT_SUPPORTED", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip
_CELLS = {"cpu": 2**14, "cuda": 2**19}  # latent cells of a pass to begin with: 64 of 16 x 16, 128 of 64 x 64


def out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory did not suffice; a convolution without room for its workspace says so indirectly."""
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    return told or isinstance(error, torch.OutOfMemoryError)


class Batch:
    """Samples per UNet pass, halved when the device's memory does not suffice."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.notes: list[str] = []

    def __call__(self, work: Callable[[int], Result]) -> Result:
        """`work(size)`, again with half the size as often as the device is out of memory.

        Raises:
            RuntimeError: `out_of_memory`, as even a pass of one sample does not fit.
        """
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if self.size == 1 or not out_of_memory(error):
                    raise
                self.size //= 2
                self.notes = [f"the device is out of memory; passes now hold {self.size} samples"]
            torch.cuda.empty_cache()  # outside the handler, which keeps the failed pass alive


class Batches:
    """A `Batch` for every shape of latents that comes along: of the size that is given, or begun large."""

    def __init__(self, size: int | str, device: str) -> None:
        self._size, self._device = size, device
        self._of_shape: dict[tuple[int, int], Batch] = {}

    def of(self, h: int, w: int) -> Batch:
        size = max(1, _CELLS[self._device] // (h * w)) if self._size == "auto" else int(self._size)
        return self._of_shape.setdefault((h, w), Batch(size))

    def notes(self) -> list[str]:
        """What the user should know."""
        return [note for batch in self._of_shape.values() for note in batch.notes]
