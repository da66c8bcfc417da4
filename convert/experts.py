"""How expert weights are made from the dense network's."""

import torch


def copy_expert(weight: torch.Tensor, noise_std: float, generator: torch.Generator) -> torch.Tensor:
    """One expert's matrix or bias: a copy of the dense `weight`, matrices with noise if asked.

    Exact for `noise_std` 0: with gates that sum to 1, Σ g·f(x) = f(x) (Komatsuzaki et al. 2022, arXiv 2212.05055,
    section 3). Not preserving otherwise.

    Args:
        weight: (out, in) or (out,).
        noise_std: in units of the matrix's own standard deviation; biases stay as they are.
        generator: source of the noise.
    """
    if noise_std == 0 or weight.ndim < 2:
        return weight
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    noise = torch.randn(exact.shape, dtype=exact.dtype, generator=generator)
    return (exact + noise * (exact.std() * noise_std)).to(weight.dtype)
