"""A recipe in numbers: who holds which share of the dense network, how it is scaled, and whether that is exact.

Written for one network f(x) = W2·φ(W1·x + b1) + b2 of F inner neurons (gated ones alike), E experts of which a token
visits K, and gates g that are renormalised to sum to 1, or not. Nobody passes a scale by hand.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

from hf_moe.errors import UsageError
from hf_moe.modeling import MoeConfigMixin
from hf_moe.recipe import UpcycleRecipe

EXACT = "exact"
EXACT_IF = "exact if"
NOT_PRESERVING = "not preserving"

# Deviation of the logits where they should be equal: enough to break ties in every dtype.
TIE_STD = 1e-4

# Kinds of router by which tokens visit different numbers of experts; `num_experts_per_tok` says nothing to them.
VARIABLE = ("top_p", "expert_choice")

# Half a unit in the last place: how far rounding moves a weight at most, relative to it.
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class Exactness:
    """Whether the start is the dense function.

    Args:
        kind: `EXACT`, `EXACT_IF` or `NOT_PRESERVING`.
        reasons: what it depends on, or what changes the function.
        expected_error: of a feed-forward network's output, root mean square, relative; neurons are taken to
            contribute independently. 0 where exact, None where nothing is known of it.
    """

    kind: str = EXACT
    reasons: tuple[str, ...] = ()
    expected_error: float | None = 0.0

    def __str__(self) -> str:
        if self.kind == EXACT:
            return EXACT
        joined = "; ".join(self.reasons)
        head = f"exact if {joined}" if self.kind == EXACT_IF else f"not preserving: {joined}"
        if self.expected_error is None:
            return head
        return f"{head} (expected relative error of a feed-forward network: {self.expected_error:.1e})"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Args:
    parts: into how many parts the routed neurons are dealt; expert e holds part e % parts.
    expert_width, shared_width: neurons of one expert, and of the shared one (0: there is none).
    shared_is_copy: whether the shared expert is the whole network, weighted, and not the neurons the others lack.
    down_scale, bias_scale: what W2 and b2 of every expert are multiplied by; W1 and b1 never are.
    shared_down_scale, shared_bias_scale: the same for the shared expert.
    exactness: what follows.
    """

    parts: int
    expert_width: int
    shared_width: int
    shared_is_copy: bool
    down_scale: float
    bias_scale: float
    shared_down_scale: float
    shared_bias_scale: float
    exactness: Exactness


def scheme_of(recipe: UpcycleRecipe, width: int, *, gated: bool, dtype: str) -> Scheme:
    """The scheme by which a network of `width` neurons, stored in `dtype` (torch's word), becomes a mixture.

    Copies: Komatsuzaki et al. 2022 (arXiv 2212.05055). Granular copies, whose G parts each carry G·W2 because they
    share one copy's gate: He et al. 2024 (arXiv 2410.07524, section 3, "virtual groups"). Shared neurons: Dai et al.
    2024 (arXiv 2401.06066). Split: Zhu et al. 2024 (arXiv 2406.16554), with W2 times K, so that the K chosen parts add
    up unweighted.

    Raises:
        UsageError: where the numbers do not fit.
    """
    _check_router(recipe)
    _check_rank(recipe)
    parts = _parts(recipe)
    shared_weight = recipe.shared_expert_weight
    shared_is_copy = shared_weight is not None
    shared_width = width if shared_is_copy else recipe.shared_expert_intermediate_size
    if not 0 <= recipe.shared_expert_intermediate_size < width:
        raise UsageError(
            f"shared_expert_intermediate_size is {recipe.shared_expert_intermediate_size}, but must leave some of the "
            f"network's {width} neurons to the experts; for a whole network as shared expert set shared_expert_weight."
        )
    routed_width = width if shared_is_copy else width - shared_width
    if routed_width % parts:
        what = "granularity" if recipe.method == "copy" else "num_experts"
        raise UsageError(
            f"{what} {parts} does not divide the {routed_width} neurons to be routed; {_near(routed_width, parts)}."
        )
    alike = 1.0 if recipe.norm_topk_prob else recipe.num_experts / recipe.num_experts_per_tok
    routed_weight = 1.0 if shared_weight is None else 1.0 - shared_weight
    together = parts if recipe.method == "copy" else recipe.num_experts_per_tok
    disjoint = shared_width > 0 and not shared_is_copy
    scheme = {
        "down_scale": together * alike * routed_weight,
        "bias_scale": 0.0 if disjoint else alike * routed_weight,
        "shared_down_scale": 1.0 if shared_weight is None else float(shared_weight),
        "shared_bias_scale": 1.0 if shared_weight is None else float(shared_weight),
    }
    return Scheme(
        parts=parts,
        expert_width=routed_width // parts,
        shared_width=shared_width,
        shared_is_copy=shared_is_copy,
        exactness=_exactness(recipe, routed_width / width * routed_weight, gated, dtype, tuple(scheme.values())),
        **scheme,
    )


def behind_sigmoid(scheme: Scheme) -> Scheme:
    """With a shared expert that counts twice, for Qwen2-MoE's sigmoid before it, which is ½ at weights of 0."""
    return replace(
        scheme, shared_down_scale=2 * scheme.shared_down_scale, shared_bias_scale=2 * scheme.shared_bias_scale
    )


