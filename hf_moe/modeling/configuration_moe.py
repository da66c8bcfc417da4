"""The fields that every Mixture-of-Experts configuration shares, under the names the ecosystem already reads."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PretrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files

from .moe_checks import check_router

if TYPE_CHECKING:
    _Base = PretrainedConfig  # what the mixin is mixed into
else:
    _Base = object

# The tensors that experts may have (`MoeExperts`).
EXPERT_TENSORS = tuple(f"{name}{kind}" for name in ("gate_up_proj", "up_proj", "down_proj") for kind in ("", "_bias"))

# How the projections of a feed-forward network are cut under tensor parallelism.
_CUT = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}


@dataclass(kw_only=True, repr=False, eq=False)
class MoeConfigMixin(_Base):
    """Mixed in before a dense configuration; see `BertMoeConfig` for the form.

    Args:
        num_experts: experts a layer, at least 2.
        num_experts_per_tok: experts that each token is sent to, from 1 to `num_experts`.
        moe_layers: indices of the layers whose feed-forward network is a mixture; `None` means all of them.
        moe_intermediate_size: inner width of one expert; `None` means the dense network's.
        shared_expert_intermediate_size: inner width of the expert that every token visits; 0 means there is none.
        expert_rank: rank of the matrices by which experts differ from one network that they share (see
            `LowRankExperts`); 0 means that every expert is a network of its own.
        norm_topk_prob: whether the chosen gates are rescaled to sum to 1.
        router_type: how experts are chosen: "softmax", "sigmoid", "noisy", "top_p", "expert_choice" or "laplace"
            (see `moe_router_kinds.ROUTERS`).
        router_top_p: of "top_p": a token visits the fewest experts whose probabilities sum to this.
        router_capacity_factor: of "expert_choice": experts that a token visits on average.
        router_bias_update_rate: of "sigmoid": by how much `update_router_bias` moves the selection bias; 0: it stays.
        router_group_size: how many experts in a row are taken or left together; `num_experts_per_tok` counts experts.
        disabled_experts: layer, as a string -> experts of it that no token is sent to, as if they were not there.
        router_detach_normalizer: whether the sum that gates are divided by gets no gradient.
        router_aux_loss_coef: weight of the load-balancing loss, which is added to `loss` while training.
        router_aux_loss_scope: whose tokens that loss balances: those of a process ("micro_batch") or of all processes
            ("global_batch").
        router_z_loss_coef: weight of the router z-loss, likewise.
        router_entropy_coef: weight of the router's entropy, likewise; positive makes it surer, negative less sure.
        router_jitter_noise: half-width of the uniform noise that multiplies the router's input while training.
        output_router_logits: whether forward passes return `router_logits`, `aux_loss`, `z_loss` and `router_entropy`.
        upcycled_from: the dense checkpoint this model was made from: `source`, `revision`, `sha256` (file -> digest).
        fused_from: the same of each checkpoint whose networks the experts are, where they are not its own.

    Raises:
        ValueError: where a value is impossible, in a sentence (wrapped by `strict` configurations).
    """

    if TYPE_CHECKING:
        num_hidden_layers: int
        intermediate_size: Any  # None in some families: a multiple of the hidden size

    # A family fills these in.
    modeling_module: ClassVar[str]
    auto_classes: ClassVar[dict[str, str]]
    # Where a mixture stands in the body, `*` for the layer's index.
    moe_block: ClassVar[str] = "layers.*.mlp"

    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "router_logits",
        "aux_loss",
        "z_loss",
        "router_entropy",
    ]

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_layers: list[int] | None = None
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int = 0
    expert_rank: int = 0
    norm_topk_prob: bool = True
    router_type: str = "softmax"
    router_top_p: float | int = 0.4
    router_capacity_factor: float | int = 2.0
    router_bias_update_rate: float | int = 0.001
    router_group_size: int = 1
    disabled_experts: dict[str, list[int]] | None = None
    router_detach_normalizer: bool = False
    router_aux_loss_coef: float | int = 0.001
    router_aux_loss_scope: str = "micro_batch"
    router_z_loss_coef: float | int = 0.0
    router_entropy_coef: float | int = 0.0
    router_jitter_noise: float | int = 0.0
    output_router_logits: bool = False
    upcycled_from: dict[str, Any] | None = None
    fused_from: list[dict[str, Any]] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.dense_intermediate_size

    @property
    def dense_intermediate_size(self) -> int:
        """Inner width of the family's dense feed-forward network."""
        return self.intermediate_size

    @property
    def moe_layer_indices(self) -> list[int]:
        """The layers that are mixtures, in order."""
        return list(range(self.num_hidden_layers)) if self.moe_layers is None else sorted(self.moe_layers)

    def _ep_rules(self) -> dict[str, str]:
        """Expert parallelism: each process holds some of the experts, whole, and tokens travel to them. There is none
        of experts of low rank, whose network is that of all.

        This plan and those below name what *can* stand in a body; `MoePreTrainedModelMixin` leaves out what does not.
        """
        if self.expert_rank:
            return {}
        experts = f"{self.moe_block}.experts"
        return {**{f"{experts}.{name}": "grouped_gemm" for name in EXPERT_TENSORS}, experts: "ep_dispatch_experts"}

    def _tp_rules(self) -> dict[str, str] | None:
        """Tensor parallelism: the dense family's, where it has one, and the experts' neurons dealt out as well where
        experts have no biases (one after the cut would be added once a process). Elsewhere experts stay whole."""
        dense = super().base_model_tp_plan
        if dense is None:
            return None
        shared = f"{self.moe_block}.shared_expert"
        plan = {**dense, **{f"{shared}.{name}": style for name, style in _CUT.items()}}
        biased = getattr(self, "mlp_bias", False)
        if f"{self.moe_block}.gate_proj" in dense and not biased and not self.expert_rank:
            experts = f"{self.moe_block}.experts"
            plan |= {f"{experts}.gate_up_proj": "packed_colwise", f"{experts}.down_proj": "rowwise"}
            plan[experts] = "moe_tp_experts"
        return plan

    def _fsdp_rules(self) -> dict[str, str]:
        """Fully sharded data parallelism: weights are gathered layer by layer."""
        layer = self.moe_block[: self.moe_block.index("*") + 1]
        return {**super().base_model_fsdp_plan, layer: "free_full_weight"}

    # Transformers' names; plain attributes there, so that a family's own would be in the way of properties.
    base_model_ep_plan: ClassVar[Any] = property(_ep_rules)
    base_model_tp_plan: ClassVar[Any] = property(_tp_rules)
    base_model_fsdp_plan: ClassVar[Any] = property(_fsdp_rules)

    def validate_moe(self):
        """Refuses impossible values; run by `strict` when a configuration is made and when it is saved."""
        if self.num_experts < 2:
            raise ValueError(f"num_experts is {self.num_experts}, but a mixture needs at least 2 experts.")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but it must lie between 1 and "
                f"num_experts ({self.num_experts})."
            )
        if self.moe_intermediate_size is not None and self.moe_intermediate_size < 1:
            raise ValueError(f"moe_intermediate_size is {self.moe_intermediate_size}, but it must be at least 1.")
        if self.shared_expert_intermediate_size < 0:
            raise ValueError(
                f"shared_expert_intermediate_size is {self.shared_expert_intermediate_size}; it can't be negative."
            )
        if self.expert_rank < 0:
            raise ValueError(f"expert_rank is {self.expert_rank}; it can't be negative.")
        check_router(self)
        self._validate_moe_layers()

    def _validate_moe_layers(self):
        if self.moe_layers is None:
            return
        if not self.moe_layers:
            raise ValueError("moe_layers is empty: name at least one layer, or leave it None for all of them.")
        if len(set(self.moe_layers)) != len(self.moe_layers):
            raise ValueError(f"moe_layers names a layer twice: {self.moe_layers}.")
        outside = [layer for layer in self.moe_layers if not 0 <= layer < self.num_hidden_layers]
        if outside:
            raise ValueError(
                f"moe_layers names {outside}, but the model's layers are 0 to {self.num_hidden_layers - 1}."
            )

    def to_dict(self) -> dict[str, Any]:
        """As the dense configuration's, always with the full `auto_map`.

        `AutoConfig` goes through the modeling file too: then configuration and model are imported from one folder of
        the module cache, and the configuration class exists once.
        """
        auto_map = {auto: f"{self.modeling_module}.{name}" for auto, name in self.auto_classes.items()}
        auto_map["AutoConfig"] = f"{self.modeling_module}.{type(self).__name__}"
        return {**super().to_dict(), "auto_map": auto_map}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As the dense configuration's, with the code that loads it copied beside it."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.save_code(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def code_files(cls) -> list[Path]:
        """The source files that a checkpoint of this family carries, from wherever this class was imported."""
        module_file = sys.modules[cls.__module__].__file__
        modeling_file = Path(str(module_file)).with_name(f"{cls.modeling_module}.py")
        return [modeling_file, *sorted(Path(file) for file in get_relative_import_files(modeling_file))]

    @classmethod
    def save_code(cls, save_directory) -> None:
        """Copies `code_files` into `save_directory`."""
        for file in cls.code_files():
            shutil.copyfile(file, Path(save_directory) / file.name)
