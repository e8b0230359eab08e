"""The model card is YAML and Markdown whatever the labels are called."""

import yaml

from diffmine.config import Config
from diffmine.stages.card import model_card
from diffmine.stages.checkpoints import History

HOSTILE = ["a\n---\nlicense: mit", "```\n# b", "<script>", "\u202eoff", "x" * 10_000, "plain: 1"]


def test_a_card_tells_what_the_model_was_made_from() -> None:
    config = Config.model_validate({
        "output": "/runs/one", "dataset": {"source": "/data/set", "layout": "folder"}, "model": {"base": "tiny"},
        "finetune": {"steps": 100, "batch_size": 6}, "prompt": {"template": "A photo of {label}."},
    })  # fmt: skip
    metrics = [{"step": i, "loss": 2.0 - i / 100} for i in range(100)]
    card = model_card(config, 6, dict.fromkeys(HOSTILE, 1) | {"common": 6}, History(100, metrics))
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "tiny"
    assert yaml.safe_load(head)["license"] == "other"
    facts, example, labels = (yaml.safe_load(part.split("```")[0]) for part in body.split("```yaml\n")[1:])
    assert facts["images"] == 6
    assert facts["labels"] == 7
    assert facts["times an image was seen"] == 100
    assert facts["loss, first and last 50 steps"] == "1.7550, 1.2550"
    assert example == ["A photo of <script>."]
    assert labels["common"] == 6
    assert labels["<script>"] == 1
    assert {len(label) for label in labels} >= {80}
    assert body.count("```") == 6
