"""Two models on the same inputs: loading, running, and every way their outputs may differ."""

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from hf_moe.errors import SourceError
from hf_moe.routing.hooks import removing

from .checkpoint import Checkpoint
from .classes import body_of
from .families import Family
from .quiet import quiet
from .texts import load_tokenizer, longest_text, sample_texts, tokenize

RANDOM_LENGTHS = (64, 48, 17, 3)
RANDOM_FRAMES = (64, 48, 33, 17)  # of sound: some heads take windows of up to 15 frames
RANDOM_ROWS = 2  # of inputs that all have one size
PROMPT_TOKENS = 3
NEW_TOKENS = 64

LAYERED_OUTPUTS = ("hidden_states", "feature_maps")  # tuples, one tensor a layer
# Outputs with one row an input; all others have one a token, and padding is taken out of them.
ROW_OUTPUTS = ("pooler_output", "seq_relationship_logits", "mc_logits", "embeddings", "codevector_perplexity")
ROW_HEADS = ("ForSequenceClassification", "ForNextSentencePrediction", "ForMultipleChoice", "ForXVector")

INFINITE = sys.float_info.max  # a difference beyond measure; JSON has no infinity


@dataclass(frozen=True)
class Batch:
    """What a model is given; with a mask, rows are padded on the right."""

    name: str
    inputs: dict[str, torch.Tensor]

    @property
    def mask(self) -> torch.Tensor | None:
        return self.inputs.get("attention_mask")

    @property
    def is_padded(self) -> bool:
        return self.mask is not None and not self.mask.all()


def make_batches(
    dense: Checkpoint,
    config: PretrainedConfig,
    inputs: str = "input_ids",
    texts: list[str] | None = None,
    seed: int = 0,
) -> tuple[list[Batch], str]:
    """What to compare on: `texts` (default: `sample_texts`), if the model reads any and has a tokenizer, and random
    `inputs`.

    Returns:
        the batches, and what became of the texts, in words.

    Raises:
        SourceError: where the configuration leads to no inputs.
    """
    try:
        batches = [Batch("random", INPUTS[inputs](config, torch.Generator().manual_seed(seed)))]
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise SourceError(f"{dense.path}: config.json describes no {inputs} that can be made ({error}).") from error
    if inputs != "input_ids":
        return batches, f"none: the model reads {inputs}"
    ids, note = token_ids(dense, config, texts or sample_texts())
    return ([pad("text", ids), *batches] if ids else batches), note


def token_ids(checkpoint: Checkpoint, config: PretrainedConfig, texts: list[str]) -> tuple[list[list[int]], str]:
    """Of each text, cut off where it is too long; none, where there is no tokenizer that works. And why, in words."""
    if not checkpoint.has_tokenizer:
        return [], "none: the source has no tokenizer"
    try:
        ids = tokenize(load_tokenizer(checkpoint), config, texts)
    except Exception as error:  # tokenizers raise it bare; the random ids will do
        return [], f"none: the source's tokenizer does not work ({type(error).__name__})"
    ids = [row for row in ids if row and max(row) < config.vocab_size]
    if not ids:
        return [], "none: the tokenizer's ids do not fit the model's vocabulary"
    return ids, f"{len(ids)} texts, {sum(map(len, ids))} tokens"


def pad(name: str, rows: list[list[int]]) -> Batch:
    return Batch(name, _padded(rows))


def _padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    mask = _mask([len(row) for row in rows])
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([token for row in rows for token in row])
    return {"input_ids": ids, "attention_mask": mask}


