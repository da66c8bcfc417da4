"""What a configuration of a router may say; each impossible combination is refused in a sentence."""

import difflib
import math
from typing import Any

ROUTER_TYPES = ("softmax", "sigmoid", "noisy", "top_p", "expert_choice", "laplace")
LOSS_SCOPES = ("micro_batch", "global_batch")


def check_router(config: Any) -> None:
    """Raises ValueError where the router's fields of a `MoeConfigMixin` are impossible."""
    _check_name("router_type", config.router_type, ROUTER_TYPES)
    _check_name("router_aux_loss_scope", config.router_aux_loss_scope, LOSS_SCOPES)
    if not 0 <= config.router_jitter_noise < 1:
        raise ValueError(f"router_jitter_noise is {config.router_jitter_noise}, but it must lie in [0, 1).")
    if not 0 < config.router_top_p <= 1:
        raise ValueError(f"router_top_p is {config.router_top_p}, but it is a probability, above 0 and at most 1.")
    if not 0 < config.router_capacity_factor <= config.num_experts:
        raise ValueError(
            f"router_capacity_factor is {config.router_capacity_factor}, but a token can visit at most all "
            f"{config.num_experts} experts on average, and more than 0."
        )
    if config.router_detach_normalizer and not config.norm_topk_prob:
        raise ValueError("router_detach_normalizer is set, but without norm_topk_prob gates have no normaliser.")
    _check_coefficients(config)
    _check_groups(config)
    _check_disabled(config)
    _check_expert_choice(config)
    _check_scope(config)


def _check_name(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}."
        raise ValueError(f"{field} is {value!r}; {hint}")


def _check_coefficients(config: Any) -> None:
    for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be finite and can't be negative.")
    if not math.isfinite(config.router_entropy_coef):
        raise ValueError(f"router_entropy_coef is {config.router_entropy_coef}; a loss weight is finite.")


def _check_groups(config: Any) -> None:
    size = config.router_group_size
    if size < 1:
        raise ValueError(f"router_group_size is {size}, but must be at least 1.")
    if config.num_experts % size:
        raise ValueError(f"router_group_size {size} does not divide num_experts ({config.num_experts}).")
    if config.num_experts_per_tok % size and config.router_type not in ("top_p", "expert_choice"):
        raise ValueError(
            f"num_experts_per_tok is {config.num_experts_per_tok}, but a token visits whole groups of "
            f"router_group_size {size}: it must be a multiple."
        )


def _check_disabled(config: Any) -> None:
    layers, size = {str(layer) for layer in config.moe_layer_indices}, config.router_group_size
    for layer, experts in (config.disabled_experts or {}).items():
        if layer not in layers:
            raise ValueError(f"disabled_experts names layer {layer}, which is no mixture.")
        if not set(experts) <= set(range(config.num_experts)):
            raise ValueError(
                f"disabled_experts names {experts} of layer {layer}, whose experts are 0 to {config.num_experts - 1}."
            )
        held = set(range(config.num_experts)) - set(experts)
        if any(e // size * size + i not in held for e in held for i in range(size)):
            raise ValueError(
                f"disabled_experts names {experts} of layer {layer}, but {size} in a row are taken or left together "
                "(router_group_size): name all of them."
            )
        if len(held) < max(1, config.num_experts_per_tok):
            raise ValueError(
                f"disabled_experts leaves layer {layer} {len(held)} experts, but a token visits "
                f"{config.num_experts_per_tok} (num_experts_per_tok)."
            )


def _check_expert_choice(config: Any) -> None:
    """A family reads both ways where it has a head for masked tokens; then the configuration says which."""
    if config.router_type != "expert_choice":
        return
    generates = "AutoModelForCausalLM" in config.auto_classes and "AutoModelForMaskedLM" not in config.auto_classes
    if generates or getattr(config, "is_decoder", False):
        raise ValueError(
            f"router_type 'expert_choice' does not fit a {config.model_type} that reads from left to right: experts "
            "choose among all tokens of the batch, so whether one is chosen would depend on later ones and leak the "
            "future. 'top_p' is adaptive without that."
        )


def _check_scope(config: Any) -> None:
    skips = max(getattr(config, name, 0.0) or 0.0 for name in ("layerdrop", "encoder_layerdrop"))
    if config.router_aux_loss_scope == "global_batch" and skips > 0:
        raise ValueError(
            "router_aux_loss_scope 'global_batch' does not fit layers that are skipped at random (layerdrop): "
            "processes would add up different layers."
        )
