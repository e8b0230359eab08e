"""Config, labels and losses -> the model card: what a finetuned model was made from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from diffmine.config import Config
from diffmine.prompts import prompt
from diffmine.stages.checkpoints import History

_LISTED = 100  # labels
_LONGEST = 80  # characters of a label


def model_card(config: Config, images: int, labels: Mapping[str, int], history: History) -> str:
    """Markdown with a head of YAML.

    Args:
        images: trained on.
        labels: label -> images trained on.
        history: of the training.
    """
    head = {
        "base_model": config.model.base,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "other",
        "license_name": "that-of-the-base-model-and-of-the-images",
        "tags": ["diffmine", "latent-diffusion"],
    }
    wanted, seen = config.finetune, history.step * config.finetune.batch_size
    first, last = (_mean(history.metrics, part) for part in (slice(None, 50), slice(-50, None)))
    facts: dict[str, Any] = {
        "data": config.dataset.source,
        "images": images,
        "labels": len(labels),
        "prompt": config.prompt.template,
        "prompt without a label": config.prompt.null_prompt,
        "steps": history.step,
        "images a step": wanted.batch_size,
        "times an image was seen": round(seen / max(1, images), 1),
        "learning rate": wanted.learning_rate,
        "labels dropped": wanted.label_dropout,
        "weights": f"moving average, decay {wanted.ema_decay}",
        "seed": config.seed,
        "loss, first and last 50 steps": f"{first:.4f}, {last:.4f}",
    }
    if wanted.lora_rank is not None:
        facts["trained"] = f"low-rank adapters of rank {wanted.lora_rank}, merged"
    if history.validations:
        facts["held out"] = config.dataset.finetune_split
        best = history.best(wanted.best_by)
        for when, of in (("before training", history.validations[0]), (f"after {best['step']} steps, exported", best)):
            said = f"{of['loss']:.4f} with the label, {of['null_loss']:.4f} without"
            facts[f"loss on held-out images {when}"] = said
    listed = {label[:_LONGEST]: count for label, count in Counter(labels).most_common(_LISTED)}
    example = prompt(min(labels), config.prompt.template) if labels else config.prompt.null_prompt
    return "\n".join(
        [
            f"---\n{_yaml(head)}---",
            "# A diffusion model finetuned to mine a dataset\n",
            "Made by diffmine to find what is typical of the labels of a set of images (Diffusion Models as Data",
            "Mining Tools, ECCV 2024). It knows these images and labels, with their biases; it is not meant for",
            "making pictures.\n",
            "Its licence is that of the base model, and what the licences of the images allow.\n",
            f"```yaml\n{_yaml(facts)}```\n",
            f"Prompts are like this one:\n\n```yaml\n{_yaml([example[: 4 * _LONGEST]])}```\n",
            f"Images of each label{'' if len(labels) <= _LISTED else f', of the {_LISTED} with most'}:\n",
            f"```yaml\n{_yaml(listed)}```\n",
        ]
    )


def _mean(metrics: Sequence[Mapping[str, Any]], part: slice) -> float:
    losses = [row["loss"] for row in metrics[part]]
    return sum(losses) / max(1, len(losses))


def _yaml(found: Any) -> str:
    """Every string from data on its own line, quoted where it must be; no line can end the block it stands in."""
    text: str = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=10**6)
    return text.replace("```", "` ` `")
