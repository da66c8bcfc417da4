"""How expert weights are made from a dense network's.

A role is "gate", "up" or "down"; matrices are (out, in), so a neuron is a row of gate and up, and a column of down.
"""

import torch


def take_neurons(weight: torch.Tensor, role: str, neurons: torch.Tensor | None) -> torch.Tensor:
    """A matrix or bias with only these `neurons`, in this order (None: all, as they are)."""
    if neurons is None or (role == "down" and weight.ndim == 1):
        return weight
    return weight[:, neurons] if role == "down" else weight[neurons]


def scaled(weight: torch.Tensor, scale: float) -> torch.Tensor:
    """`weight` times `scale`, rounded once."""
    return weight if scale == 1 else (_wide(weight) * scale).to(weight.dtype)


def with_noise(weight: torch.Tensor, noise_std: float, generator: torch.Generator) -> torch.Tensor:
    """A matrix with normal noise, in units of its own standard deviation; biases stay as they are."""
    if noise_std == 0 or weight.ndim < 2:
        return weight
    wide = _wide(weight)
    noise = torch.randn(wide.shape, dtype=wide.dtype, generator=generator)
    return (wide + noise * (wide.std() * noise_std)).to(weight.dtype)


def dropped_neurons(width: int, ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Which of an expert's neurons start anew: one set for all of its matrices, or half of the neurons would lose
    one matrix and keep the other (Nakamura et al. 2025, arXiv 2502.19261, section 3.1)."""
    return torch.randperm(width, generator=generator)[: round(width * ratio)]


def with_new_neurons(
    weight: torch.Tensor, role: str, dropped: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """The `dropped` neurons drawn anew, normal with mean and standard deviation of what they were (same source)."""
    if len(dropped) == 0 or (role == "down" and weight.ndim == 1):
        return weight
    wide = _wide(weight).clone()
    where = (slice(None), dropped) if role == "down" else (dropped,)
    old = wide[where]
    std = old.std() if old.numel() > 1 else old.new_zeros(())
    wide[where] = torch.randn(old.shape, dtype=wide.dtype, generator=generator) * std + old.mean()
    return wide.to(weight.dtype)


def _wide(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
