"""How far a mixture's experts have drifted apart: the cosine between their weights, read in pieces."""

import torch

from .mixture import Mixture

READ_BYTES = 64 * 2**20  # of all experts of a layer together


def expert_similarity(mixture: Mixture) -> dict[int, float]:
    """Layer -> mean cosine between the weights of two experts, over all pairs.

    1.0: they are copies still; near 0: they have nothing in common. Biases are left out. Experts that are parts of a
    network (`split`, `granularity`) were never copies. Memory is bounded by `READ_BYTES`.
    """
    return {layer: mean_cosine(gram(mixture, layer)) for layer in mixture.layers}


def gram(mixture: Mixture, layer: int) -> torch.Tensor:
    """(E, E), float64: products of the experts' weights, all matrices of one in a row."""
    experts = range(mixture.num_experts)
    total = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for role in mixture.roles:
        held = [
            mixture.projection_pieces(layer, role, "weight", expert, READ_BYTES // (4 * len(experts)))
            for expert in experts
        ]
        for pieces in zip(*held, strict=True):
            rows = torch.stack(pieces).double()
            total += rows @ rows.T
    return total


def mean_cosine(gram_EE: torch.Tensor) -> float:
    """Mean of the cosines off the diagonal; an expert of zeros is like no other."""
    size = gram_EE.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    cosines = gram_EE / size[:, None] / size
    apart = ~torch.eye(len(gram_EE), dtype=torch.bool)
    return cosines[apart].mean().item()