def router_logit_std(recipe: UpcycleRecipe) -> float:
    """What the router's logits start with: equal ones (but for ties) where only equal gates are exact."""
    if recipe.router_init == "zero" or (recipe.router_init == "auto" and not recipe.norm_topk_prob):
        return TIE_STD
    return float(recipe.router_logit_std)


def _check_router(recipe: UpcycleRecipe) -> None:
    """What fits a kind of router; the configuration knows their names."""
    kind = recipe.router_type
    if kind != "softmax" and not recipe.norm_topk_prob:
        raise UsageError(
            f"router_type {kind!r} without norm_topk_prob is not planned: what gates sum to would be unknown."
        )
    if kind in VARIABLE and recipe.method == "split":
        raise UsageError(
            f"router_type {kind!r} sends tokens to different numbers of experts, but with method 'split' a token must "
            "visit as many parts as every other; use method 'copy'."
        )


def _check_rank(recipe: UpcycleRecipe) -> None:
    """One copy of the network is all experts': nothing may cut it, or change it for one of them."""
    if recipe.expert_rank < 0:
        raise UsageError(f"expert_rank is {recipe.expert_rank}; it can't be negative.")
    each = {
        "method 'split'": recipe.method == "split",
        "granularity": recipe.granularity != 1,
        "drop_ratio": recipe.drop_ratio > 0,
        "noise_std": recipe.noise_std > 0,
    }
    if recipe.expert_rank and any(each.values()):
        named = ", ".join(name for name, is_set in each.items() if is_set)
        raise UsageError(f"expert_rank keeps one copy of the network for all experts, which rules out {named}.")


def _parts(recipe: UpcycleRecipe) -> int:
    experts, top_k, granularity = recipe.num_experts, recipe.num_experts_per_tok, recipe.granularity
    if granularity < 1:
        raise UsageError(f"granularity is {granularity}, but must be at least 1.")
    if recipe.method == "split":
        if granularity > 1:
            raise UsageError("granularity is for copies; with method 'split' every expert is a part already.")
        return experts
    if experts % granularity:
        raise UsageError(
            f"num_experts {experts} is no multiple of granularity {granularity}: the experts must form whole copies; "
            f"{_multiples(experts, granularity)} would."
        )
    if top_k % granularity:
        raise UsageError(
            f"num_experts_per_tok {top_k} is no multiple of granularity {granularity}: a token must visit whole "
            f"copies; {_multiples(top_k, granularity)} would do."
        )
    return granularity


def _multiples(number: int, factor: int) -> str:
    below = number // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)


def _near(width: int, parts: int) -> str:
    """The divisors of `width` next to `parts`."""
    divisors = [n for n in range(2, width + 1) if width % n == 0]
    below, above = [n for n in divisors if n < parts], [n for n in divisors if n > parts]
    return " or ".join(map(str, (*below[-1:], *above[:1]))) + " would" if divisors else "nothing would"


def _exactness(
    recipe: UpcycleRecipe, routed_share: float, gated: bool, dtype: str, scales: tuple[float, ...]
) -> Exactness:
    """Each cause with its own relative error; independent causes add up as squares."""
    experts, top_k = recipe.num_experts, recipe.num_experts_per_tok
    changes: dict[str, float] = {}
    conditions: dict[str, float] = {}
    if recipe.method == "split" and top_k < experts:
        missing = math.sqrt((1 - top_k / experts) * routed_share)
        changes[f"a token visits {top_k} of {experts} parts of the network"] = missing
    elif recipe.method == "split" or not recipe.norm_topk_prob:
        std = router_logit_std(recipe)
        spread = std * _mean_of_largest(experts, top_k) if recipe.method == "copy" else std
        if std <= TIE_STD:
            conditions[f"all gates were equal (the router's logits differ by {std:g})"] = spread * routed_share
        else:
            changes[f"the router's logits differ by {std:g}, so the gates are not equal"] = spread * routed_share
    if recipe.router_type == "expert_choice":
        missed = (1 - MoeConfigMixin.router_capacity_factor / experts) ** experts
        changes["experts choose tokens, and some tokens are chosen by none"] = math.sqrt(missed) * routed_share
    if recipe.drop_ratio > 0:
        ratio = recipe.drop_ratio
        error = math.sqrt(ratio**2 + ratio * (2 - ratio) / top_k) * math.sqrt(routed_share)
        changes[f"{ratio:g} of every expert's neurons start anew"] = error
    if recipe.noise_std > 0:
        error = recipe.noise_std * math.sqrt((3 if gated else 2) / top_k) * math.sqrt(routed_share)
        changes[f"the experts get noise of {recipe.noise_std:g} deviations"] = error
    inexact = [scale for scale in scales if scale and math.frexp(scale)[0] != 0.5]
    if inexact:
        conditions[f"weights times {inexact[0]:g} were not rounded to {dtype}"] = ROUNDING[dtype] / math.sqrt(3)
    if not changes and not conditions:
        return Exactness()
    error = math.hypot(*changes.values(), *conditions.values())
    if changes:
        return Exactness(NOT_PRESERVING, tuple(changes), error)
    return Exactness(EXACT_IF, tuple(conditions), error)


def _mean_of_largest(count: int, chosen: int) -> float:
    """Mean of the `chosen` largest of `count` standard normals (Blom 1958: the i-th lies at the quantile
    (i - 3/8) / (n + 1/4))."""
    quantiles = [(count - i - 0.375) / (count + 0.25) for i in range(chosen)]
    return sum(NormalDist().inv_cdf(q) for q in quantiles) / chosen
