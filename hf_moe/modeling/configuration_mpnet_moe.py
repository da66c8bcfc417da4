"""MPNet with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import MPNetConfig

from .configuration_moe import MoeConfigMixin


@strict
class MPNetMoeConfig(MoeConfigMixin, MPNetConfig):
    """`MPNetConfig` with the fields of `MoeConfigMixin`."""

    model_type = "mpnet_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_mpnet_moe"
    moe_block: ClassVar[str] = "encoder.layer.*.intermediate"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "MPNetMoeModel",
        "AutoModelForPreTraining": "MPNetMoeForMaskedLM",
        "AutoModelForMaskedLM": "MPNetMoeForMaskedLM",
        "AutoModelForSequenceClassification": "MPNetMoeForSequenceClassification",
        "AutoModelForMultipleChoice": "MPNetMoeForMultipleChoice",
        "AutoModelForTokenClassification": "MPNetMoeForTokenClassification",
        "AutoModelForQuestionAnswering": "MPNetMoeForQuestionAnswering",
    }


__all__ = ["MPNetMoeConfig"]
