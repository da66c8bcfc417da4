"""Routers fitted to text: what the base model's feed-forward networks see of each expert's passages.

Letters in names: N tokens, D hidden, E experts, C classes of text (in a fusion, one an expert), P passages.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_moe.errors import SourceError, UsageError
from hf_moe.recipe import FuseRecipe

from .checkpoint import Checkpoint
from .classes import body_of
from .compare import Batch, load_model, pad, run_once, watch_networks
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
        passages = hold_out(texts, expert.positive_prompts or [], expert.negative_prompts or [])
        if not passages.positive:
            raise UsageError(
                f"experts[{index}] ({expert.source_model}): has neither positive_prompts nor texts, which {needs}."
            )
        made.append(passages)
    check_apart(made, _in_recipe(recipe), "prompts and texts")
    return made


def hold_out(texts: list[str], prompts: Iterable[str] = (), negative: Iterable[str] = ()) -> Passages:
    """Passages of texts, every fifth of which is held out (of fewer, the last; of one, none), and of prompts."""
    held_at = set(range(HELD_OUT - 1, len(texts), HELD_OUT)) or set(range(1, len(texts))[-1:])
    positive = [*prompts, *(text for i, text in enumerate(texts) if i not in held_at)]
    return Passages(positive, list(negative), [texts[i] for i in sorted(held_at)])


def check_apart(passages: Sequence[Passages], names: Sequence[str], what: str) -> None:
    """Raises UsageError where two have the same."""
    for index, one in enumerate(passages):
        if one in passages[:index]:
            raise UsageError(
                f"{names[passages.index(one)]} and {names[index]}: have the same {what}, so no gate can tell what is "
                "for which."
            )


def _in_recipe(recipe: FuseRecipe) -> list[str]:
    return [f"experts[{index}]" for index in range(len(recipe.experts))]


def token_ids(
    checkpoint: Checkpoint, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> list[list[int]]:
    """One row a text that has any, cut off where it is too long.

    Raises:
        SourceError: where the vocabulary has not the ids.
    """
    rows = [row for row in tokenize(tokenizer, config, texts) if row]
    check_ids(rows, config, checkpoint.path)
    return rows


@dataclass(frozen=True)
class Reader:
    """A model that tells what its routers read, or would.

    Args:
        model: it.
        layers: those that have a router.
        inputs: batch -> layer -> (N, D), of the tokens that are no padding.
    """

    model: PreTrainedModel
    layers: tuple[int, ...]
    inputs: Callable[[Batch], dict[int, torch.Tensor]]


def dense_reader(plan: Plan) -> Reader:
    """The base model of a fusion, in float32: its feed-forward networks read what the routers will."""
    model = load_model(plan.dense_class, plan.source.checkpoint, "float32")
    return Reader(model, tuple(plan.networks), partial(_feed_forward_inputs, model, plan))


def _feed_forward_inputs(model: PreTrainedModel, plan: Plan, batch: Batch) -> dict[int, torch.Tensor]:
    with watch_networks(model, plan.family, plan.networks, "in") as seen:
        run_once(body_of(plan.family, model), batch)  # type: ignore[arg-type]
    kept = batch.inputs["attention_mask"].bool()
    return {layer: values[0].reshape(*kept.shape, -1)[kept] for layer, values in seen["in"].items()}


@dataclass(frozen=True)
class Sample:
    """N tokens of all classes' passages.

    Args:
        x: layer -> (N, D), float32: what the layer's router reads.
        embedded: (N, D'), their embeddings.
        label: (N,), the class that each is of.
        passage: (N,), the passage that each is of, counted through.
    """

    x: dict[int, torch.Tensor]
    embedded: torch.Tensor
    label: torch.Tensor
    passage: torch.Tensor


def take_sample(reader: Reader, rows: list[list[list[int]]], tokens: int) -> Sample:
    """Runs each class's rows of ids until it has its part of `tokens`."""
    flat = [(label, row) for label, held in enumerate(rows) for row in _within(held, max(1, tokens // len(rows)))]
    x: dict[int, list[torch.Tensor]] = {layer: [] for layer in reader.layers}
    embedded: list[torch.Tensor] = []
    embed = reader.model.get_input_embeddings()
    for start in range(0, len(flat), ROWS):
        batch = pad("fit", [row for _, row in flat[start : start + ROWS]])
        for layer, values in reader.inputs(batch).items():
            x[layer].append(values.float())
        with torch.no_grad():
            embedded.append(embed(batch.inputs["input_ids"])[batch.inputs["attention_mask"].bool()].float())
    lengths = torch.tensor([len(row) for _, row in flat], dtype=torch.long)
    return Sample(
        x={layer: torch.cat(values) if values else torch.empty(0) for layer, values in x.items()},
        embedded=torch.cat(embedded) if embedded else torch.empty(0),
        label=torch.tensor([label for label, _ in flat], dtype=torch.long).repeat_interleave(lengths),
        passage=torch.arange(len(flat)).repeat_interleave(lengths),
    )


def _within(rows: list[list[int]], tokens: int) -> Iterator[list[int]]:
    for row in rows:
        if tokens <= 0:
            return
        yield row[:tokens]
        tokens -= len(row)


@dataclass(frozen=True)
class Fit:
    """Tokens that rows are fitted to, those that they should be far from, and those that they are measured on.

    Args:
        gate: how rows are made, of `GATES`.
        classes: how many there are.
        path: where the model lies that read them.
    """

    gate: str
    classes: int
    path: Path
    to: Sample
    against: Sample
    measured_on: Sample

    def rows(self, layer: int) -> torch.Tensor:
        """(C, D), in float64, of any scale.

        Raises:
            SourceError: where the inputs are not finite. UsageError: where the embeddings are of another width.
        """
        x_ND, against_ND = (sample.x[layer].double() for sample in (self.to, self.against))
        if not is_finite(x_ND):
            raise SourceError(f"{self.path}: layer {layer} makes NaN or Inf of the passages.")
        width = x_ND.shape[1]
        if self.gate == "cheap_embed":
            x_ND, against_ND = (sample.embedded.double() for sample in (self.to, self.against))
        if x_ND.shape[1] != width:
            raise UsageError(
                f"gate_mode 'cheap_embed': {self.path} has embeddings of {x_ND.shape[1]} numbers, its routers read "
                f"{width}; 'hidden' fits."
            )
        negative_CD = torch.zeros(self.classes, width, dtype=x_ND.dtype)
        if len(against_ND):
            negative_CD = class_means(against_ND, self.against.label, self.classes)
        return GATES[self.gate](x_ND, self.to.label, negative_CD)

    def report(self, layer: int, rows_ED: torch.Tensor, class_E: torch.Tensor) -> dict[str, Any]:
        """How well a layer's rows tell the classes apart; `class_E` says which each expert is for (-1: none).

        Returns:
            `tokens` it is fitted to, `condition` of the inputs' covariance (None: the gate does not need it), and the
            share of held-out tokens and passages whose largest logit is one of their class, each class that has
            experts counting the same (None: nothing was held out), and by `chance`.
        """
        sample, x_ND = self.measured_on, self.to.x[layer].double()
        here = [label for label in class_E.unique().tolist() if label >= 0]
        measured = [label for label in sample.label.unique().tolist() if label in here]
        tokens, texts = _accuracy(rows_ED, class_E, layer, sample) if measured else (None, None)
        shares = [(class_E == label).double().mean().item() for label in measured or here]
        return {
            "layer": layer,
            "tokens": len(x_ND),
            "condition": _condition(self.gate, x_ND, self.to.label, self.classes),
            "chance": sum(shares) / len(shares),
            "held_out_tokens": tokens,
            "held_out_texts": texts,
        }

    def notes(self, layers: list[dict[str, Any]]) -> list[str]:
        """What these reports say of the texts."""
        return list(_notes(self.gate, layers, self.to.x[layers[0]["layer"]].shape[1]))


def open_fit(
    gate: str,
    passages: Sequence[Passages],
    names: Sequence[str],
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    load: Callable[[], Reader],
) -> Fit:
    """Runs the passages of classes, called `names`, through the model that `load` gives.

    Raises:
        SourceError: where there is no tokenizer that works, or the model does not run.
        UsageError: where of a class nothing is left to fit to.
    """
    tokenizer = load_tokenizer(checkpoint)
    positive, negative, held_out = (
        [token_ids(checkpoint, config, tokenizer, getattr(entry, kind)) for entry in passages]
        for kind in ("positive", "negative", "held_out")
    )
    if silent := [name for name, rows in zip(names, positive, strict=True) if not rows]:
        raise UsageError(f"{silent[0]}: the tokenizer makes no tokens of its passages.")
    reader = load()
    return Fit(
        gate,
        len(passages),
        checkpoint.path,
        to=take_sample(reader, positive, TOKENS),
        against=take_sample(reader, negative, TOKENS),
        measured_on=take_sample(reader, held_out, TOKENS // 4),
    )


def fit_routers(plan: Plan, recipe: FuseRecipe) -> tuple[dict[int, torch.Tensor], dict[str, Any]]:
    """Rows (E, D) for every mixture layer, and a report on how well they tell the experts' passages apart.

    The base model is loaded for this, in float32.

    Returns:
        the rows, and `gate`, `notes`, and `layers` as in `Fit.report`.

    Raises:
        UsageError, SourceError: as `read_passages`, or where the base can't run them.
    """
    passages, checkpoint = read_passages(recipe), plan.source.checkpoint
    fit = open_fit(
        recipe.gate_mode, passages, _in_recipe(recipe), checkpoint, plan.config, partial(dense_reader, plan)
    )
    std = LOGIT_STD if recipe.router_logit_std is None else float(recipe.router_logit_std)
    routers = {
        layer: spread(fit.rows(layer), fit.to.x[layer].double(), std).to(torch.float32) for layer in plan.networks
    }
    layers = [fit.report(layer, rows_ED, torch.arange(len(passages))) for layer, rows_ED in routers.items()]
    return routers, {"gate": recipe.gate_mode, "layers": layers, "notes": fit.notes(layers)}


def digest_of(routers: dict[int, torch.Tensor]) -> str:
    """sha256 of rows that were fitted, by which a resumed run knows its own."""
    made = hashlib.sha256()
    for layer, rows_ED in sorted(routers.items()):
        made.update(f"{layer}/".encode() + rows_ED.contiguous().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def _accuracy(rows_ED: torch.Tensor, class_E: torch.Tensor, layer: int, sample: Sample) -> tuple[float, float]:
    """Share of tokens, and of passages by their mean logits, whose largest logit is one of their class."""
    logits_NE = sample.x[layer] @ rows_ED.float().T
    passages = int(sample.passage[-1]) + 1
    of_passages_PE = class_means(logits_NE, sample.passage, passages)
    label_P = torch.zeros(passages, dtype=torch.long).scatter_(0, sample.passage, sample.label)
    return _balanced(logits_NE, sample.label, class_E), _balanced(of_passages_PE, label_P, class_E)


def _balanced(logits_NE: torch.Tensor, label_N: torch.Tensor, class_E: torch.Tensor) -> float:
    """Over the classes that have experts."""
    right_N = (class_E[logits_NE.argmax(dim=1)] == label_N).double()
    labels = [label for label in label_N.unique() if (class_E == label).any()]
    return torch.stack([right_N[label_N == label].mean() for label in labels]).mean().item()


def _condition(gate: str, x_ND: torch.Tensor, label_N: torch.Tensor, classes: int) -> float | None:
    """Largest over smallest eigenvalue of the pooled covariance, shrunk as it is where it is inverted."""
    if gate not in INVERTING_GATES:
        return None
    means_CD = class_means(x_ND, label_N, classes)
    values = torch.linalg.eigvalsh(shrunk_covariance(x_ND - means_CD[label_N]))
    return (values[-1] / values[0].clamp(min=torch.finfo(values.dtype).tiny)).item()


def _notes(gate: str, layers: list[dict[str, Any]], width: int) -> Iterator[str]:
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
    if blind := [entry for entry in measured if entry["held_out_texts"] <= entry["chance"]]:
        chance = ", ".join(sorted({f"{entry['chance']:.2f}" for entry in blind}))
        yield f"{_named(blind)}: held-out texts go to their expert no more often than by chance ({chance})."


def _named(layers: list[dict[str, Any]]) -> str:
    numbers = ", ".join(str(entry["layer"]) for entry in layers)
    return f"Layers {numbers}" if len(layers) > 1 else f"Layer {numbers}"
