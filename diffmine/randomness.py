"""(run seed, purpose) -> an independent random generator: the only source of chance in diffmine."""

import hashlib

import numpy as np


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Generator whose numbers depend on `seed` and `purpose` only, never on order, batch or worker.

    Purposes are told apart by type and value: `("a", 1)`, `("a", "1")` and `("a1",)` are three streams.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
