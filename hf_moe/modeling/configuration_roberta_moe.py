"""RoBERTa with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import RobertaConfig

from .configuration_moe import MoeConfigMixin


@strict
class RobertaMoeConfig(MoeConfigMixin, RobertaConfig):
    """`RobertaConfig` with the fields of `MoeConfigMixin`."""

    model_type = "roberta_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_roberta_moe"
    moe_block: ClassVar[str] = "encoder.layer.*.mlp"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "RobertaMoeModel",
        "AutoModelForPreTraining": "RobertaMoeForMaskedLM",
        "AutoModelForMaskedLM": "RobertaMoeForMaskedLM",
        "AutoModelForCausalLM": "RobertaMoeForCausalLM",
        "AutoModelForSequenceClassification": "RobertaMoeForSequenceClassification",
        "AutoModelForMultipleChoice": "RobertaMoeForMultipleChoice",
        "AutoModelForTokenClassification": "RobertaMoeForTokenClassification",
        "AutoModelForQuestionAnswering": "RobertaMoeForQuestionAnswering",
        "AutoModelForTextEncoding": "RobertaMoeModel",
    }


__all__ = ["RobertaMoeConfig"]
