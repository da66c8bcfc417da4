"""BERT with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

from .configuration_moe import MoeConfigMixin


@strict
class BertMoeConfig(MoeConfigMixin, BertConfig):
    """`BertConfig` with the fields of `MoeConfigMixin`."""

    model_type = "bert_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_bert_moe"
    moe_block: ClassVar[str] = "encoder.layer.*.mlp"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "BertMoeModel",
        "AutoModelForPreTraining": "BertMoeForPreTraining",
        "AutoModelForMaskedLM": "BertMoeForMaskedLM",
        "AutoModelForCausalLM": "BertMoeLMHeadModel",
        "AutoModelForNextSentencePrediction": "BertMoeForNextSentencePrediction",
        "AutoModelForSequenceClassification": "BertMoeForSequenceClassification",
        "AutoModelForMultipleChoice": "BertMoeForMultipleChoice",
        "AutoModelForTokenClassification": "BertMoeForTokenClassification",
        "AutoModelForQuestionAnswering": "BertMoeForQuestionAnswering",
        "AutoModelForTextEncoding": "BertMoeModel",
    }


__all__ = ["BertMoeConfig"]
