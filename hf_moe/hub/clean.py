"""Runs a folder's model on given inputs: here, and as a script in a process that has never heard of hf_moe.

Imports nothing of ours, for that reason. As a script: `clean.py FOLDER JOB OUTPUTS`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file


def run(folder: str, auto_class: str, batches: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`batch.output` -> tensor, of every float output of the model that `auto_class` loads."""
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=_has_code(folder)).eval()
    found = {}
    with torch.no_grad():
        for name, inputs in batches.items():
            fitting = {key: v.to(model.dtype) if v.is_floating_point() else v for key, v in inputs.items()}
            for key, value in model(**fitting, return_dict=True).items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    found[f"{name}.{key}"] = value.contiguous().clone()
    return found


def tokens(folder: str, texts: list[str]) -> list[list[int]]:
    """What the folder's tokenizer makes of `texts`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=_has_code(folder))
    return tokenizer(texts)["input_ids"]


def _has_code(folder: str) -> bool:
    return "auto_map" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def _main(folder: str, job_file: str, outputs_file: str) -> None:
    sys.modules["hf_moe"] = None  # type: ignore[assignment]
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    job: dict[str, Any] = json.loads(Path(job_file).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    batches: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in load_file(f"{job_file}.safetensors").items():
        batch, _, key = name.partition(".")
        batches.setdefault(batch, {})[key] = value
    save_file(run(folder, job["auto_class"], batches), outputs_file)
    ids = tokens(folder, job["texts"]) if job["texts"] else []
    Path(f"{outputs_file}.json").write_text(json.dumps(ids), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
