"""ModernBERT with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import ModernBertConfig

from .configuration_moe import MoeConfigMixin


@strict
class ModernBertMoeConfig(MoeConfigMixin, ModernBertConfig):
    """`ModernBertConfig` with the fields of `MoeConfigMixin`."""

    model_type = "modernbert_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_modernbert_moe"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "ModernBertMoeModel",
        "AutoModelForMaskedLM": "ModernBertMoeForMaskedLM",
        "AutoModelForSequenceClassification": "ModernBertMoeForSequenceClassification",
        "AutoModelForMultipleChoice": "ModernBertMoeForMultipleChoice",
        "AutoModelForTokenClassification": "ModernBertMoeForTokenClassification",
        "AutoModelForQuestionAnswering": "ModernBertMoeForQuestionAnswering",
    }


__all__ = ["ModernBertMoeConfig"]
