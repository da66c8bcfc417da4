"""The card's metadata, held against the types that huggingface_hub gives them."""

import inspect
import types
import typing
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_moe.errors import SourceError

from .facts import EXPERTS_KIND, FUSED, UPCYCLED
from .lineage import inherited

# Kind -> how the Hub calls the way a model comes from its bases.
RELATIONS = {EXPERTS_KIND: "adapter", FUSED: "merge"}


def metadata_of(facts: dict[str, Any]) -> ModelCardData:
    """Raises SourceError where a value is of another type than the Hub's client says."""
    bases = list(dict.fromkeys(base.repo_id for base in facts["bases"] if base.repo_id))
    tags = ["moe", "mixture-of-experts", "hf_moe", *(["upcycled"] if facts["kind"] == UPCYCLED else [])]
    values: dict[str, Any] = {
        "library_name": "sentence-transformers" if facts["sentences"] else "transformers",
        "pipeline_tag": "sentence-similarity" if facts["sentences"] else facts["pipeline"],
        "tags": tags,
        **inherited(facts["bases"]),
        **(_results(facts) or {}),
    }
    if bases:
        values |= {"base_model": bases, "base_model_relation": RELATIONS.get(facts["kind"], "finetune")}
    values = {name: value for name, value in values.items() if value is not None}
    check_types(values)
    return ModelCardData(**values)


def check_types(values: dict[str, Any]) -> None:
    """Raises SourceError for the first value that `ModelCardData` has another type for."""
    hints = typing.get_type_hints(ModelCardData.__init__)
    for name in inspect.signature(ModelCardData).parameters:
        if name in values and name in hints and not _fits(values[name], hints[name]):
            raise SourceError(f"card: {name} is a {type(values[name]).__name__}, which the Hub does not take there.")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


def _results(facts: dict[str, Any]) -> dict[str, Any] | None:
    """Figures of this model as the Hub's index has them; None where there are none, or nobody knows on what."""
    evaluation = facts["evaluation"]
    if not evaluation or not (evaluation["files"] or evaluation["dataset"]):
        return None
    column = evaluation["models"].index(evaluation["own"])
    dataset = _one_line(evaluation["dataset"] or ", ".join(evaluation["files"]))
    results = [
        EvalResult(
            task_type=facts["pipeline"] or _one_line(evaluation["task"]),
            dataset_type="dataset" if evaluation["dataset"] else "files",
            dataset_name=dataset,
            dataset_split=_one_line(evaluation["split"]),
            metric_type=_one_line(name),
            metric_value=figures[column],
        )
        for name, figures in evaluation["rows"]
        if figures[column] is not None
    ]
    return {"eval_results": results, "model_name": facts["name"]} if results else None


def _one_line(value: Any) -> str:
    """A line of its own could end the metadata."""
    return " ".join(str(value).split())
