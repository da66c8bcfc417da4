"""Two models on the same inputs: loading, running, and every way their outputs may differ."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from .checkpoint import Checkpoint
from .families import Family
from .quiet import quiet

MAX_TOKENS = 128  # of one text
RANDOM_LENGTHS = (64, 48, 17, 3)
PROMPT_TOKENS = 3
NEW_TOKENS = 64


@dataclass(frozen=True)
class Batch:
    """Token ids and attention mask (B, S), padded on the right."""

    name: str
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


def sample_texts() -> list[str]:
    """Ten sentences of the public domain, of 7 to 60 words."""
    return files("hf_moe.convert").joinpath("sample.txt").read_text(encoding="utf-8").splitlines()


def make_batches(dense: Checkpoint, texts: list[str] | None = None, seed: int = 0) -> tuple[list[Batch], str]:
    """Inputs to compare on: `texts` (default: `sample_texts`), if there is a tokenizer, and random ids.

    Returns:
        the batches, and what became of the texts, in words.
    """
    positions = [dense.config.get(name) for name in ("max_position_embeddings", "n_positions")]
    longest = min(MAX_TOKENS, *(length - 2 for length in positions if length))  # RoBERTa counts them from 2
    generator = torch.Generator().manual_seed(seed)
    random_ids = [
        torch.randint(0, dense.config["vocab_size"], (min(n, longest),), generator=generator).tolist()
        for n in RANDOM_LENGTHS
    ]
    batches = [_pad("random", random_ids)]
    if not dense.has_tokenizer:
        return batches, "none: the source has no tokenizer"
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(dense.path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        return batches, f"none: the source's tokenizer does not load ({type(error).__name__})"
    texts = texts or sample_texts()
    ids = [tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in texts]
    ids = [row for row in ids if row and max(row) < dense.config["vocab_size"]]
    if not ids:
        return batches, "none: the tokenizer's ids do not fit the model's vocabulary"
    return [_pad("text", ids), *batches], f"{len(ids)} texts, {sum(map(len, ids))} tokens"


def _pad(name: str, rows: list[list[int]]) -> Batch:
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return Batch(name, ids, mask)


def load_model(model_class: type[PreTrainedModel], checkpoint: Checkpoint, dtype: str) -> PreTrainedModel:
    """The model of a local checkpoint in `dtype`, in evaluation mode."""
    with quiet():
        model = model_class.from_pretrained(checkpoint.path, dtype=getattr(torch, dtype), local_files_only=True)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0  # some heads refuse a batch without one; the mask is what hides padding
    return model.eval()


@torch.no_grad()
def run_model(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Named float outputs, hidden states as `hidden_states.N`, and the loss on labels made from the inputs."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {name: value.unsqueeze(1) for name, value in inputs.items()}
    outputs = model(**inputs, output_hidden_states=True)
    found = {f"hidden_states.{i}": state for i, state in enumerate(outputs.hidden_states)}
    found |= {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    return {name: value.to(torch.float64) for name, value in found.items() if value.is_floating_point()}


@torch.no_grad()
def generate_greedily(model: PreTrainedModel, batch: Batch) -> list[list[int]]:
    """The first tokens of each row of `batch`, continued greedily by `NEW_TOKENS`, or to the model's last position."""
    prompts = batch.input_ids[:, :PROMPT_TOKENS]
    room = getattr(model.config, "max_position_embeddings", NEW_TOKENS + PROMPT_TOKENS) - PROMPT_TOKENS
    generated = model.generate(  # type: ignore[operator]
        prompts,
        attention_mask=torch.ones_like(prompts),
        generation_config=GenerationConfig(
            max_new_tokens=min(NEW_TOKENS, room), do_sample=False, eos_token_id=None, pad_token_id=0
        ),
    )
    return generated[:, PROMPT_TOKENS:].tolist()