def _mask(lengths: list[int]) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def _random_ids(config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    lengths = [min(length, longest_text(config)) for length in RANDOM_LENGTHS]
    return _padded([torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in lengths])


def _random_images(config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": torch.randn((RANDOM_ROWS, config.num_channels, height, width), generator=generator)}


def _random_waves(config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    mask = _mask([frames * config.inputs_to_logits_ratio for frames in RANDOM_FRAMES])
    return {"input_values": torch.randn(mask.shape, generator=generator) * mask, "attention_mask": mask}


def _random_features(config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shape = (RANDOM_ROWS, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": torch.randn(shape, generator=generator)}


# What models read: main input -> random inputs for a configuration, with a mask where they can be padded.
INPUTS: dict[str, Callable[[Any, torch.Generator], dict[str, torch.Tensor]]] = {
    "input_ids": _random_ids,
    "pixel_values": _random_images,
    "input_values": _random_waves,
    "input_features": _random_features,
}


def load_model(
    model_class: type[PreTrainedModel], checkpoint: Checkpoint, dtype: str, rounded_to: str | None = None
) -> PreTrainedModel:
    """The model of a local checkpoint in `dtype`, in evaluation mode, with a generation configuration of defaults.

    With `rounded_to` its weights are those that this narrower dtype holds.

    Raises:
        SourceError: where Transformers can't load it.
    """
    try:
        with quiet():
            model = model_class.from_pretrained(
                checkpoint.path,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                generation_config=GenerationConfig(),
            )
    except Exception as error:  # whatever a damaged checkpoint provokes
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise SourceError(f"{checkpoint.path}: does not load as {model_class.__name__}: {reason}") from error
    if getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = 0  # some heads refuse a batch without one; the mask is what hides padding
    if rounded_to is not None:  # what is stored, and nothing else: Gemma's scale of embeddings is not
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.to(getattr(torch, rounded_to)))
    return model.eval()


def make_measurable(model: PreTrainedModel, routers: list[str]) -> None:
    """Lets one of Transformers' own mixtures be measured in float64: its fast kernels have none, and its routers round
    the gates to float32 in every dtype, which would be all that one sees."""
    model.set_experts_implementation("eager")
    renormalised = getattr(model.config, "norm_topk_prob", True)

    def widen(router, args, output):
        logits, gates, index = output
        if logits.dtype != torch.float64:
            return output
        gates = logits.softmax(dim=-1).gather(-1, index)
        return logits, gates / gates.sum(dim=-1, keepdim=True) if renormalised else gates, index

    for name in routers:
        model.base_model.get_submodule(name).register_forward_hook(widen)


def load_dense(
    model_class: type[PreTrainedModel],
    family: Family,
    checkpoint: Checkpoint,
    dtype: str,
    rounded_to: str | None = None,
) -> PreTrainedModel:
    """`load_model` of a dense checkpoint; one with a decoder is loaded whole, and its encoder taken."""
    named = (checkpoint.config.get("architectures") or [""])[0]
    if named not in family.encoder_of:
        return load_model(model_class, checkpoint, dtype, rounded_to)
    return load_model(getattr(transformers, named), checkpoint, dtype, rounded_to).get_encoder()


def run_model(model: PreTrainedModel, batch: Batch, hidden_states: bool = True) -> dict[str, torch.Tensor]:
    """Named float outputs in float64, those of layers (if wanted) as `hidden_states.N`: (tokens, …), padding left out;
    (rows, …) where there is one a row, or where nothing can be padded.

    Raises:
        SourceError: where the model does not run.
    """
    together = run_once(model, batch, hidden_states)
    if "input_ids" not in batch.inputs or batch.mask is None:
        return together
    if all(value.isfinite().all() for value in together.values()):
        return together
    # In float64 some attention makes NaN of padding that lies a whole window behind its text, and spreads it
    alone = [
        run_once(
            model, Batch(batch.name, {k: value[[row], :length] for k, value in batch.inputs.items()}), hidden_states
        )
        for row, length in enumerate(batch.mask.sum(1).tolist())
    ]
    return {key: torch.cat([outputs[key] for outputs in alone]) for key in together}


@torch.no_grad()
def run_once(model: PreTrainedModel, batch: Batch, hidden_states: bool = False) -> dict[str, torch.Tensor]:
    """What `run_model` gives, of one pass. Raises SourceError where the model does not run."""
    inputs = {
        key: value.to(model.dtype) if value.is_floating_point() else value for key, value in batch.inputs.items()
    }
    name = type(model).__name__
    if name.endswith("ForMultipleChoice"):
        inputs = {key: value.unsqueeze(1) for key, value in inputs.items()}
    try:
        outputs = model(**inputs, output_hidden_states=hidden_states, return_dict=True)
    except Exception as error:  # built, but of sizes that do not work together
        raise SourceError(f"{name} does not run: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    found: dict[str, torch.Tensor] = {}
    for key, value in outputs.items():
        if key in LAYERED_OUTPUTS:
            found |= {f"{key}.{i}": part for i, part in enumerate(value)}
        elif isinstance(value, torch.Tensor):
            found[key] = value
    rows = (*ROW_OUTPUTS, "logits") if name.endswith(ROW_HEADS) else ROW_OUTPUTS
    return {
        key: (value if key in rows or batch.mask is None else value[_real(model, batch.mask, value.shape[1])]).double()
        for key, value in found.items()
        if value.is_floating_point()
    }


def _real(model: PreTrainedModel, mask: torch.Tensor, length: int) -> torch.Tensor:
    """Which of an output's (B, `length`) tokens come from real inputs only; of sound, `mask` is over samples."""
    if mask.shape[1] == length:
        return mask.bool()
    samples = torch.tensor(mask.shape[1])
    frames = model._get_feat_extract_output_lengths(samples, add_adapter=False)  # type: ignore[operator]
    return model._get_feature_vector_attention_mask(  # type: ignore[operator]
        length, mask, add_adapter=bool(frames != length)
    )


@torch.no_grad()
def generate_greedily(model: PreTrainedModel, batch: Batch) -> list[list[int]]:
    """The first tokens of each row of `batch`, continued greedily by `NEW_TOKENS`, or to the model's last position."""
    prompts = batch.inputs["input_ids"][:, :PROMPT_TOKENS]
    room = getattr(model.config, "max_position_embeddings", NEW_TOKENS + PROMPT_TOKENS) - PROMPT_TOKENS
    if room < 1:
        return []
    settings = GenerationConfig(
        max_new_tokens=min(NEW_TOKENS, room), do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0
    )
    generated = model.generate(  # type: ignore[operator]
        prompts, attention_mask=torch.ones_like(prompts), generation_config=settings
    )
    return generated[:, prompts.shape[1] :].tolist()


def compare_outputs(dense: dict[str, torch.Tensor], moe: dict[str, torch.Tensor], batch: Batch) -> dict[str, Any]:
    """Differences of what `run_model` gave; the `max_*` are over the outputs, hidden states apart."""
    differences = {name: difference_of(value, moe[name]) for name, value in dense.items()}
    outputs = {name: value for name, value in differences.items() if not name.startswith("hidden_states.")}
    result: dict[str, Any] = {
        **{key: max(value[key] for value in outputs.values()) for key in next(iter(outputs.values()))},
        "outputs": outputs,
        "hidden_states": [value for name, value in differences.items() if name not in outputs],
    }
    logits = next((name for name in ("logits", "prediction_logits") if name in dense), None)
    if logits is not None and dense[logits].ndim > 1 and dense[logits].shape[-1] > 1:
        result |= _likelihoods(dense[logits], moe[logits], batch)
    return result


def difference_of(dense: torch.Tensor, moe: torch.Tensor) -> dict[str, float]:
    """How far `moe` (N, …) is from `dense`.

    Returns:
        `max_abs`: the largest difference; `max_rel`: relative to the largest dense value; `max_rel_by_column`: each
        column (last dimension) relative to its own largest value, or to the median of all where that is larger, so
        that a huge value in one column can't hide the others. Values that are not finite must be the same.
    """
    one, other = (value.reshape(-1, value.shape[-1] if value.ndim > 1 else 1) for value in (dense, moe))
    finite = one.isfinite()
    if one.shape != other.shape or not torch.equal(one[~finite].nan_to_num(), other[~finite].nan_to_num()):
        return dict.fromkeys(("max_abs", "max_rel", "max_rel_by_column"), INFINITE)
    if not other[finite].isfinite().all():
        return dict.fromkeys(("max_abs", "max_rel", "max_rel_by_column"), INFINITE)
    if not finite.any():
        return dict.fromkeys(("max_abs", "max_rel", "max_rel_by_column"), 0.0)
    sizes = one.where(finite, 0.0).abs()
    gaps = (one - other).where(finite, 0.0).abs()
    sample = one[finite].abs()
    median = sample[:: max(1, len(sample) // 100_000)].median()
    columns = sizes.amax(0).clamp(min=max(median.item(), torch.finfo(torch.float64).tiny))
    largest = sizes.max().item()
    gap = gaps.max().item()
    return {
        "max_abs": gap,
        "max_rel": gap / largest if largest > 0 else min(gap, INFINITE),
        "max_rel_by_column": min((gaps.amax(0) / columns).max().item(), INFINITE),
    }


def _likelihoods(dense: torch.Tensor, moe: torch.Tensor, batch: Batch) -> dict[str, Any]:
    """Mean KL(dense ‖ moe) in nats, and both losses: on the tokens themselves where there are logits over the
    vocabulary for each (shifted nowhere: any fixed labels will do), else on the dense model's own choice."""
    log_p, log_q = (logits.reshape(-1, logits.shape[-1]).log_softmax(-1) for logits in (dense, moe))
    labels = log_p.argmax(-1)
    if "input_ids" in batch.inputs and batch.mask is not None:
        tokens = batch.inputs["input_ids"][batch.mask.bool()]
        if log_p.shape[0] == len(tokens) and log_p.shape[-1] > int(tokens.max()):
            labels = tokens
    losses = {name: functional.nll_loss(log, labels).item() for name, log in (("dense", log_p), ("moe", log_q))}
    kl = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()
    return {"kl": kl, "loss": {**losses, "difference": losses["moe"] - losses["dense"]}}


@contextmanager
def watch_networks(
    dense: PreTrainedModel, family: Family, layers: Iterable[int], *places: str
) -> Iterator[dict[str, dict[int, list[torch.Tensor]]]]:
    """Keeps what passes `places` of each layer's feed-forward network ("in", "hidden", "out"), one tensor a call."""
    seen: dict[str, dict[int, list[torch.Tensor]]] = {place: defaultdict(list) for place in places}
    handles = []
    for layer, place in itertools.product(layers, places):
        name = f"{family.layer.format(layer=layer)}.{family.up if place == 'in' else family.down}"

        def keep(module, args, output, layer=layer, place=place):
            seen[place][layer].append(output if place == "out" else args[0])

        handles.append(body_of(family, dense).get_submodule(name).register_forward_hook(keep))
    with removing(handles):
        yield seen


def capture_feed_forward(
    dense: PreTrainedModel, family: Family, batch: Batch
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """What goes in and out of each layer's feed-forward network, (T, D) both."""
    layers = range(dense.config.num_hidden_layers)
    with watch_networks(dense, family, layers, "in", "out") as seen:
        run_model(dense, batch)

    def together(place: str, layer: int) -> torch.Tensor:
        return torch.cat([values.flatten(0, -2) for values in seen[place][layer]])

    return {layer: (together("in", layer), together("out", layer)) for layer in layers}
