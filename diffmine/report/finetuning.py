"""Losses and held-out images -> what the report says of finetuning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from diffmine.report.charts.losses import smoothed, training_svg, validation_svg


@dataclass(frozen=True)
class Finetuning:
    """What a run knows of its training.

    Attributes:
        loss: of every step, or of steps that lie evenly.
        steps: that were done.
        validation: by step, the first one the base model's: `step`, `loss` (on held-out images, with the label),
            `null_loss` (without), `typicality` (what the label tells: squared eps error without it less that with it,
            over the timesteps of training), `exported` (whether its weights are used), and `labels`, label -> these
            three and `images`.
        held_out: images that were mined, but not trained on.
        trained: how many images were trained on; None where it is not known.
    """

    loss: Sequence[float] = ()
    steps: int = 0
    validation: Sequence[Mapping[str, Any]] = ()
    held_out: frozenset[str] = frozenset()
    trained: int | None = None

    @property
    def kept(self) -> Mapping[str, Any] | None:
        """The validation of the weights that are used."""
        return next((one for one in self.validation if one["exported"]), None)

    def of_label(self, label: str | None) -> dict[str, Mapping[str, Any]] | None:
        """A label's losses and what it tells: `base` of the base model, `kept` of the weights that are used."""
        kept = self.kept
        if kept is None or label not in kept["labels"] or label not in self.validation[0]["labels"]:
            return None
        return {"base": self.validation[0]["labels"][label], "kept": kept["labels"][label]}

    def told(self, patches: pa.Table) -> dict[str, Any]:
        """What the overview says.

        Args:
            patches: of the run.

        Returns:
            steps; images (trained on); held_out and held_out_share; first and last (training loss, smoothed);
            base and kept (validations); charts (title -> SVG); patches (`compared`).
        """
        kept, held_out = self.kept, len(self.held_out)
        mean = smoothed(self.loss)[1].tolist() if self.loss else [None]
        charts = {"Training loss, smoothed": training_svg(self.loss, self.steps)}
        if kept is not None:
            steps, used = [one["step"] for one in self.validation], self.validation.index(kept)
            for what, values in {
                "Loss on held-out images": [one["loss"] for one in self.validation],
                "What the label tells on held-out images": [one["typicality"] for one in self.validation],
            }.items():
                charts[what] = validation_svg(steps, values, used, what)
        return {
            "steps": self.steps, "images": self.trained, "held_out": held_out,
            "held_out_share": held_out / (held_out + self.trained) if held_out and self.trained is not None else None,
            "first": mean[0], "last": mean[-1], "kept": kept, "base": self.validation[0] if kept else None,
            "charts": {title: Markup(svg) for title, svg in charts.items() if svg},
            "patches": compared(patches, self.held_out),
        }  # fmt: skip


def compared(patches: pa.Table, held_out: frozenset[str]) -> dict[str, tuple[int, float | None]] | None:
    """The most typical patches of images that were trained on, and of held-out ones: how many, and their median T.

    None where no image was held out.
    """
    if not held_out:
        return None
    top = patches.filter(pc.equal(patches["kind"], "top"))
    held = pc.is_in(top["image_id"], pa.array(sorted(held_out), pa.string()))
    found = {"trained": top.filter(pc.invert(held)), "held_out": top.filter(held)}
    return {name: (len(rows), _median(rows["typicality"].to_numpy())) for name, rows in found.items()}


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None