def compare_outputs(dense: dict[str, torch.Tensor], moe: dict[str, torch.Tensor], batch: Batch) -> dict[str, Any]:
    """Differences of each output where the input is no padding; `max_*` over the outputs, hidden states apart."""
    outputs: dict[str, dict[str, float]] = {}
    hidden: list[dict[str, float]] = []
    for name, value in dense.items():
        difference = difference_of(unpadded(value, batch), unpadded(moe[name], batch))
        if name.startswith("hidden_states."):
            hidden.append(difference)
        else:
            outputs[name] = difference
    result: dict[str, Any] = {
        "max_abs": max(d["max_abs"] for d in outputs.values()),
        "max_rel": max(d["max_rel"] for d in outputs.values()),
        "outputs": outputs,
        "hidden_states": hidden,
    }
    logits = next((name for name in ("logits", "prediction_logits") if name in dense), None)
    one_each = logits is not None and dense[logits].shape == batch.attention_mask.shape  # ELECTRA's discriminator
    if logits is not None and dense[logits].shape[-1] > 1 and not one_each:
        result |= _likelihoods(dense[logits], moe[logits], batch)
    return result


def unpadded(value: torch.Tensor, batch: Batch) -> torch.Tensor:
    """What belongs to tokens, of a (B, S, …) tensor; any other is returned whole."""
    if value.shape[:2] == batch.attention_mask.shape:
        return value[batch.attention_mask.bool()]
    return value


def difference_of(dense: torch.Tensor, moe: torch.Tensor) -> dict[str, float]:
    """Largest absolute difference, and the same relative to the largest dense value. NaN counts as infinite."""
    gap = (dense - moe).abs().nan_to_num(nan=torch.inf).max().item() if dense.numel() else 0.0
    scale = dense.abs().max().item() if dense.numel() else 1.0
    return {"max_abs": gap, "max_rel": gap / scale if scale > 0 else gap}


def _likelihoods(dense: torch.Tensor, moe: torch.Tensor, batch: Batch) -> dict[str, Any]:
    """Mean KL(dense ‖ moe) in nats, and both losses: on the tokens themselves where the logits are over the
    vocabulary of each token (shifted nowhere: any fixed labels will do), else on the dense model's own choice."""
    log_p, log_q = (unpadded(logits, batch).log_softmax(-1).flatten(0, -2) for logits in (dense, moe))
    labels = log_p.argmax(-1)
    if dense.shape[:2] == batch.input_ids.shape and dense.shape[-1] > int(batch.input_ids.max()):
        labels = batch.input_ids[batch.attention_mask.bool()]
    losses = {name: functional.nll_loss(log, labels).item() for name, log in (("dense", log_p), ("moe", log_q))}
    kl = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()
    return {"kl": kl, "loss": {**losses, "difference": losses["moe"] - losses["dense"]}}


@contextmanager
def _hooked(dense: PreTrainedModel, family: Family, seen: dict[str, torch.Tensor]) -> Iterator[None]:
    """Keeps what goes in and out of every layer's feed-forward network, as `N.in` and `N.out`."""
    handles = []
    for index in range(dense.config.num_hidden_layers):
        layer = dense.base_model.get_submodule(family.layer.format(layer=index))

        def keep_in(module, args, index=index):
            seen[f"{index}.in"] = args[0]

        def keep_out(module, args, output, index=index):
            seen[f"{index}.out"] = output

        handles.append(layer.get_submodule(family.up).register_forward_pre_hook(keep_in))
        handles.append(layer.get_submodule(family.down).register_forward_hook(keep_out))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def capture_feed_forward(
    dense: PreTrainedModel, family: Family, batch: Batch
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """What goes in and out of each layer's feed-forward network, (B, S, D) both."""
    seen: dict[str, torch.Tensor] = {}
    with _hooked(dense, family, seen):
        run_model(dense, batch)
    return {i: (seen[f"{i}.in"], seen[f"{i}.out"]) for i in range(dense.config.num_hidden_layers)}
