"""Where the training workers say how far they are, and the driver looks. Imports little, as an actor starts with it."""

from math import nan
from typing import Any

import ray


@ray.remote(num_cpus=0)
class Board:
    """The newest state of a training."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {
            "beat": 0, "steps": 0, "began": 0, "step": 0, "loss": nan, "error": None, "warnings": []
        }  # fmt: skip

    def write(self, warning: str | None = None, **news: Any) -> None:
        """Any message, an empty one too, shows that the workers are alive. Warnings are collected."""
        self.state.update(news, beat=self.state["beat"] + 1)
        self.state["warnings"] += [warning] if warning else []

    def read(self) -> dict[str, Any]:
        return self.state
