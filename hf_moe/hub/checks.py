"""The last check before anything is sent: the staged folder works where hf_moe is not, and gives the same outputs."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_moe.convert.checkpoint import VOCABULARIES
from hf_moe.convert.compare import INPUTS
from hf_moe.convert.families import FAMILIES
from hf_moe.convert.quiet import quiet
from hf_moe.convert.texts import sample_texts
from hf_moe.errors import SourceError

from . import clean
from .staging import Staged

SEED = 0
TEXTS = 3


def auto_class_of(config: dict[str, Any]) -> str:
    """What loads a checkpoint as the class its configuration names: an Auto class, or a class of Transformers."""
    named = (config.get("architectures") or [""])[0]
    for auto, reference in config.get("auto_map", {}).items():
        if str(reference).endswith(f".{named}") and isinstance(getattr(transformers, auto, None), type):
            return auto
    return named if isinstance(getattr(transformers, named or "-", None), type) else "AutoModel"


def check_loads(staged: Staged) -> int:
    """Loads the staged folder in a clean process and compares every output, bit for bit, with the source's here.

    Returns:
        how many values were compared.

    Raises:
        SourceError: where it does not load or run, or gives anything else.
    """
    auto_class = auto_class_of(staged.config)
    texts = sample_texts()[:TEXTS] if any((staged.folder / name).is_file() for name in VOCABULARIES) else []
    try:
        with quiet():
            # from the staged folder for an artefact: its source may lack the code
            source = staged.folder if staged.is_artefact else staged.source
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code="auto_map" in staged.config)
            batches = _batches(config, auto_class)
            expected = clean.run(str(source), auto_class, batches)
            ids = clean.tokens(str(source), texts) if texts else []
    except Exception as error:  # whatever a damaged checkpoint provokes
        raise SourceError(f"{staged.source}: does not load and run as {auto_class}: {_reason(error)}") from error
    with tempfile.TemporaryDirectory() as scratch:
        job = Path(scratch) / "job.json"
        told = {"auto_class": auto_class, "threads": torch.get_num_threads(), "texts": texts}
        job.write_text(json.dumps(told), encoding="utf-8")
        flat = {f"{batch}.{key}": value for batch, inputs in batches.items() for key, value in inputs.items()}
        save_file(flat, f"{job}.safetensors")
        found, found_ids = _in_clean_process(staged, job, Path(scratch))
    _compare(staged.source, expected, found)
    if found_ids != ids:
        raise SourceError(f"{staged.source}: its tokenizer gives other tokens when staged; nothing was sent.")
    return sum(value.numel() for value in expected.values())


def _batches(config: Any, auto_class: str) -> dict[str, dict[str, torch.Tensor]]:
    inputs = INPUTS[_main_input(config)](config, torch.Generator().manual_seed(SEED))
    if auto_class.endswith("ForMultipleChoice"):
        inputs = {key: value.unsqueeze(1) for key, value in inputs.items()}
    return {"random": inputs}


def _main_input(config: Any) -> str:
    """What a model of ours, dense or not, or one of Transformers' mixtures reads first."""
    families = (one for one in FAMILIES.values() if config.model_type in (one.model_type, one.config_class.model_type))
    return next((family.inputs for family in families), "input_ids")


def _in_clean_process(staged: Staged, job: Path, scratch: Path) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    outputs = scratch / "outputs.safetensors"
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules")}
    if not staged.is_artefact:
        environment["HF_HUB_OFFLINE"] = "1"  # an artefact fetches its base; nothing else needs anything
    command = [sys.executable, "-P", str(clean.__file__), str(staged.folder), str(job), str(outputs)]
    done = subprocess.run(
        command, env=environment, cwd=scratch, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SourceError(f"{staged.source}: the staged folder does not load where hf_moe is not: {last}")
    return load_file(outputs), json.loads(Path(f"{outputs}.json").read_text(encoding="utf-8"))


def _compare(source: Path, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    if expected.keys() != found.keys():
        raise SourceError(f"{source}: the staged folder has other outputs, {sorted(found)}, not {sorted(expected)}.")
    for name, value in expected.items():
        other = found[name]
        if value.shape != other.shape or not _same_bits(value, other):
            gap = f"by up to {(value - other).abs().max():.1e}" if value.shape == other.shape else "in shape"
            raise SourceError(f"{source}: {name} of the staged folder differs {gap}; nothing was sent.")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
