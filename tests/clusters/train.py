"""The stages as far as a finetuned model, on a little of toytown: what test_training.py kills.

python train.py RUN_FOLDER STEPS WORKERS
"""

import sys
from pathlib import Path

from diffmine import pipeline
from diffmine.configfile import load
from diffmine.progress import Progress
from diffmine.run import Run
from diffmine.stages import session

CONFIG = Path(__file__).parents[2] / "configs" / "toytown.yaml"
CHECKPOINT_EVERY = 25  # steps; never at those where notices are looked for by fast steps, the multiples of 8


def main(folder: str, steps: str, workers: str) -> None:
    settings = {
        "output": folder, "dataset.limit_per_label": 4, "finetune.steps": steps, "finetune.workers": workers,
        "finetune.batch_size": 8, "finetune.decay_steps": 10, "finetune.checkpoint_every": CHECKPOINT_EVERY,
        "finetune.samples_per_label": 0, "compute.workers": 1, "compute.open_cluster": "true",
    }  # fmt: skip
    config = load(CONFIG, [f"--{name}={value}" for name, value in settings.items()])
    context = session.Context(Run(config.output), config, Progress())
    with session.connected(context):
        for stage in pipeline.STAGES[:3]:
            if context.run.committed(stage.name) is None:
                pipeline._run_stage(context, stage)


if __name__ == "__main__":
    main(*sys.argv[1:])
