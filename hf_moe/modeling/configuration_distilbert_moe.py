"""DistilBERT with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import DistilBertConfig

from .configuration_moe import MoeConfigMixin


@strict
class DistilBertMoeConfig(MoeConfigMixin, DistilBertConfig):
    """`DistilBertConfig` with the fields of `MoeConfigMixin`."""

    model_type = "distilbert_moe"
    attribute_map = {**DistilBertConfig.attribute_map, "num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_distilbert_moe"
    moe_block: ClassVar[str] = "transformer.layer.*.ffn"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "DistilBertMoeModel",
        "AutoModelForPreTraining": "DistilBertMoeForMaskedLM",
        "AutoModelForMaskedLM": "DistilBertMoeForMaskedLM",
        "AutoModelForSequenceClassification": "DistilBertMoeForSequenceClassification",
        "AutoModelForMultipleChoice": "DistilBertMoeForMultipleChoice",
        "AutoModelForTokenClassification": "DistilBertMoeForTokenClassification",
        "AutoModelForQuestionAnswering": "DistilBertMoeForQuestionAnswering",
        "AutoModelForTextEncoding": "DistilBertMoeModel",
    }

    @property
    def dense_intermediate_size(self) -> int:
        return self.hidden_dim


__all__ = ["DistilBertMoeConfig"]
