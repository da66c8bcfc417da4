"""How router weights are made."""

import torch


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


def tied(rows_RD: torch.Tensor, group_size: int) -> torch.Tensor:
    """Each row for `group_size` experts in a row: a group's logits are equal, so top-k takes it whole."""
    return rows_RD.repeat_interleave(group_size, dim=0)
