"""What a card may say: values of the result files in a staged folder, and nothing else."""

from dataclasses import replace
from typing import Any

from hf_moe.convert.certificate import CERTIFICATE_NAME, explain
from hf_moe.convert.checkpoint import VOCABULARIES, open_checkpoint, read_json
from hf_moe.convert.conversion import RECIPE_NAME
from hf_moe.convert.describe import describe_checkpoint
from hf_moe.errors import SourceError

from .checks import auto_class_of
from .lineage import Base
from .staging import EXPERTS_CONFIG, PICTURES, Staged, _matches

EXPERTS_KIND, FUSED, FINE_TUNED, UPCYCLED = "experts", "fused", "fine-tuned", "upcycled"

# End of a class's name -> what the Hub calls its task; the first that fits.
PIPELINES = {
    "ForMaskedLM": "fill-mask",
    "LMHeadModel": "text-generation",
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
    "Model": "feature-extraction",
}


def kind_of(staged: Staged) -> str:
    """Which template fits.

    Raises:
        SourceError: where no file tells what the model was made from.
    """
    if staged.is_artefact:
        return EXPERTS_KIND
    config, there = staged.config, set(staged.files)
    if "training.json" in there:
        return FINE_TUNED
    if config.get("fused_from"):
        return FUSED
    if config.get("upcycled_from"):
        return UPCYCLED
    raise SourceError(f"{staged.source}: nothing in it tells what it was made from; --no-card publishes without one.")


def gather(staged: Staged, repo_id: str, bases: list[Base]) -> dict[str, Any]:
    """Everything a template reads; what there is no file for is None or empty, and its section is left out.

    Raises:
        SourceError: where a result file is none of ours.
    """
    config = staged.config
    kind = kind_of(staged)
    named = (config.get("architectures") or [""])[0]
    facts: dict[str, Any] = {
        "kind": kind,
        "repo_id": repo_id,
        "name": repo_id.rpartition("/")[2],
        "class": named,
        "auto_class": auto_class_of(config),
        "remote_code": "auto_map" in config,
        "has_tokenizer": any(name in staged.files for name in VOCABULARIES),
        "sentences": "modules.json" in staged.files,
        "pipeline": next((task for ending, task in PIPELINES.items() if named.endswith(ending)), None),
        "bases": bases,
        "recipe": _recipe(staged),
        "pictures": [name for name in staged.files if any(_matches(name, one) for one in PICTURES)],
        "licences": [name for name in staged.files if name.startswith(("LICEN", "COPYING", "NOTICE", "USE_POLICY"))],
    }
    try:
        return facts | _results(staged, kind)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise SourceError(
            f"{staged.source}: a result file is none of ours ({type(error).__name__}: {error})."
        ) from error


def _results(staged: Staged, kind: str) -> dict[str, Any]:
    def read(name: str) -> dict[str, Any] | None:
        return read_json(staged.folder / name) if name in staged.files else None

    certificate, routing, training = read(CERTIFICATE_NAME), read("routing.json"), read("training.json")
    model = None if kind == EXPERTS_KIND else _described(staged)
    if certificate is not None and model is not None and not (model.get("certificate") or {}).get("weights_unchanged"):
        certificate = None  # it is of other weights
    own = staged.source.resolve().name
    if routing is not None and routing["source"] != own:
        raise SourceError(f"{staged.source}: its routing.json is of another model, {routing['source']!r}.")
    evaluation = _evaluation(read("metrics.json"), own)
    if evaluation and own not in evaluation["models"]:
        raise SourceError(f"{staged.source}: its metrics.json is of other models, {', '.join(evaluation['models'])}.")
    versions: dict[str, Any] = next((one["versions"] for one in (training, certificate, routing) if one), {})
    return {
        "model": model,
        "certificate": certificate and _certificate(certificate),
        "routing": routing and _routing(routing),
        "training": training and _training(training),
        "evaluation": evaluation,
        "experts": _experts(read(EXPERTS_CONFIG)) if kind == EXPERTS_KIND else None,
        "versions": {name: str(version) for name, version in versions.items()},
        "limits": _limits(kind, certificate, routing, evaluation, model),
    }


def _described(staged: Staged) -> dict[str, Any]:
    return describe_checkpoint(replace(open_checkpoint(staged.source), digests=staged.sha256))


def _recipe(staged: Staged) -> str | None:
    file = staged.folder / RECIPE_NAME
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _certificate(certificate: dict[str, Any]) -> dict[str, Any]:
    return {
        "passed": bool(certificate["passed"]),
        "judged": bool(certificate.get("judged", True)),
        "start": str(certificate["start"]),
        "summary": explain(certificate),
        "compared": int(certificate["weights"]["compared"]),
        "float32": float(certificate["float32"]["max_rel"]),
        "float64": float(certificate["float64"]["max_rel"]),
        "inputs": [str(certificate["inputs"][name]) for name in ("text", "random")],
    }


