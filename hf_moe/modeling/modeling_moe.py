"""What every Mixture-of-Experts model shares: how a dense class is built with our layers, and the router's losses.

A family subclasses its dense classes. A head is two lines:

    class BertMoeForMaskedLM(BertMoePreTrainedModel, BertForMaskedLM):
        __init__ = rebind(BertForMaskedLM.__init__, BertModel=BertMoeModel)
        forward = head_forward(BertForMaskedLM.forward, MoeMaskedLMOutput)
"""

import dis
import functools
import inspect
import re
import types
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import ModelOutput, logging
from transformers.utils.output_capturing import OutputRecorder, capture_outputs, maybe_install_capturing_hooks

from .moe_artefact import opening_artefacts
from .moe_balancing import move_selection_bias
from .moe_experts import MoeExperts
from .moe_layers import MoeBlock
from .moe_losses import load_balancing_loss, mean_over_processes, refuse_nonfinite, router_entropy, router_z_loss
from .moe_low_rank import LowRankExperts
from .moe_outputs import RouterOutput
from .moe_routers import TopKRouter
from .moe_sorted_mm import SORTED_MM
from .moe_state import RouterState, checkpointed, hand_down, take_back

logger = logging.get_logger(__name__)


def rebind(constructor: Callable, **classes: Any) -> Callable:
    """The dense `constructor`, seeing `classes` where its own module has the dense classes of those names.

    Nothing is patched: the copy has its own globals, so dense models built meanwhile, in any thread, stay dense.

    Raises:
        ImportError: where the constructor does not use one of the names, so that a new release of Transformers
            can't leave a dense part inside a mixture unnoticed.
    """
    missing = sorted(set(classes) - _names_used(constructor.__code__))
    if missing:
        raise ImportError(
            f"{constructor.__qualname__} of the installed Transformers does not build {', '.join(missing)}: "
            "this version of the model code does not fit it."
        )
    copy = types.FunctionType(
        constructor.__code__,
        {**constructor.__globals__, **classes},
        constructor.__name__,
        constructor.__defaults__,
        constructor.__closure__,
    )
    copy.__kwdefaults__ = constructor.__kwdefaults__
    return functools.update_wrapper(copy, constructor)


def _names_used(code: types.CodeType) -> set[str]:
    """Global names that `code` looks up, comprehensions inside it included."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = [_names_used(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return names.union(*inner)


def auto_model_of(body_class: type[PreTrainedModel]) -> types.SimpleNamespace:
    """Stands for `AutoModel` in constructors that ask it for their body: a checkpoint's code is unknown to it."""
    return types.SimpleNamespace(from_config=body_class)


def body_forward(dense_forward: Callable, output_class: type[ModelOutput]) -> Callable:
    """The dense body's `forward`, returning `router_logits` and filling a head's `router_state`.

    `router_logits` come from Transformers' own output capturing (`_can_record_outputs`): a tuple with one (T, E)
    tensor a mixture layer, T = batch · sequence, before the softmax.
    """
    names = _positional_names(dense_forward)

    @functools.wraps(dense_forward)
    def forward(self, *args, router_state: RouterState | None = None, **kwargs):
        kwargs.update(_named(names, args))
        return_dict = kwargs.pop("return_dict", None)
        if router_state is not None:
            kwargs["output_router_logits"] = kwargs["output_router_index"] = True
            _install_capturing(self)
        told = hand_down(self, kwargs.get("attention_mask"))
        try:
            outputs = dict(dense_forward(self, **kwargs, return_dict=True).items())
        finally:
            take_back(told)
        if router_state is not None:
            router_state.router_logits = outputs["router_logits"]
            router_state.router_index = outputs.pop("router_index")
            router_state.find_mask(self, kwargs.get("attention_mask"))
        return _as_requested(self, output_class(**outputs), return_dict)

    return _own(forward, dense_forward, output_class)


