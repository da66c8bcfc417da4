"""Routers trained on text for a few steps, with everything else frozen."""

import tempfile
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from hf_moe.errors import SourceError, UsageError
from hf_moe.recipe import FuseRecipe

from .classes import body_of
from .fit import read_passages, token_ids
from .plan import Plan
from .quiet import quiet
from .stream import pieces
from .texts import load_tokenizer

ROWS = 8
STEP = 0.02  # what a step changes at most, in units of the router's own weights
MASKED = 0.15


def train_routers(plan: Plan, recipe: FuseRecipe) -> tuple[dict[int, torch.Tensor], dict[str, Any]]:
    """Rows (E, D) for every mixture layer after `recipe.train_router` steps of Transformers' Trainer, on what the
    experts should get, by the language model's loss (and the load-balancing loss).

    The mixture is built in memory for this, in float32.

    Returns:
        the rows, and `steps`, and the mean losses of the first and the last quarter of them.

    Raises:
        UsageError, SourceError: as `fit.read_passages`; where the model is no language model, or nothing trains.
    """
    name, path = plan.dense_class.__name__, plan.source.checkpoint.path
    masked = name.endswith("ForMaskedLM")
    if not masked and not plan.dense_class.can_generate():
        raise UsageError(f"train_router: needs a language model, which {path} is not ({name}).")
    tokenizer = load_tokenizer(plan.source.checkpoint)
    if masked and tokenizer.mask_token is None:
        raise SourceError(f"{path}: its tokenizer has no mask token, which train_router needs.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    texts = [text for passages in read_passages(recipe) for text in passages.positive]
    rows = [{"input_ids": row} for row in token_ids(plan.source.checkpoint, plan.config, tokenizer, texts)]

    model = build_model(plan)
    routers = {layer: _router_of(model, plan, layer) for layer in plan.networks}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for router in routers.values():
        router.requires_grad_(True)
    groups = [{"params": [router], "lr": STEP * router.square().mean().sqrt().item()} for router in routers.values()]
    with tempfile.TemporaryDirectory(prefix="hf_moe.") as folder, torch.random.fork_rng(), quiet():
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=recipe.train_router,
                per_device_train_batch_size=ROWS,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                dataloader_pin_memory=False,
                disable_tqdm=True,
                log_level="error",
                seed=recipe.seed % 2**32,
            ),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=masked, mlm_probability=MASKED),
            train_dataset=rows,
            optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = {layer: _router_of(model, plan, layer).detach().cpu().to(torch.float32) for layer in plan.networks}
    if not all(bool(rows_ED.isfinite().all()) for rows_ED in trained.values()):
        raise SourceError(f"{path}: training led the routers to NaN or Inf; leave train_router out.")
    part = -(-len(losses) // 4)
    means = {"first_loss": sum(losses[:part]) / part, "last_loss": sum(losses[-part:]) / part}
    return trained, {"steps": recipe.train_router, **means}


def build_model(plan: Plan) -> PreTrainedModel:
    """The mixture that `plan` writes, in memory, in float32."""
    with quiet():
        model = plan.moe_class(plan.config)
    wanted = model.state_dict()
    for tensor in plan.tensors:
        if tensor.name in wanted:
            flat, position = wanted[tensor.name].view(-1), 0
            for piece in pieces(tensor, plan):
                flat[position : position + piece.numel()] = piece.reshape(-1)
                position += piece.numel()
    return model.float()


def _router_of(model: PreTrainedModel, plan: Plan, layer: int) -> torch.nn.Parameter:
    block = body_of(plan.family, model).get_submodule(f"{plan.family.layer.format(layer=layer)}.{plan.family.block}")
    return block.gate.weight  # type: ignore[union-attr, return-value]
