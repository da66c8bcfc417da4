"""GPT-2 with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config

from .configuration_moe import MoeConfigMixin


@strict
class GPT2MoeConfig(MoeConfigMixin, GPT2Config):
    """`GPT2Config` with the fields of `MoeConfigMixin`."""

    model_type = "gpt2_moe"
    attribute_map = {**GPT2Config.attribute_map, "num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_gpt2_moe"
    moe_block: ClassVar[str] = "h.*.mlp"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "GPT2MoeModel",
        "AutoModelForPreTraining": "GPT2MoeLMHeadModel",
        "AutoModelForCausalLM": "GPT2MoeLMHeadModel",
        "AutoModelForSequenceClassification": "GPT2MoeForSequenceClassification",
        "AutoModelForTokenClassification": "GPT2MoeForTokenClassification",
        "AutoModelForQuestionAnswering": "GPT2MoeForQuestionAnswering",
    }

    @property
    def dense_intermediate_size(self) -> int:
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd


__all__ = ["GPT2MoeConfig"]