def head_forward(dense_forward: Callable, output_class: type[ModelOutput]) -> Callable:
    """The dense head's `forward`, adding the weighted auxiliary losses to `loss` and returning them.

    Extra keyword arguments: `output_router_logits` (default: the configuration's), which makes the outputs carry
    `router_logits`, `aux_loss`, `z_loss` and `router_entropy`; and `num_items_in_batch`, the number of labels in the
    whole optimizer step as Trainer counts it, by which the loss is then normalised, auxiliary part included.
    While training the losses are always computed, returned, and added to `loss`. In evaluation `loss` is the task's
    alone, so that it compares with a dense model's.

    A body whose layers stand in a model of its own takes this as well: it then hands a head's `router_state` through.
    """
    names = _positional_names(dense_forward)

    @functools.wraps(dense_forward)
    def forward(
        self,
        *args,
        output_router_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        router_state: RouterState | None = None,
        **kwargs,
    ):
        kwargs.update(_named(names, args))
        return_dict = kwargs.pop("return_dict", None)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        on_top = router_state is None
        if on_top and (output_router_logits or self.training):
            router_state = RouterState()
        outputs = dict(dense_forward(self, **kwargs, router_state=router_state, return_dict=True).items())

        if router_state is not None and router_state.token_mask is None:  # the mask ended above the layers
            router_state.find_mask(self, kwargs.get("attention_mask"))
        if router_state is not None and on_top:
            outputs |= self._router_losses(router_state)
            if output_router_logits:
                outputs["router_logits"] = router_state.router_logits
        if "loss" in outputs:
            outputs["loss"] = self._total_loss(outputs, kwargs, num_items_in_batch)
        return _as_requested(self, output_class(**outputs), return_dict)

    return _own(forward, dense_forward, output_class)


def capturing(dense_forward: Callable) -> Callable:
    """For `body_forward`: the `forward` of a dense body from before Transformers' output capturing, with it."""

    @functools.wraps(dense_forward)
    def forward(self, **kwargs):
        return dense_forward(self, **kwargs, return_dict=True)

    return capture_outputs(forward)


def handing_on(dense_forward: Callable) -> Callable:
    """For `head_forward`: the `forward` of a dense head that keeps keyword arguments from its body, handing on the
    one that matters."""

    @functools.wraps(dense_forward)
    def forward(self, *, router_state: RouterState | None, **kwargs):
        return dense_forward(_HandingOn(self, router_state), **kwargs)

    return forward


class _HandingOn:
    """Stands for a head in its dense `forward`; its body gets `router_state` with every call."""

    def __init__(self, model, router_state: RouterState | None):
        self._model, self._router_state = model, router_state

    def __getattr__(self, name):
        value = getattr(self._model, name)
        if value is self._model.base_model:
            return functools.partial(value, router_state=self._router_state)
        return value


def _own(forward: Callable, dense_forward: Callable, output_class: type[ModelOutput]) -> Callable:
    """Gives a wrapper annotations of its own (`functools.wraps` shares the dense ones), and a code object of its own:
    torch.compile counts recompilations by code object, and these would count for all models together."""
    forward.__annotations__ = {**dense_forward.__annotations__, "return": tuple | output_class}
    forward.__code__ = forward.__code__.replace(co_qualname=dense_forward.__qualname__)
    return forward


def _positional_names(forward: Callable) -> tuple[str, ...]:
    """Read at import: torch.compile can't trace signatures."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def _named(names: tuple[str, ...], args: tuple) -> dict[str, Any]:
    if len(args) > len(names):
        raise TypeError(f"forward() takes at most {len(names)} positional arguments, but {len(args)} were given")
    return dict(zip(names, args, strict=False))


@torch.compiler.assume_constant_result
def _install_capturing(model) -> bool:
    """Transformers installs its hooks at the first forward that asks for them, behind a lock that torch.compile can't
    enter; done here, a model compiles before its first step too."""
    maybe_install_capturing_hooks(model)
    return True


def _as_requested(model, outputs: ModelOutput, return_dict: bool | None):
    """A tuple, or `outputs`; what is exported names their class, so there it is the dense one, which is read without
    this code, unless the router's fields are wanted."""
    if return_dict is None:
        return_dict = model.config.return_dict
    if _is_exporting() and outputs.keys().isdisjoint(RouterOutput.__dataclass_fields__):
        outputs = type(outputs).__bases__[1](**outputs)
    return outputs if return_dict else outputs.to_tuple()


def _is_exporting() -> bool:
    """(For torch 2.10, torch.compile exports as well.)"""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


class MoeChunkLayerMixin:
    """Mixed in before a layer of BERT's form (`intermediate`, then `output` with norm, dropout and residual).

    LayerNorm, dropout and residual stay in `output`, outside the mixture: BERT normalises after the sum.
    """

    intermediate: Any
    output: Any
    mlp: Any

    def __init__(self, config, layer_idx=None):
        super().__init__(config, layer_idx=layer_idx)  # type: ignore[call-arg]
        self.is_moe = layer_idx in config.moe_layer_indices
        if self.is_moe:
            del self.intermediate
            self.output.dense = nn.Identity()
            self.mlp = MoeBlock(config, hidden_act=config.hidden_act)
            self.chunk_size_feed_forward = 0  # one router call a layer, or logits and mask fall out of step

    def feed_forward_chunk(self, attention_output):
        if not self.is_moe:
            return super().feed_forward_chunk(attention_output)  # type: ignore[misc]
        return self.output(self.mlp(attention_output), attention_output)


