"""XLM-RoBERTa with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import XLMRobertaConfig

from .configuration_moe import MoeConfigMixin


@strict
class XLMRobertaMoeConfig(MoeConfigMixin, XLMRobertaConfig):
    """`XLMRobertaConfig` with the fields of `MoeConfigMixin`."""

    model_type = "xlm-roberta_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_xlm_roberta_moe"
    moe_block: ClassVar[str] = "encoder.layer.*.mlp"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "XLMRobertaMoeModel",
        "AutoModelForPreTraining": "XLMRobertaMoeForMaskedLM",
        "AutoModelForMaskedLM": "XLMRobertaMoeForMaskedLM",
        "AutoModelForCausalLM": "XLMRobertaMoeForCausalLM",
        "AutoModelForSequenceClassification": "XLMRobertaMoeForSequenceClassification",
        "AutoModelForMultipleChoice": "XLMRobertaMoeForMultipleChoice",
        "AutoModelForTokenClassification": "XLMRobertaMoeForTokenClassification",
        "AutoModelForQuestionAnswering": "XLMRobertaMoeForQuestionAnswering",
        "AutoModelForTextEncoding": "XLMRobertaMoeModel",
    }


__all__ = ["XLMRobertaMoeConfig"]
