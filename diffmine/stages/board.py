"""Where the training workers say how far they are, and the driver looks. Imports little, as an actor starts with it."""

from typing import Any

import ray


@ray.remote(num_cpus=0)
class Board:
    """The newest state of a training."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"step": 0, "loss": float("nan"), "error": None}

    def write(self, **news: Any) -> None:
        self.state.update(news)

    def read(self) -> dict[str, Any]:
        return self.state
