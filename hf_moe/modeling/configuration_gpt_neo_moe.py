"""GPT-Neo with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GPTNeoConfig

from .configuration_moe import MoeConfigMixin


@strict
class GPTNeoMoeConfig(MoeConfigMixin, GPTNeoConfig):
    """`GPTNeoConfig` with the fields of `MoeConfigMixin`."""

    model_type = "gpt_neo_moe"
    attribute_map = {**GPTNeoConfig.attribute_map, "num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_gpt_neo_moe"
    moe_block: ClassVar[str] = "h.*.mlp"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "GPTNeoMoeModel",
        "AutoModelForCausalLM": "GPTNeoMoeForCausalLM",
        "AutoModelForSequenceClassification": "GPTNeoMoeForSequenceClassification",
        "AutoModelForTokenClassification": "GPTNeoMoeForTokenClassification",
        "AutoModelForQuestionAnswering": "GPTNeoMoeForQuestionAnswering",
    }

    @property
    def dense_intermediate_size(self) -> int:
        return self.intermediate_size if self.intermediate_size is not None else 4 * self.hidden_size


__all__ = ["GPTNeoMoeConfig"]
