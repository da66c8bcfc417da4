"""GPT-J with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GPTJConfig

from .configuration_moe import MoeConfigMixin


@strict
class GPTJMoeConfig(MoeConfigMixin, GPTJConfig):
    """`GPTJConfig` with the fields of `MoeConfigMixin`."""

    model_type = "gptj_moe"
    attribute_map = {**GPTJConfig.attribute_map, "num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_gptj_moe"
    moe_block: ClassVar[str] = "h.*.mlp"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "GPTJMoeModel",
        "AutoModelForCausalLM": "GPTJMoeForCausalLM",
        "AutoModelForSequenceClassification": "GPTJMoeForSequenceClassification",
        "AutoModelForQuestionAnswering": "GPTJMoeForQuestionAnswering",
    }

    @property
    def dense_intermediate_size(self) -> int:
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd


__all__ = ["GPTJMoeConfig"]
