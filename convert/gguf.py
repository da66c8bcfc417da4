"""GGUF files: Transformers reads one, and it is kept as an ordinary dense checkpoint in the Hugging Face cache."""

import io
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import is_gguf_available

from hf_moe.errors import HfMoeError, OutputError, SourceError, UsageError

from .checkpoint import Checkpoint, file_sha256, open_checkpoint
from .classes import find_family
from .gguf_header import GgufHeader, read_gguf_header
from .output import check_output, whole_folder
from .quiet import quiet

DTYPE = torch.float32  # holds every value of a quantized block
NO_TOKENIZER = (None, "none", "no_vocab")
WHAT_WORKS = "start from the model's original checkpoint"


def open_gguf(file: Path) -> Checkpoint:
    """The dense checkpoint that `file` holds; unpacked where it was not yet.

    Its folder is named by the file's content and by Transformers' version, and depends on nothing else.

    Raises:
        SourceError, UsageError: where the file can't be read as what it says it is, in one line.
        OutputError: where the cache can't be written.
    """
    if not is_gguf_available():
        raise UsageError(f"{file}: needs the package gguf; pip install 'hf_moe[gguf]'.")
    header = read_gguf_header(file)
    _check_header(file, header)
    sha256 = file_sha256(file)
    folder = Path(constants.HF_HOME, "hf_moe", "gguf", f"{sha256}-transformers-{transformers.__version__}")
    if not folder.is_dir():
        model, tokenizer = _load(file, header)
        _save(model, tokenizer, folder, file)
    return replace(open_checkpoint(folder), source=file.name, gguf=file, gguf_sha256=sha256)


def _check_header(file: Path, header: GgufHeader) -> None:
    """What Transformers would not notice."""
    architecture = header.values.get("general.architecture")
    if header.values.get("split.count", 1) not in (0, 1):
        raise SourceError(f"{file}: is one part of a split model; join the parts first (llama-gguf-split --merge).")
    if header.values.get(f"{architecture}.expert_count", 0) not in (0, 1):
        raise SourceError(f"{file}: is a mixture of experts already; start from a dense one.")


def _load(file: Path, header: GgufHeader) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer (None if there is none) of `file`, which Transformers sees alone in a folder: what lies
    beside it must not matter."""
    with tempfile.TemporaryDirectory(prefix="hf_moe.") as folder, _transformers_reading(file):
        Path(folder, "model.gguf").symlink_to(file.resolve())

        def read(auto_class: Any, **options: Any) -> Any:
            return auto_class.from_pretrained(folder, gguf_file="model.gguf", trust_remote_code=False, **options)

        config = read(AutoConfig)
        find_family(Checkpoint(file, file.name, None, config.to_dict(), {}))
        _check_config(file, header, config)
        model, report = read(
            AutoModelForCausalLM,
            config=config,
            dtype=DTYPE,
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,  # but reported
            output_loading_info=True,
        )
        wrong = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
        if wrong:
            raise SourceError(f"{file}: tensor {min(wrong)!r} is missing or of another shape.")
        has_tokenizer = header.values.get("tokenizer.ggml.model") not in NO_TOKENIZER
        return model, read(AutoTokenizer) if has_tokenizer else None


@contextmanager
def _transformers_reading(file: Path) -> Iterator[None]:
    try:
        with quiet(), redirect_stderr(io.StringIO()):  # its progress bar asks nobody
            yield
    except HfMoeError:
        raise
    except Exception as error:  # whatever a file provokes that is not what it says
        reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
        raise SourceError(f"{file}: Transformers can't read it: {reason}") from error


def _check_config(file: Path, header: GgufHeader, config: PretrainedConfig) -> None:
    """What Transformers makes of the header, held against it: it leaves out what it has no name for."""
    held = {match[1] for name in header.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    if config.num_hidden_layers > len(held):  # before anything is built from it
        raise SourceError(f"{file}: says {config.num_hidden_layers} layers, but holds {len(held)}.")
    scaling = header.values.get(f"{header.values['general.architecture']}.rope.scaling.type")
    rope = getattr(config, "rope_parameters", None) or {}
    read = {values.get("rope_type") for values in (rope, *rope.values()) if isinstance(values, dict)}
    if scaling not in (None, "none", *read):
        raise SourceError(f"{file}: scales its positions ({scaling}), which Transformers does not read; {WHAT_WORKS}.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    places = Counter(tensor.numel() for tensor in model.state_dict().values())
    for name, elements in header.tensors.items():
        if not places[elements]:
            known = type(model).__name__
            raise SourceError(f"{file}: tensor {name!r} has no place in Transformers' {known}; {WHAT_WORKS}.")
        places[elements] -= 1


def _save(model: PreTrainedModel, tokenizer: Any, folder: Path, file: Path) -> None:
    """Under a name of this process first: another may be making the same folder, or reading it already."""
    check_output(folder, [file], model.num_parameters() * DTYPE.itemsize, overwrite=True)
    own = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        with whole_folder(own, folder.name, overwrite=True) as (partial, _), quiet():
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        own.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(own, ignore_errors=True)
        if not folder.is_dir():  # else another was faster
            raise OutputError(f"{folder}: can't be written ({error}).") from error
