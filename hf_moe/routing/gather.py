"""One pass of a model over batches, and what it tells of its routing."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from .hooks import experts_of, num_experts_of, refusing_nan, watched
from .stats import RoutingStats


@dataclass
class Forward:
    """One batch of B rows of S tokens, and where the model sent them; T is B·S, padding apart.

    Args:
        inputs: what the model was given.
        choices: layer -> (index (T, K), gates (T, K)), on the CPU.
        kept: (B·S,), which are real; None: all.
    """

    inputs: dict[str, torch.Tensor]
    choices: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    kept: torch.Tensor | None = None
    tokens: int = 0

    @property
    def rows(self) -> torch.Tensor:
        """(T,), the row that each token is of."""
        rows = len(next(iter(self.inputs.values())))
        return self._real(torch.arange(rows).repeat_interleave(self.tokens // rows))

    @property
    def ids(self) -> torch.Tensor | None:
        """(T,), token ids; None where the model reads no text."""
        ids = self.inputs.get("input_ids")
        return None if ids is None or ids.numel() != self.tokens else self._real(ids.cpu().flatten())

    def _real(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.kept is None else values[self.kept]


@torch.no_grad()
def forwards(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[Forward]:
    """Runs `batches` in evaluation mode, one at a time.

    Raises:
        SourceError: where a router's logits are NaN, naming the layer. UsageError: where the model is dense.
    """
    seen = Forward({})

    def see(layer, experts, x_TD, index_TK, gates_TK, kept_T) -> None:
        seen.tokens = len(index_TK)
        seen.kept = None if kept_T is None else kept_T.cpu()
        seen.choices[layer] = (seen._real(index_TK.cpu()), seen._real(gates_TK.cpu()))

    training = model.training
    model.eval()
    try:
        with watched(model, see), refusing_nan(model):
            for inputs in batches:
                seen = Forward(inputs)
                model(**inputs)
                yield seen
    finally:
        model.train(training)


def empty_stats(model: nn.Module) -> RoutingStats:
    """With the layers and experts of `model`, and nothing counted."""
    names = experts_of(model)
    return RoutingStats(tuple(names), num_experts_of(model.get_submodule(next(iter(names.values())))))


def gather(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], *, domain: str | None = None) -> RoutingStats:
    """The statistics of `model`, ours or one of Transformers' own mixtures, on `batches`.

    Args:
        batches: inputs of `model`, with `attention_mask` where there is padding.
        domain: what they are of, if that matters; add the statistics of several domains.

    Raises:
        SourceError, UsageError: as in `forwards`.
    """
    stats = empty_stats(model)
    for seen in forwards(model, batches):
        stats.update(seen.choices, ids=seen.ids, rows=seen.rows, domain=domain)
    return stats
