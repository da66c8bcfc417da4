"""How router weights are made: drawn, or fitted to what experts should get.

A router has no bias, so a classifier's offsets go into its rows (`nearest_mean`). Letters: N tokens, D hidden,
E experts.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

PROBE_PENALTY = 0.03
PROBE_ROUNDS = 100
TINY = 1e-12
FLOOR = 1e-9


def calibrated_normal(
    num_experts: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    logit_std: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Normal rows, scaled so that the logits have standard deviation `logit_std` on what the norm puts out.

    A norm puts out x = z·weight + bias, z of unit variance, so a row r gives logits of standard deviation
    ‖r·weight‖ around r·bias. The first is set to `logit_std`: logits neither tied (every token would go to the same
    experts) nor saturated (one expert's gate would be near 1). The second is set to 0 by making r orthogonal to
    the bias, which all tokens share: it would favour the same experts for all of them.

    Args:
        norm_weight, norm_bias: (D,), of the norm before the feed-forward network.

    Returns:
        (num_experts, D), float32.
    """
    weight_D = norm_weight.to(torch.float32)
    bias_D = torch.zeros_like(weight_D) if norm_bias is None else norm_bias.to(torch.float32)
    rows_ED = torch.randn((num_experts, len(weight_D)), generator=generator)
    rows_ED -= (rows_ED @ bias_D)[:, None] * bias_D / bias_D.square().sum().clamp(min=1e-12)
    deviation_E1 = (rows_ED * weight_D).norm(dim=1, keepdim=True)
    return rows_ED * (logit_std / deviation_E1.where(deviation_E1 > 0, 1.0))


def for_distances(rows_ED: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor | None) -> torch.Tensor:
    """Rows for a router of distances (`router_type` "laplace") whose logits deviate as those of `rows_ED` in products.

    -‖x - w‖ ≈ -‖x‖ + w·x/‖x‖ for a w that is short beside x, so w is a row times ‖x‖: what a norm puts out,
    x = z·weight + bias, has mean square ‖weight‖² + ‖bias‖². All rows share the first term, which changes no gate.

    Args:
        rows_ED, norm_weight, norm_bias: as in `calibrated_normal`.
    """
    square = norm_weight.float().square().sum()
    if norm_bias is not None:
        square = square + norm_bias.float().square().sum()
    return rows_ED * square.sqrt()


def tied(rows_RD: torch.Tensor, group_size: int) -> torch.Tensor:
    """Each row for `group_size` experts in a row: a group's logits are equal, so top-k takes it whole."""
    return rows_RD.repeat_interleave(group_size, dim=0)


def spread(rows_ED: torch.Tensor, x_ND: torch.Tensor, logit_std: float) -> torch.Tensor:
    """Rows scaled so that a token's logits have standard deviation `logit_std` over the experts (root mean square
    over tokens): a choice neither arbitrary nor all or nothing. What all rows share changes no gate and is taken
    away, since rounding would make it count."""
    rows_ED = rows_ED - rows_ED.mean(dim=0)
    deviation = logit_deviation(rows_ED, x_ND)
    return rows_ED * (logit_std / deviation) if deviation > 0 else rows_ED


def logit_deviation(rows_ED: torch.Tensor, x_ND: torch.Tensor) -> float:
    """Standard deviation of a token's logits over the experts, root mean square over tokens."""
    logits_NE = x_ND @ rows_ED.T
    return (logits_NE - logits_NE.mean(dim=1, keepdim=True)).square().mean().sqrt().item()


