"""ELECTRA with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import ElectraConfig

from .configuration_moe import MoeConfigMixin


@strict
class ElectraMoeConfig(MoeConfigMixin, ElectraConfig):
    """`ElectraConfig` with the fields of `MoeConfigMixin`."""

    model_type = "electra_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_electra_moe"
    moe_block: ClassVar[str] = "encoder.layer.*.mlp"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "ElectraMoeModel",
        "AutoModelForPreTraining": "ElectraMoeForPreTraining",
        "AutoModelForMaskedLM": "ElectraMoeForMaskedLM",
        "AutoModelForCausalLM": "ElectraMoeForCausalLM",
        "AutoModelForSequenceClassification": "ElectraMoeForSequenceClassification",
        "AutoModelForMultipleChoice": "ElectraMoeForMultipleChoice",
        "AutoModelForTokenClassification": "ElectraMoeForTokenClassification",
        "AutoModelForQuestionAnswering": "ElectraMoeForQuestionAnswering",
        "AutoModelForTextEncoding": "ElectraMoeModel",
    }


__all__ = ["ElectraMoeConfig"]
