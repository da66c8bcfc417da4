"""What Trainer has to do for a router."""

from typing import Any

from transformers import TrainerCallback


class RouterBiasCallback(TrainerCallback):
    """Moves the selection bias of "sigmoid" routers after each optimizer step: `Trainer(…, callbacks=[this()])`.

    Micro-batches of a step, and processes, count together (`update_router_bias`).
    """

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raises ValueError where the model's routers have no selection bias."""
        getattr(model, "module", model).update_router_bias()
