"""The form of a family's table: where a dense architecture keeps its feed-forward network."""

from dataclasses import dataclass, field

from hf_moe.modeling import dense_type
from hf_moe.modeling.configuration_moe import MoeConfigMixin


@dataclass(frozen=True, kw_only=True)
class Family:
    """One dense architecture. Module names are relative to a layer, the layer's to the model's body.

    Args:
        config_class: the mixture's configuration.
        layer: name of a layer, with `{layer}` for its index.
        up: the projection into the inner width; its input is what the router reads.
        gate: the projection into the gate, in gated networks; the same as `up` where one projection holds both, the
            gate's rows first.
        down: the projection out of it.
        norm: the norm that makes the feed-forward network's input, by which the router's start is calibrated.
        norm_offset: what the norm adds to its stored weight before it multiplies (1 in Gemma).
        block: name that the mixture has in its layer.
        transposed: whether the projections store (in, out), as GPT-2's Conv1D does.
        inputs: the dense model's main input, a key of `compare.INPUTS`.
        body: the body's name in heads, where it is not the dense classes' `base_model_prefix`.
        encoder_of: dense classes with a decoder behind the body, which is left behind.
        renamed: regular expressions in old checkpoints' tensor names -> what they are today; tried in this order.
        dropped: regular expressions of tensors that are not carried over -> why.
        optional: regular expressions of tensors that a source may lack, and its mixture then lacks too: only training
            uses them.
        variants: (field of the configuration, its value) -> which of the above are others then.
        refused: fields of the configuration that rule a conversion out where they are set -> why.
    """

    config_class: type[MoeConfigMixin]
    layer: str
    up: str
    down: str
    norm: str
    gate: str | None = None
    norm_offset: float = 0.0
    block: str = "mlp"
    transposed: bool = False
    inputs: str = "input_ids"
    body: str | None = None
    encoder_of: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    variants: dict[tuple[str, bool], dict[str, str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        return dense_type(self.config_class)
