"""Which neurons of a dense network go together: dealt at random, or by what they have in common.

Letters: F neurons, P parts, N features of a neuron.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ROUNDS = 10


def deal(
    num_neurons: int,
    parts: int,
    shared: int,
    features_FN: torch.Tensor | None,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Deals the neurons into `parts` equal parts, after `shared` of them are set aside.

    Without features at random. With them the strongest (by norm) are set aside, and the rest is clustered, so that
    parts hold neurons that are alike (Zhang et al. 2021, arXiv 2110.01786, section 3.2).

    Returns:
        (P, F / P) indices of the parts' neurons, and the (shared,) indices of those set aside; each row in order.
    """
    if features_FN is None:
        order_F = torch.randperm(num_neurons, generator=generator)
        rest_F, shared_F = order_F[shared:], order_F[:shared]
        parts_PF = rest_F.view(parts, -1)
    else:
        order_F = features_FN.norm(dim=1).argsort(descending=True, stable=True)
        shared_F, rest_F = order_F[:shared], order_F[shared:].sort().values
        parts_PF = rest_F[balanced_kmeans(features_FN[rest_F], parts, generator)]
    return parts_PF.sort(dim=1).values, shared_F.sort().values


def balanced_kmeans(points_FN: torch.Tensor, parts: int, generator: torch.Generator) -> torch.Tensor:
    """Lloyd's rounds with clusters of equal size, on directions: (P, F / P) indices into the points.

    In each round the points choose in order of what a second choice would cost them, and clusters close when full.
    Runs on one thread in float64, so that the result is the same on any number of cores.
    """
    if parts == 1:
        return torch.arange(len(points_FN)).view(1, -1)
    with _one_thread():
        points_FN = torch.nn.functional.normalize(points_FN.double(), dim=1)
        start = torch.randperm(len(points_FN), generator=generator)[:parts]
        centres_PN = points_FN[start]
        chosen_PF = torch.empty(0)
        for _ in range(ROUNDS):
            previous, chosen_PF = chosen_PF, _balanced(points_FN @ centres_PN.T)
            if torch.equal(previous, chosen_PF):
                break
            centres_PN = torch.nn.functional.normalize(points_FN[chosen_PF].mean(dim=1), dim=1)
    return chosen_PF


def _balanced(similarity_FP: torch.Tensor) -> torch.Tensor:
    room = len(similarity_FP) // similarity_FP.shape[1]
    left: list[list[int]] = [[] for _ in range(similarity_FP.shape[1])]
    best = similarity_FP.topk(2, dim=1).values
    turns = (best[:, 0] - best[:, 1]).argsort(descending=True, stable=True)
    wishes = similarity_FP.argsort(dim=1, descending=True, stable=True)[turns].tolist()
    for neuron, wish in zip(turns.tolist(), wishes, strict=True):
        next(left[part] for part in wish if len(left[part]) < room).append(neuron)
    return torch.tensor(left).sort(dim=1).values


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