def class_means(x_ND: torch.Tensor, expert_N: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(E, D); 0 for an expert without tokens."""
    sums_ED = torch.zeros(num_experts, x_ND.shape[1], dtype=x_ND.dtype).index_add_(0, expert_N, x_ND)
    return sums_ED / torch.bincount(expert_N, minlength=num_experts).clamp(min=1)[:, None]


def shrunk_covariance(x_ND: torch.Tensor) -> torch.Tensor:
    """Covariance of centred tokens, drawn towards a multiple of the identity as far as their number makes it
    uncertain (Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices")."""
    count, dim = x_ND.shape
    sample_DD = x_ND.T @ x_ND / count
    scale = sample_DD.diagonal().mean().clamp(min=TINY)
    target_DD = scale * torch.eye(dim, dtype=x_ND.dtype)
    floor_DD = FLOOR * target_DD  # where nothing varies, nothing is uncertain
    distance = (sample_DD - target_DD).square().sum()
    error = (x_ND.square().sum(dim=1).square().mean() - sample_DD.square().sum()) / count
    share = (error / distance).clamp(0, 1) if distance > 0 else torch.ones(())
    return share * target_DD + (1 - share) * sample_DD + floor_DD


def nearest_mean(means_ED: torch.Tensor, covariance_DD: torch.Tensor) -> torch.Tensor:
    """Rows whose largest logit is the mean nearest to x, by a covariance that all experts share (Fisher 1936):
    μ·Σ⁻¹·x - ½ μ·Σ⁻¹·μ.

    The second term is an offset b, and a router has none. It becomes b·(v·x), where v·x is as near to 1 as a linear
    function of x can be (least squares): v = Σ⁻¹·m / (1 + m·Σ⁻¹·m), m the mean of the means. After a layer norm with
    a bias v·x is 1 for every x.
    """
    weighted_ED = torch.linalg.solve(covariance_DD, means_ED.T).T
    offsets_E = -(weighted_ED * means_ED).sum(dim=1) / 2
    middle_D = weighted_ED.mean(dim=0)
    constant_D = middle_D / (1 + middle_D @ means_ED.mean(dim=0))
    return weighted_ED + (offsets_E - offsets_E.mean())[:, None] * constant_D


def prompt_direction(x_ND: torch.Tensor, expert_N: torch.Tensor, negative_ED: torch.Tensor) -> torch.Tensor:
    """Mean of what an expert should get, less the mean of what it should not, at length 1."""
    return functional.normalize(class_means(x_ND, expert_N, len(negative_ED)) - negative_ED, dim=1)


def centroid(x_ND: torch.Tensor, expert_N: torch.Tensor, negative_ED: torch.Tensor) -> torch.Tensor:
    """Nearest mean, every direction counting the same."""
    means_ED = class_means(x_ND, expert_N, len(negative_ED))
    variance = (x_ND - means_ED[expert_N]).square().mean().clamp(min=TINY)
    return nearest_mean(means_ED, variance * torch.eye(x_ND.shape[1], dtype=x_ND.dtype))


def lda(x_ND: torch.Tensor, expert_N: torch.Tensor, negative_ED: torch.Tensor) -> torch.Tensor:
    """Linear discriminant analysis: nearest mean, directions counting the less the more the tokens vary in them."""
    means_ED = class_means(x_ND, expert_N, len(negative_ED))
    return nearest_mean(means_ED, shrunk_covariance(x_ND - means_ED[expert_N]))


def probe(x_ND: torch.Tensor, expert_N: torch.Tensor, negative_ED: torch.Tensor) -> torch.Tensor:
    """Logistic regression without an offset, each expert's tokens weighing the same in all, with a penalty on the
    rows in units of each column's deviation (or a hundredth of its size, where it hardly varies)."""
    least_D = 0.01 * x_ND.square().mean(dim=0).sqrt()
    size_D = x_ND.std(dim=0, correction=0).maximum(least_D).clamp(min=TINY)
    z_ND = x_ND / size_D
    weight_E = 1 / torch.bincount(expert_N, minlength=len(negative_ED)).clamp(min=1).to(x_ND.dtype)
    rows_ED = torch.zeros_like(negative_ED, requires_grad=True)
    optimizer = torch.optim.LBFGS([rows_ED], max_iter=PROBE_ROUNDS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(z_ND @ rows_ED.T, expert_N, weight=weight_E)
        value = value + PROBE_PENALTY / 2 * rows_ED.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return rows_ED.detach() / size_D


# gate_mode -> rows (E, D) from inputs (N, D), the expert that each is for, and the mean of what each should not get
GATES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "hidden": prompt_direction,
    "cheap_embed": prompt_direction,
    "centroid": centroid,
    "lda": lda,
    "probe": probe,
}
