"""OPT with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import OPTConfig

from .configuration_moe import MoeConfigMixin


@strict
class OPTMoeConfig(MoeConfigMixin, OPTConfig):
    """`OPTConfig` with the fields of `MoeConfigMixin`."""

    model_type = "opt_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_opt_moe"
    moe_block: ClassVar[str] = "decoder.layers.*.mlp"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "OPTMoeModel",
        "AutoModelForCausalLM": "OPTMoeForCausalLM",
        "AutoModelForSequenceClassification": "OPTMoeForSequenceClassification",
        "AutoModelForQuestionAnswering": "OPTMoeForQuestionAnswering",
    }

    @property
    def dense_intermediate_size(self) -> int:
        return self.ffn_dim

    def validate_layerdrop(self):
        """A layer that is skipped has no router logits, so that the losses could lack all of them."""
        if self.layerdrop > 0:
            raise ValueError(f"layerdrop is {self.layerdrop}, but a mixture's layers can't be skipped; set it to 0.")


__all__ = ["OPTMoeConfig"]