if TYPE_CHECKING:
    _Base = PreTrainedModel  # what the mixin is mixed into
else:
    _Base = object


class MoePreTrainedModelMixin(_Base):
    """Mixed in before a family's dense `…PreTrainedModel`."""

    # The loss is normalised by `num_items_in_batch` in every head, which the dense heads do only in part.
    accepts_loss_kwargs = True

    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    # Set by the hf_moe package: conversion does not travel with a checkpoint.
    from_dense: ClassVar[Any]

    def __init_subclass__(cls, **kwargs):
        """Every class records what the dense classes it is made of record, and its routers' logits."""
        super().__init_subclass__(**kwargs)
        recorded: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            recorded |= vars(base).get("_can_record_outputs") or {}
        recorded["router_logits"] = OutputRecorder(TopKRouter, index=0)
        recorded["router_index"] = OutputRecorder(TopKRouter, index=2)  # for the losses; no output has it
        cls._can_record_outputs = recorded

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Transformers would look for the decorator in this class's own file; ours is in moe_experts.py."""
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """`sorted_mm` where nobody asks for another."""
        return super().get_correct_experts_implementation(
            SORTED_MM if requested_experts is None else requested_experts
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As Transformers'; of what holds single experts only (`experts.safetensors`), the base is fetched too."""
        load = super().from_pretrained
        return opening_artefacts(load, cls, pretrained_model_name_or_path, model_args, kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel") -> None:
        """Nothing is left to note: the configuration saves every class's name and code with each checkpoint. (Told to
        do so, Transformers saves what a model's class is at that moment, which under FSDP is torch's.)"""

    def init_parallel_plans(self) -> None:
        """As Transformers', without the rules for what this model does not have, of which it would warn."""
        super().init_parallel_plans()
        named: Any = chain(self.named_modules(), self.named_parameters())
        held = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in named}
        for name in ("_tp_plan", "_ep_plan", "_fsdp_plan"):
            setattr(self, name, {rule: style for rule, style in getattr(self, name).items() if rule in held})

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict, distributed_config, **kwargs) -> dict:
        """As Transformers', each tied weight once: put together, tied tensors are no longer seen to be one."""
        gathered = super().gather_sharded_state_dict_for_save(model_to_save, state_dict, distributed_config, **kwargs)
        if distributed_config is None:
            return gathered
        tied = model_to_save.all_tied_weights_keys
        return {name: tensor for name, tensor in gathered.items() if tied.get(name) not in gathered}

    def _initialize_weights(self, module, is_custom_code: bool = False):
        """Every rule of ours uses `transformers.initialization`, so loaded weights are safe; without this, rules on
        modules without parameters of their own (GPT-2's scaled `c_proj`) would not run for remote code."""
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = getattr(self.config, "initializer_range", None) or getattr(self.config, "init_std", None) or 0.02
        if isinstance(module, TopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.noise_weight is not None:
                init.zeros_(module.noise_weight)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, MoeExperts | LowRankExperts):
            for name, parameter in module.named_parameters():
                if name.endswith(("_bias", "_b")):
                    init.zeros_(parameter)
                elif name.endswith("_a"):
                    init.normal_(parameter, mean=0.0, std=parameter.shape[-1] ** -0.5)
                else:
                    init.normal_(parameter, mean=0.0, std=std)

    def token_mask(self, attention_mask: Any, num_tokens: int) -> torch.Tensor | None:
        """Which of the `num_tokens` that the routers see are real, (T,): the mask's last columns (a cached mask is
        longer than the tokens), flattened. A body whose mask counts something else than its tokens overrides this.

        None where the mask says nothing about single tokens (a 4-D mask of additive values, say).
        """
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim > 3:
            return None
        rows = attention_mask.reshape(-1, attention_mask.shape[-1])
        rows = rows[:, -(num_tokens // max(1, rows.shape[0])) :]
        return rows.reshape(-1) != 0 if rows.numel() == num_tokens else None

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs=None, every_n_layers: int = 1, offload: bool = False
    ):
        """As Transformers', with a warning where the router's losses would lose their gradient."""
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            logger.warning_once(
                "The router's losses get no gradient: reentrant checkpointing hides the router from them. Leave "
                "`use_reentrant` at False, which is the default."
            )
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ):
        func = functools.partial(checkpointed, self, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, func, every_n_layers)

    def update_router_bias(self) -> None:
        """Loss-free balancing, once an optimizer step: every expert that got fewer tokens than the mean since the last
        call becomes easier to choose by `router_bias_update_rate`, every other harder. Padding does not count;
        processes count together, and all of them must call this.

        Raises:
            ValueError: where the routers have no selection bias.
        """
        routers = [m for m in self.modules() if isinstance(m, TopKRouter) and m.kind.has_selection_bias]
        if not routers:
            raise ValueError(
                f"update_router_bias: router_type {self.config.router_type!r} has no selection bias; 'sigmoid' has."
            )
        move_selection_bias(routers, self.config.router_bias_update_rate)

    def post_init(self):
        blocks, layers = [m for m in self.modules() if isinstance(m, MoeBlock)], self.config.moe_layer_indices
        if len(blocks) != len(layers):
            raise ImportError(
                f"{type(self).__name__} was built with {len(blocks)} mixture layers, not {len(layers)}: "
                "this version of the model code does not fit the installed Transformers."
            )
        for block, layer in zip(blocks, layers, strict=True):
            block.gate.disabled = tuple((self.config.disabled_experts or {}).get(str(layer), ()))
        if isinstance(self, GenerationMixin):
            if self.config.router_type == "expert_choice":
                raise ValueError(
                    f"router_type 'expert_choice' does not fit {type(self).__name__}, which generates: experts choose "
                    "among all tokens of the batch, which would leak the future."
                )
            self.loss_type = "ForCausalLM"  # Transformers reads it off the class name, which says LMHeadModel here
        super().post_init()

    @property
    def _loss_is_a_sum(self) -> bool:
        """Whether the head's loss is a sum over the batch, whose parts need no weights."""
        return False

    def _router_losses(self, state: RouterState) -> dict[str, torch.Tensor]:
        """What the routers' losses are, unweighted; all of the routers' own kind.

        Raises:
            FloatingPointError: where a router's logits are NaN or Inf. (A compiled model can't look.)
        """
        config, logits, mask = self.config, state.router_logits, state.token_mask
        if not torch.compiler.is_compiling():
            refuse_nonfinite(logits, config.moe_layer_indices, mask)
        return {
            "aux_loss": load_balancing_loss(
                logits,
                config.num_experts_per_tok,
                mask,
                router_index=state.router_index,
                router_type=config.router_type,
                over_processes=self.training and config.router_aux_loss_scope == "global_batch",
            ),
            "z_loss": router_z_loss(logits, mask),
            "router_entropy": router_entropy(logits, mask, router_type=config.router_type),
        }

    def _total_loss(self, outputs: dict, inputs: dict, num_items_in_batch) -> torch.Tensor:
        """The task's mean loss, plus the weighted auxiliary losses while training, as a share of the whole batch."""
        loss = outputs["loss"]
        balance = auxiliary = torch.zeros_like(loss)
        if self.training:
            balance = self.config.router_aux_loss_coef * outputs["aux_loss"].to(loss.device)
            auxiliary = auxiliary + self.config.router_z_loss_coef * outputs["z_loss"].to(loss.device)
            auxiliary = auxiliary + self.config.router_entropy_coef * outputs["router_entropy"].to(loss.device)
        shifted = inputs.get("shift_labels")
        labels = inputs.get("labels") if shifted is None else shifted
        if num_items_in_batch is None or labels is None:
            return loss + balance + auxiliary
        if shifted is None and LOSS_MAPPING.get(self.loss_type) is ForCausalLMLoss:
            labels = labels[..., 1:]
        num_labels = labels.ne(-100).sum().to(loss.device)  # as Trainer counts `num_items_in_batch`
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        share = num_labels / num_items_in_batch
        if not self._loss_is_a_sum:
            # a batch whose labels are all ignored has a mean of 0/0: it counts nothing
            loss = torch.where(num_labels > 0, loss, 0.0) * share
        return loss + balance * self.balance_share(share) + auxiliary * share

    def balance_share(self, share: torch.Tensor) -> torch.Tensor:
        """What the load-balancing loss counts in a step of which this batch has `share` of the labels: over all
        processes it is their mean, so none of them may count more than another for having more labels."""
        if self.training and self.config.router_aux_loss_scope == "global_batch":
            return mean_over_processes(share)
        return share
