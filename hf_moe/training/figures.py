"""What is logged beside Trainer's loss: the routers' losses, tokens, time."""

import time
from typing import Any

import torch
from transformers import TrainerCallback

from .losses import TERMS


class Figures(TrainerCallback):
    """Adds up since the last log, on the device, and is read when Trainer logs.

    A router's loss is weighted as in the loss it is part of (by each micro-batch's share of the step's labels, or
    equally), so that in every log

        loss = task_loss + router_aux_loss_coef · aux_loss + router_z_loss_coef · z_loss + …

    Time runs while training steps do; evaluating and saving do not count.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens = 0  # in this process, since the last log
        self.tokens_seen = 0  # in all processes, from the start to the last log
        self.seconds = 0.0
        self.mark = time.perf_counter()

    def add(self, terms: dict[str, torch.Tensor], weight: float) -> None:
        """The routers' losses of one micro-batch, times its weight in the step."""
        for name, value in terms.items():
            part = value.detach().float() * weight
            self.sums[name] = self.sums[name] + part if name in self.sums else part

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark = time.perf_counter()

    def read(self, accelerator: Any, steps: int) -> dict[str, float]:
        """The figures of the last `steps` steps, over all processes; then they are forgotten. All must call this."""
        names = [name for name in TERMS if name in self.sums]
        row = [self.sums[name] for name in names]
        mine = torch.tensor([float(self.tokens), *map(float, row)], dtype=torch.float64)
        everybody = accelerator.gather(mine.to(accelerator.device)[None]).cpu() if many(accelerator) else mine[None]
        tokens = int(everybody[:, 0].sum())
        means = (everybody[:, 1:].mean(0) / max(steps, 1)).tolist()
        self.tokens_seen += tokens
        speed = {"tokens_per_second": tokens / self.seconds} if self.seconds else {}
        self.sums, self.tokens, self.seconds = {}, 0, 0.0
        return dict(zip(names, means, strict=True)) | speed | {"tokens_seen": self.tokens_seen}

    def state_dict(self) -> dict[str, Any]:
        sums = {name: float(value) for name, value in self.sums.items()}
        return {"sums": sums, "tokens": self.tokens, "tokens_seen": self.tokens_seen, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}
        self.tokens, self.tokens_seen, self.seconds = state["tokens"], state["tokens_seen"], state["seconds"]


def many(accelerator: Any) -> bool:
    """Whether there is more than one process."""
    return accelerator.num_processes > 1
