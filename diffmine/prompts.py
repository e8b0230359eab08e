"""Labels -> text: the one place, so that finetuning, typicality, features and samples say the same."""

from collections.abc import Sequence


def prompts(labels: Sequence[str], template: str, null_prompt: str) -> list[str]:
    """The null prompt, then one prompt per label: K labels -> K + 1 texts."""
    return [null_prompt, *(prompt(label, template) for label in labels)]


def prompt(label: str, template: str) -> str:
    """Text of a label; the template holds `{label}` once."""
    return template.replace("{label}", label)


def joined(words: Sequence[str], template: str) -> str:
    """Text of several labels, or of a label with what else is known of an image: they stand for it, with commas."""
    return prompt(", ".join(words), template)