def _routing(routing: dict[str, Any]) -> dict[str, Any]:
    layers = [
        {
            "layer": int(one["layer"]),
            "entropy": one["normalised_entropy"],
            "largest": max(one["load"]),
            "dead": [int(expert) for expert in one["dead_experts"]],
        }
        for one in routing["layers"]
    ]
    return {"tokens": int(routing["tokens"]), "passages": int(routing["passages"]), "layers": layers}


def _training(training: dict[str, Any]) -> dict[str, Any]:
    data = training.get("data") or {}
    metrics = {str(name): value for name, value in training["metrics"].items() if _is_figure(name)}
    return {
        "task": str(training["task"]),
        "model": str(training["model"]),
        "steps": int(training["steps"]),
        "epochs": training["epochs"],
        "tokens": training.get("tokens"),
        "share": training["trains"]["share"],
        "files": {str(name): one for name, one in (data.get("files") or {}).items()},
        "rows": {str(name): int(one["rows"]) for name, one in (data.get("splits") or {}).items() if "rows" in one},
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, float | int)},
        "start": (training.get("start") or {}).get("summary"),
    }


def _is_figure(name: str) -> bool:
    return name.startswith(("eval_", "test_")) and not name.endswith(("_runtime", "_per_second"))


def _evaluation(report: dict[str, Any] | None, own: str) -> dict[str, Any] | None:
    if report is None:
        return None
    names = [str(model["name"]) for model in report["models"]]
    figures = sorted({name for model in report["models"] for name, v in model["metrics"].items() if v is not None})
    return {
        "task": str(report["task"]),
        "split": str(report["split"]),
        "metric": str(report["metric"]),
        "files": {str(name): one for name, one in (report["data"].get("files") or {}).items()},
        "dataset": report["data"].get("dataset"),
        "models": names,
        "own": own,
        "parameters": [int(model["parameters"]) for model in report["models"]],
        "rows": [(name, [model["metrics"].get(name) for model in report["models"]]) for name in figures],
        "comparisons": [
            {
                **{key: one[key] for key in ("model", "against", "metric", "difference")},
                "low": one["interval"][0],
                "high": one["interval"][1],
                "tie": one["interval"][0] <= 0 <= one["interval"][1],
                "better": (one["difference"] > 0) == bool(one["greater_is_better"]),
            }
            for one in report["comparisons"]
        ],
        "notes": [str(note) for note in report["notes"]],
    }


def _experts(told: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the artefact's own file says: which tensors, how they are kept, how far they are from the tuned ones."""
    if told is None:
        return None
    tensors = list(told["tensors"].values())
    places = sorted({(one["layer"], str(one["expert"])) for one in tensors if one.get("expert") is not None})
    errors = [one["error"] for one in tensors if isinstance(one.get("error"), float | int)]
    return {
        "tensors": len(tensors),
        "places": [f"{layer}.{expert}" for layer, expert in places],
        "how": sorted({str(one["how"]) for one in tensors}),
        "error": max(errors) if errors else None,
        "smaller": told.get("smaller"),
    }


def _limits(
    kind: str,
    certificate: dict[str, Any] | None,
    routing: dict[str, Any] | None,
    evaluation: dict[str, Any] | None,
    model: dict[str, Any] | None,
) -> list[str]:
    """What follows from the files against the model."""
    limits = []
    if kind == UPCYCLED and certificate and str(certificate["start"]).startswith("exact"):
        limits.append("It is the dense function: it is no better than its base before it is trained.")
    if certificate and not certificate["passed"]:
        limits.append("The certificate did not pass: it is not the function that its method says.")
    if routing and (dead := sum(len(layer["dead_experts"]) for layer in routing["layers"])):
        limits.append(f"{dead} experts were never chosen on the texts of the routing report.")
    for one in (evaluation or {}).get("comparisons", []):
        if one["tie"]:
            limits.append(f"On {one['metric']}, {one['model']} and {one['against']} differ by no more than chance.")
        elif not one["better"]:
            limits.append(f"On {one['metric']}, {one['model']} is worse than {one['against']}.")
    if evaluation is None:
        limits.append("It was not evaluated against its dense base, as far as its files tell.")
    if model and model.get("num_experts") and model.get("parameters"):
        limits.append("All experts must be in memory, though a token visits only some of them.")
    return limits
