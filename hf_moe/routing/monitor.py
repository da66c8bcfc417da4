"""Routing during training: figures beside Trainer's loss, and warnings where a layer collapses or an expert dies."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from . import measures
from .hooks import attach, experts_of, num_experts_of

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(__name__)

COLLAPSED_ENTROPY = 0.5  # normalised: below it a layer counts as collapsed
WINDOW = 3  # logs in a row
ENOUGH = 50  # assignments that would be an expert's fair share; without a single one of so many it is no chance
NAMED = 4  # layers in one warning
REVIVE = "A larger router_aux_loss_coef brings them back; hf-moe prune leaves them out of the trained mixture."
WHAT_TO_TRY = "Raise router_aux_loss_coef (tenfold is a fair step) or lower the learning rate, and start anew."


class RoutingMonitor(TrainerCallback):
    """Logs `routing/max_violation`, `routing/cv`, `routing/entropy` (normalised; the worst layer of each) and
    `routing/dead_experts` (of all layers) with every training loss, from all tokens since the last one.

    Hooks add up on the device, and are read when Trainer logs. Processes are added up; gradient accumulation adds
    up; what gradient checkpointing computes again, padding and evaluation do not count.

        trainer = Trainer(..., callbacks=[RoutingMonitor()])

    Trainer tells its reporters (TensorBoard, W&B) of a log before it tells callbacks that were given so: use
    `RoutingMonitor.join(trainer)` where they should have the figures too.

    Args:
        collapsed_entropy: a layer below this normalised entropy has collapsed; so has one of whose experts more than
            half of those that could be dead are.
        window: for so many logs in a row, before the warning, which comes once. An expert that gets no token for as
            long, while `ENOUGH` would be its fair share, is named, once until it gets one again.
        per_expert: whether reporters are told `load/layer_L/expert_E` too, the share of a layer's assignments that
            each expert got (`loads` holds the last ones). Trainer's history has no room for them.
    """

    def __init__(
        self, *, collapsed_entropy: float = COLLAPSED_ENTROPY, window: int = WINDOW, per_expert: bool = False
    ):
        self.collapsed_entropy = collapsed_entropy
        self.window = window
        self.per_expert = per_expert
        self.loads: dict[int, list[float]] = {}  # layer -> share by expert, as of the last log
        self.warned = False
        self.streak: dict[int, int] = {}
        self.empty: dict[int, torch.Tensor] = {}  # layer -> (2, E): logs in a row without a token, and what is missed
        self.counts: dict[int, torch.Tensor] = {}  # layer -> (E + 2,): by expert, empty slots, tokens
        self.handles: list[Any] = []

    @classmethod
    def join(cls, trainer: "Trainer", **options: Any) -> "RoutingMonitor":
        """Puts a monitor before the other callbacks of `trainer`, so that all of them see its figures."""
        monitor = cls(**options)
        trainer.callback_handler.callbacks.insert(0, monitor)
        return monitor

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Raises UsageError where the model is dense."""
        self.on_train_end(args, state, control)
        self.experts = {layer: num_experts_of(model.get_submodule(name)) for layer, name in experts_of(model).items()}
        self.counts, self.streak, self.empty = {}, dict.fromkeys(self.experts, 0), {}
        self.handles = attach(model, self._see)
        self.model = model

    def on_train_end(self, args, state, control, **kwargs):
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs or not self.handles:
            return
        figures = self._read(args.device)
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)  # Trainer has put its copy there already
        if self.per_expert:
            for layer, shares in self.loads.items():
                logs.update({f"load/layer_{layer}/expert_{expert}": share for expert, share in enumerate(shares)})

    def state_dict(self) -> dict[str, Any]:
        """What this process has counted since the last log, and whether it has warned; JSON-able."""
        counts = {str(layer): held.tolist() for layer, held in self.counts.items()}
        empty = {str(layer): held.tolist() for layer, held in self.empty.items()}
        streak = {str(layer): count for layer, count in self.streak.items()}
        return {"warned": self.warned, "streak": streak, "counts": counts, "empty": empty}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """After training has begun, so that a resumed run goes on counting."""
        self.warned = state["warned"]
        self.streak = {int(layer): count for layer, count in state["streak"].items()}
        self.counts = {int(layer): torch.tensor(held, device=device) for layer, held in state["counts"].items()}
        self.empty = {int(layer): torch.tensor(held).double() for layer, held in state.get("empty", {}).items()}

    def _see(self, layer, experts, x_TD, index_TK, gates_TK, kept_T) -> None:
        if not self.model.training:
            return
        E = self.experts[layer]
        held = self.counts.setdefault(layer, torch.zeros(E + 2, dtype=torch.long, device=index_TK.device))
        real_T = torch.ones_like(index_TK[:, 0]) if kept_T is None else kept_T.to(index_TK.dtype)
        held.scatter_add_(0, index_TK.flatten(), real_T[:, None].expand_as(index_TK).flatten())
        held[E + 1] += real_T.sum()

    def _read(self, device: torch.device) -> dict[str, float]:
        """The figures since the last call, over all processes; none where no mixture ran."""
        width = max(self.experts.values()) + 2
        counts = torch.zeros(len(self.experts), width, dtype=torch.long, device=device)
        for place, layer in enumerate(self.experts):
            if layer in self.counts:
                counts[place, : len(self.counts[layer])] = self.counts[layer].to(device)
                self.counts[layer].zero_()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        return self._figures(counts.cpu())

    def _figures(self, counts: torch.Tensor) -> dict[str, float]:
        rows = {
            layer: (counts[place : place + 1, :E], counts[place : place + 1, E + 1])
            for place, (layer, E) in enumerate(self.experts.items())
            if counts[place, :E].any()
        }
        if not rows:
            return {}
        self.loads = {layer: (row[0] / row[0].sum())[0].tolist() for layer, row in rows.items()}
        entropies = {layer: measures.normalised_entropy(*row).item() for layer, row in rows.items()}
        dead = {layer: int(measures.dead(row[0]).sum()) for layer, row in rows.items()}
        self._alarm(rows, entropies, dead)
        self._name_the_dead({layer: row[0][0] for layer, row in rows.items()})
        return {
            "routing/max_violation": max(measures.max_violation(row[0]).item() for row in rows.values()),
            "routing/cv": max(measures.variation(row[0]).item() for row in rows.values()),
            "routing/entropy": min(entropies.values()),
            "routing/dead_experts": float(sum(dead.values())),
        }

    def _alarm(self, rows: dict[int, Any], entropies: dict[int, float], dead: dict[int, int]) -> None:
        for layer, (counts, tokens) in rows.items():
            could_be_dead = counts.shape[1] - counts.sum().item() / tokens.item()
            collapsed = entropies[layer] < self.collapsed_entropy or 2 * dead[layer] > max(could_be_dead, 1)
            self.streak[layer] = self.streak[layer] + 1 if collapsed else 0
        layers = [layer for layer, count in self.streak.items() if count >= self.window]
        if layers and not self.warned:
            self.warned = True
            if _is_another():
                return  # one process tells
            worst = min(layers, key=lambda layer: entropies.get(layer, 1.0))
            logger.warning(
                f"Routing has collapsed in layer {worst}: {dead.get(worst, 0)} of {self.experts[worst]} experts are "
                f"dead, normalised entropy {entropies.get(worst, 1.0):.2f}"
                f"{f' (and in layers {layers})' if layers[1:] else ''}. {WHAT_TO_TRY}"
            )

    def _name_the_dead(self, counts: dict[int, torch.Tensor]) -> None:
        """Warns of experts that have got no token for long enough, as of this log."""
        found: dict[int, list[int]] = {}
        for layer, counts_E in counts.items():
            before = self.empty.get(layer, torch.zeros(2, len(counts_E), dtype=torch.float64))
            missed = counts_E.sum().item() / len(counts_E)
            after = torch.where(counts_E == 0, before + torch.tensor([[1.0], [missed]]), 0.0)
            self.empty[layer] = after
            if new := (self._long(after) & ~self._long(before)).nonzero().flatten().tolist():
                found[layer] = new
        if found and not _is_another():
            named = [
                f"{'experts' if held[1:] else 'expert'} {', '.join(map(str, held))} in layer {layer}"
                for layer, held in found.items()
            ]
            more = f" and others in {len(named) - NAMED} more layers" if named[NAMED:] else ""
            which = ", ".join(named[:NAMED]) + more
            logger.warning(f"For {self.window} logs or more no token has gone to {which}. {REVIVE}")

    def _long(self, empty: torch.Tensor) -> torch.Tensor:
        return (empty[0] >= self.window) & (empty[1] >= ENOUGH)


def _is_another() -> bool:
    """Whether this process is not the first of several."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0
