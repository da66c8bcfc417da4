"""GPT-NeoX with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GPTNeoXConfig

from .configuration_moe import MoeConfigMixin


@strict
class GPTNeoXMoeConfig(MoeConfigMixin, GPTNeoXConfig):
    """`GPTNeoXConfig` with the fields of `MoeConfigMixin`."""

    model_type = "gpt_neox_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_gpt_neox_moe"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "GPTNeoXMoeModel",
        "AutoModelForCausalLM": "GPTNeoXMoeForCausalLM",
        "AutoModelForSequenceClassification": "GPTNeoXMoeForSequenceClassification",
        "AutoModelForTokenClassification": "GPTNeoXMoeForTokenClassification",
        "AutoModelForQuestionAnswering": "GPTNeoXMoeForQuestionAnswering",
    }


__all__ = ["GPTNeoXMoeConfig"]
