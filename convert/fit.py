"""Routers fitted to text: what the base model's feed-forward networks see of each expert's passages."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moe.errors import SourceError, UsageError
from hf_moe.recipe import FuseRecipe

from .classes import body_of
from .compare import Batch, load_model, pad, watch_networks
from .network import is_finite
from .plan import Plan
from .routers import GATES, class_means, shrunk_covariance, spread
from .texts import check_ids, load_tokenizer, read_texts, tokenize

RANDOM_GATES = ("random", "uniform_random")
PROMPT_GATES = ("hidden", "cheap_embed")
INVERTING_GATES = ("lda", "probe")  # those that need every direction of the inputs, not only their means
ROWS = 8  # passages that run at once
TOKENS = 16_384  # that routers are fitted to, of all experts; a quarter of it is held out
HELD_OUT = 5  # of so many lines of an expert's texts, one
LOGIT_STD = 1.0
CONDITION = 1e6


@dataclass(frozen=True)
class Passages:
    """What one expert should get, should not get, and should get too but is only measured on."""

    positive: list[str]
    negative: list[str]
    held_out: list[str]


def read_passages(recipe: FuseRecipe) -> list[Passages]:
    """Each expert's passages; of its texts every fifth line is held out, prompts never are.

    Raises:
        UsageError, SourceError: where a file can't be read, a prompt is empty, an expert has none, or two have the
            same.
    """
    fits = recipe.gate_mode not in RANDOM_GATES
    needs = f"gate_mode {recipe.gate_mode!r} is fitted to; 'random' needs none" if fits else "train_router trains on"
    made: list[Passages] = []
    for index, expert in enumerate(recipe.experts):
        prompts = [*(expert.positive_prompts or []), *(expert.negative_prompts or [])]
        if not all(prompt.strip() for prompt in prompts):
            raise UsageError(f"experts[{index}] ({expert.source_model}): has an empty prompt.")
        texts = read_texts(Path(expert.texts).expanduser()) if expert.texts else []
        held_at = set(range(HELD_OUT - 1, len(texts), HELD_OUT)) or set(range(1, len(texts))[-1:])
        positive = [*(expert.positive_prompts or []), *(text for i, text in enumerate(texts) if i not in held_at)]
        if not positive:
            raise UsageError(
                f"experts[{index}] ({expert.source_model}): has neither positive_prompts nor texts, which {needs}."
            )
        made.append(Passages(positive, expert.negative_prompts or [], [texts[i] for i in sorted(held_at)]))
    for index, passages in enumerate(made):
        if passages in made[:index]:
            raise UsageError(
                f"experts[{made.index(passages)}] and experts[{index}]: have the same prompts and texts, so no gate "
                "can tell what is for which."
            )
    return made


def token_ids(plan: Plan, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """One row a text that has any, cut off where it is too long.

    Raises:
        SourceError: where the vocabulary has not the ids.
    """
    rows = [row for row in tokenize(tokenizer, plan.config, texts) if row]
    check_ids(rows, plan.config, plan.source.checkpoint.path)
    return rows


@dataclass(frozen=True)
class Sample:
    """N tokens of all experts' passages.

    Args:
        x: layer -> (N, D), float32: what the layer's feed-forward network reads.
        embedded: (N, D'), their embeddings.
        expert: (N,), the expert that each is for.
        passage: (N,), the passage that each is of, counted through.
    """

    x: dict[int, torch.Tensor]
    embedded: torch.Tensor
    expert: torch.Tensor
    passage: torch.Tensor


def take_sample(model: PreTrainedModel, plan: Plan, rows: list[list[list[int]]], tokens: int) -> Sample:
    """Runs each expert's rows of ids until it has its part of `tokens`."""
    flat = [(expert, row) for expert, held in enumerate(rows) for row in _within(held, max(1, tokens // len(rows)))]
    x: dict[int, list[torch.Tensor]] = {layer: [] for layer in plan.networks}
    embedded: list[torch.Tensor] = []
    embed = model.get_input_embeddings()
    for start in range(0, len(flat), ROWS):
        batch = pad("fit", [row for _, row in flat[start : start + ROWS]])
        kept = batch.inputs["attention_mask"].bool()
        for layer, values in _feed_forward_inputs(model, plan, batch).items():
            x[layer].append(values.reshape(*kept.shape, -1)[kept])
        with torch.no_grad():
            embedded.append(embed(batch.inputs["input_ids"])[kept])
    lengths = torch.tensor([len(row) for _, row in flat], dtype=torch.long)
    return Sample(
        x={layer: torch.cat(values) if values else torch.empty(0) for layer, values in x.items()},
        embedded=torch.cat(embedded) if embedded else torch.empty(0),
        expert=torch.tensor([expert for expert, _ in flat], dtype=torch.long).repeat_interleave(lengths),
        passage=torch.arange(len(flat)).repeat_interleave(lengths),
    )


def _within(rows: list[list[int]], tokens: int) -> Iterator[list[int]]:
    for row in rows:
        if tokens <= 0:
            return
        yield row[:tokens]
        tokens -= len(row)


@torch.no_grad()
def _feed_forward_inputs(model: PreTrainedModel, plan: Plan, batch: Batch) -> dict[int, torch.Tensor]:
    with watch_networks(model, plan.family, plan.networks, "in") as seen:
        body_of(plan.family, model)(**batch.inputs)
    return {layer: values[0] for layer, values in seen["in"].items()}


def fit_routers(plan: Plan, recipe: FuseRecipe) -> tuple[dict[int, torch.Tensor], dict[str, Any]]:
    """Rows (E, D) for every mixture layer, and a report on how well they tell the experts' passages apart.

    The base model is loaded for this, in float32.

    Returns:
        the rows, and `gate`, `chance`, `notes` and for each layer `tokens` it is fitted to, `condition` of the
        inputs' covariance (None: the gate does not need it), and the share of held-out tokens and passages that go
        to their expert, each expert counting the same (None: nothing was held out).

    Raises:
        UsageError, SourceError: as `read_passages`, or where the base can't run them.
    """
    passages = read_passages(recipe)
    checkpoint = plan.source.checkpoint
    tokenizer = load_tokenizer(checkpoint)
    positive, negative, held_out = (
        [token_ids(plan, tokenizer, getattr(entry, kind)) for entry in passages]
        for kind in ("positive", "negative", "held_out")
    )
    if silent := [index for index, rows in enumerate(positive) if not rows]:
        raise UsageError(f"experts[{silent[0]}]: the tokenizer makes no tokens of its prompts and texts.")
    model = load_model(plan.dense_class, checkpoint, "float32")
    fitted_to = take_sample(model, plan, positive, TOKENS)
    against = take_sample(model, plan, negative, TOKENS)
    measured_on = take_sample(model, plan, held_out, TOKENS // 4)

    std = LOGIT_STD if recipe.router_logit_std is None else float(recipe.router_logit_std)
    routers: dict[int, torch.Tensor] = {}
    layers: list[dict[str, Any]] = []
    for layer in plan.networks:
        x_ND = fitted_to.x[layer].double()
        if not is_finite(x_ND):
            raise SourceError(f"{checkpoint.path}: layer {layer} makes NaN or Inf of the prompts and texts.")
        rows_ED = _fit(recipe.gate_mode, layer, fitted_to, against, len(passages))
        if rows_ED.shape[1] != x_ND.shape[1]:
            raise UsageError(
                f"gate_mode 'cheap_embed': {checkpoint.path} has embeddings of {rows_ED.shape[1]} numbers, its "
                f"routers read {x_ND.shape[1]}; 'hidden' fits."
            )
        routers[layer] = spread(rows_ED, x_ND, std).to(torch.float32)
        tokens, texts = _accuracy(routers[layer], layer, measured_on, len(passages))
        layers.append(
            {
                "layer": layer,
                "tokens": len(x_ND),
                "condition": _condition(recipe.gate_mode, x_ND, fitted_to.expert, len(passages)),
                "held_out_tokens": tokens,
                "held_out_texts": texts,
            }
        )
    chance, width = 1 / len(passages), next(iter(routers.values())).shape[1]
    notes = list(_notes(recipe.gate_mode, layers, width, chance))
    return routers, {"gate": recipe.gate_mode, "chance": chance, "layers": layers, "notes": notes}


def _fit(gate: str, layer: int, positive: Sample, negative: Sample, num_experts: int) -> torch.Tensor:
    """(E, D), in float64."""
    x_ND, against_ND = (
        (sample.embedded if gate == "cheap_embed" else sample.x[layer]).double() for sample in (positive, negative)
    )
    negative_ED = torch.zeros(num_experts, x_ND.shape[1], dtype=x_ND.dtype)
    if len(against_ND):
        negative_ED = class_means(against_ND, negative.expert, num_experts)
    return GATES[gate](x_ND, positive.expert, negative_ED)


def _accuracy(
    rows_ED: torch.Tensor, layer: int, sample: Sample, num_experts: int
) -> tuple[float | None, float | None]:
    """Share of tokens, and of passages by their mean logits, whose largest logit is their expert's."""
    if not len(sample.expert):
        return None, None
    logits_NE = sample.x[layer] @ rows_ED.T
    passages = int(sample.passage[-1]) + 1
    of_passages_PE = class_means(logits_NE, sample.passage, passages)
    expert_P = torch.zeros(passages, dtype=torch.long).scatter_(0, sample.passage, sample.expert)
    return (
        _balanced(logits_NE.argmax(dim=1) == sample.expert, sample.expert, num_experts),
        _balanced(of_passages_PE.argmax(dim=1) == expert_P, expert_P, num_experts),
    )


def _balanced(right_N: torch.Tensor, expert_N: torch.Tensor, num_experts: int) -> float:
    shares_E = class_means(right_N.double()[:, None], expert_N, num_experts)[:, 0]
    return shares_E[expert_N.unique()].mean().item()


def _condition(gate: str, x_ND: torch.Tensor, expert_N: torch.Tensor, num_experts: int) -> float | None:
    """Largest over smallest eigenvalue of the pooled covariance, shrunk as it is where it is inverted."""
    if gate not in INVERTING_GATES:
        return None
    means_ED = class_means(x_ND, expert_N, num_experts)
    values = torch.linalg.eigvalsh(shrunk_covariance(x_ND - means_ED[expert_N]))
    return (values[-1] / values[0].clamp(min=torch.finfo(values.dtype).tiny)).item()


def _notes(gate: str, layers: list[dict[str, Any]], width: int, chance: float) -> Iterator[str]:
    if layers[0]["held_out_texts"] is None:
        yield "No texts were held out, so nothing shows whether the routers tell the experts' passages apart."
    if gate in INVERTING_GATES and layers[0]["tokens"] < width:
        yield (
            f"{_named(layers)}: {gate} has {layers[0]['tokens']} tokens to fit {width} dimensions to; more texts "
            "would help, or gate_mode 'centroid', which estimates means only."
        )
    if ill := [entry for entry in layers if entry["condition"] is not None and entry["condition"] > CONDITION]:
        worst = max(entry["condition"] for entry in ill)
        yield (
            f"{_named(ill)}: the inputs' covariance is ill-conditioned ({worst:.0e}); more, and more varied, texts "
            "would help, or gate_mode 'centroid'."
        )
    measured = [entry for entry in layers if entry["held_out_texts"] is not None]
    if blind := [entry for entry in measured if entry["held_out_texts"] <= chance]:
        yield f"{_named(blind)}: held-out texts go to their expert no more often than by chance ({chance:.2f})."


def _named(layers: list[dict[str, Any]]) -> str:
    numbers = ", ".join(str(entry["layer"]) for entry in layers)
    return f"Layers {numbers}" if len(layers) > 1 else f"Layer {numbers}"
