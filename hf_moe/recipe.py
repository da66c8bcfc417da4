"""Recipes: what to make from what, as a strict dataclass that reads from and writes to YAML."""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError

from hf_moe.errors import UsageError


@strict
@dataclasses.dataclass(frozen=False, kw_only=True)
class UpcycleRecipe:
    """How a dense checkpoint becomes a mixture.

    Args:
        base_model: the dense checkpoint: a folder, a GGUF file or a Hub id.
        revision: branch, tag or commit of a Hub checkpoint.
        num_experts: experts a layer.
        num_experts_per_tok: experts that each token is sent to.
        moe_layers: which layers become mixtures: "all", "every-N" (the N-th, 2N-th, …), or their indices.
        method: "copy": experts are copies of the dense network; "split": they are its parts, which does not preserve
            the function unless a token visits all of them.
        granularity: into how many experts each copy is cut; a token then visits whole copies at the start.
        shared_expert_intermediate_size: how many of the network's neurons become a shared expert instead.
        shared_expert_weight: or the whole network becomes a shared expert of this weight (between 0 and 1), and the
            experts get the rest.
        partition: by what neurons are dealt where a network is cut: "random", "kmeans" (of their weights) or
            "coactivation" (on the text of `calibration`).
        calibration: file of text, one passage a line.
        noise_std: noise on every expert's weight matrices, in units of each matrix's own standard deviation.
        drop_ratio: share of every expert's neurons that start anew.
        norm_topk_prob: whether the chosen gates are renormalised to sum to 1.
        router_init: "normal": logits of deviation `router_logit_std`; "zero": equal ones, but for ties; "auto": "zero"
            where only that preserves the function.
        router_logit_std: standard deviation that the router's logits start with, on the inputs its norm makes.
        target: "hf_moe": our classes; "native": those that Transformers has for mixtures; "auto": native where
            nothing is lost.
        dtype: of the weights written, such as "bfloat16"; by default each stays what it is.
        router_aux_loss_coef: weight of the load-balancing loss in later training.
        router_z_loss_coef: weight of the router z-loss in later training.
        seed: of everything drawn at random.
        max_shard_size: largest weights file, such as "5GB".
        allow_nonfinite: whether NaN and Inf among the weights are converted as they are.
    """

    base_model: str
    revision: str | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_layers: str | list[int] = "all"
    method: Literal["copy", "split"] = "copy"
    granularity: int = 1
    shared_expert_intermediate_size: int = 0
    shared_expert_weight: float | None = None
    partition: Literal["random", "kmeans", "coactivation"] = "random"
    calibration: str | None = None
    noise_std: float | int = 0.0
    drop_ratio: float | int = 0.0
    norm_topk_prob: bool = True
    router_init: Literal["auto", "normal", "zero"] = "auto"
    router_logit_std: float | int = 0.1
    router_aux_loss_coef: float | int = 0.001
    router_z_loss_coef: float | int = 0.0
    target: Literal["hf_moe", "native", "auto"] = "hf_moe"
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    seed: int = 0
    max_shard_size: str = "5GB"
    allow_nonfinite: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> "UpcycleRecipe":
        """Checks names and types.

        Raises:
            UsageError: for an unknown name (with a suggestion), a missing one, or a value of the wrong type.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}."
                raise UsageError(f"{where}: unknown key {name!r}; {hint}")
        if "base_model" not in values:
            raise UsageError(f"{where}: names no base_model, the dense checkpoint to start from.")
        try:
            return cls(**values)
        except StrictDataclassFieldValidationError as error:
            raise UsageError(f"{where}: {error.__cause__ or error}") from error

    @classmethod
    def from_yaml(cls, file: Path, **overrides: Any) -> "UpcycleRecipe":
        """Reads `file`; what is given in `overrides` wins. Errors as in `from_dict`, or where it is no mapping."""
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{file}: can't be read as a YAML recipe ({reason}).") from error
        if not isinstance(values, dict):
            raise UsageError(f"{file}: a recipe is a mapping of names to values, such as 'num_experts: 8'.")
        return cls.from_dict({**values, **overrides}, where=str(file))

    def changed(self) -> dict[str, Any]:
        """What is not as by default."""
        fields = dataclasses.fields(self)
        return {f.name: value for f in fields if (value := getattr(self, f.name)) != f.default}

    def to_yaml(self) -> str:
        """The whole recipe, defaults included."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def parse_layers(text: str | list[int], num_hidden_layers: int) -> list[int]:
    """Layer indices of "all", "every-2" or "0,3,5" (or of a list), in order.

    Raises:
        UsageError: for another form, an index out of range or twice, or a choice of no layer at all.
    """
    if isinstance(text, list):
        layers = text
    elif text == "all":
        layers = list(range(num_hidden_layers))
    elif match := re.fullmatch(r"every-([1-9]\d{0,5})", text):
        layers = list(range(int(match[1]) - 1, num_hidden_layers, int(match[1])))
    elif re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        layers = [int(part) for part in text.split(",")]
    else:
        raise UsageError(f"layers {text!r}: write 'all', 'every-2', or indices such as '0,3,5'.")
    if not layers:
        raise UsageError(f"layers {text!r}: chooses none of the model's {num_hidden_layers} layers.")
    outside = [layer for layer in layers if not 0 <= layer < num_hidden_layers]
    if outside:
        raise UsageError(f"layers {text!r}: no layer {outside[0]}; the model's are 0 to {num_hidden_layers - 1}.")
    if len(set(layers)) != len(layers):
        raise UsageError(f"layers {text!r}: names a layer twice.")
    return sorted(layers)
