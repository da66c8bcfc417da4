"""GGUF files: a tiny Llama written by the gguf package, read as the checkpoint it was made from."""

import json
import shutil
import sys
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import hf_moe
from hf_moe.cli import main
from hf_moe.convert import checkpoint as checkpoint_module
from hf_moe.convert import gguf as gguf_module
from hf_moe.convert import open_checkpoint
from hf_moe.convert.gguf_header import read_gguf_header
from tests.cli.test_bad_input import refused, truncate

TOKENS = ["<s>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwxyzĠ.,", "th"]
FLOAT32 = gguf.GGMLQuantizationType.F32


def llama_tensors(dense: Path) -> dict[str, np.ndarray]:
    """The tensors of a dense Llama, named and ordered as llama.cpp does: halves of a rotated head interleaved."""
    config = json.loads((dense / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    made = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if count := heads.get(module.rpartition(".")[2]):
            tensor = tensor.view(count, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        made[f"{names.get_name(module)}.{kind}"] = tensor.numpy()
    return made


def write_gguf(file: Path, dense: Path, kind=FLOAT32, change=lambda values, tensors: None, tokenizer=True) -> Path:
    """`dense` as a GGUF file, its matrices quantized as `kind`, after `change` had its hands on it."""
    config = json.loads((dense / "config.json").read_text())
    values = {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": config["vocab_size"],
    }
    tensors = llama_tensors(dense)
    change(values, tensors)
    writer = gguf.GGUFWriter(file, values.pop("general.architecture"))
    for name, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(name, value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
        writer.add_token_merges(["t h"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_pad_token_id(2)
    for name, tensor in tensors.items():
        stored = kind if tensor.ndim > 1 else FLOAT32
        writer.add_tensor(name, gguf.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def dense(dense_folder):
    return dense_folder("llama")


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q5_1"])
def test_a_file_is_read_as_what_it_was_made_from(kind, dense, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", dense, kind))
    original = open_checkpoint(dense)
    assert set(checkpoint.tensors) == set(original.tensors)
    for name in original.tensors:
        tensor = original.read(name).numpy()
        if tensor.ndim > 1:
            tensor = gguf.dequantize(gguf.quantize(tensor, kind), kind)
        np.testing.assert_array_equal(checkpoint.read(name).numpy(), tensor)
    for name in ("hidden_size", "num_key_value_heads", "max_position_embeddings", "vocab_size", "rope_parameters"):
        assert checkpoint.config[name] == original.config[name]
    assert "quantization_config" not in checkpoint.config


def test_upcycle_verify_and_inspect(dense, tmp_path, monkeypatch, capsys):
    file = write_gguf(tmp_path / "tiny.gguf", dense, gguf.GGMLQuantizationType.Q8_0)
    made = hf_moe.upcycle(file, tmp_path / "moe", num_experts=4)
    assert made.certificate["passed"]
    assert made.certificate["inputs"]["text"].startswith("10 texts")
    sha256 = {"tiny.gguf": checkpoint_module.file_sha256(file)}
    assert made.certificate["dense"]["sha256"] == sha256
    config = json.loads((made.path / "config.json").read_text())
    recipe = {"base_model": "tiny.gguf", "num_experts": 4}
    assert config["upcycled_from"] == {"source": "tiny.gguf", "revision": None, "sha256": sha256, "recipe": recipe}
    assert AutoTokenizer.from_pretrained(made.path).tokenize("the") == ["th", "e"]
    assert str(tmp_path) not in "".join(path.read_text() for path in made.path.glob("*.json"))

    for command in (["verify", file, made.path], ["inspect", file]):
        monkeypatch.setattr(sys, "argv", ["hf-moe", *map(str, command), "--json"])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert not exit_.value.code
        captured = capsys.readouterr()
        assert captured.err == ""
        printed = json.loads(captured.out)
        if command[0] == "verify":
            assert printed["moe"]["made_from_this_dense"]
        else:
            assert (printed["source"], printed["family"], printed["convertible"]) == ("tiny.gguf", "llama", True)


def test_in_memory(dense, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", dense, tokenizer=False)
    model = hf_moe.LlamaMoeForCausalLM.from_dense(file, num_experts=4)
    up = load_file(dense / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(model.model.layers[1].mlp.experts.gate_up_proj[3, 64:], up)


def test_a_file_is_read_once_whatever_its_name(dense, tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", dense)
    first = open_checkpoint(file)
    monkeypatch.setattr(gguf_module, "_load", None)
    again = open_checkpoint(shutil.copy(file, tmp_path / "other.gguf"))
    assert (again.path, again.source) == (first.path, "other.gguf")


def test_what_lies_beside_a_file_does_not_matter(dense, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{")
    evil = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(evil))
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", dense))
    assert checkpoint.has_tokenizer


def test_two_that_read_a_file_at_once(dense, tmp_path, cache, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", dense)
    load = gguf_module._load

    def overtaken(*arguments):
        monkeypatch.setattr(gguf_module, "_load", load)
        open_checkpoint(file)
        return load(*arguments)

    monkeypatch.setattr(gguf_module, "_load", overtaken)
    checkpoint = open_checkpoint(file)
    assert list((cache / "hf_moe" / "gguf").iterdir()) == [checkpoint.path]


def rewritten(values=(), tensors=()):
    """Some keys and tensors set, or taken away by None."""

    def change(all_values, all_tensors):
        for given, target in ((dict(values), all_values), (dict(tensors), all_tensors)):
            target.update(given)
            for name in [name for name, value in given.items() if value is None]:
                del target[name]

    return change


ROW = np.ones(4, dtype=np.float32)
UP = "blk.1.ffn_up.weight"

# What is written instead of a good file, and words of the sentence that answers.
WRONG = {
    "an architecture Transformers can't read": ({"general.architecture": "rwkv6"}, {}, "Transformers can't read it"),
    "a family without a table": (
        {"general.architecture": "mamba", "mamba.block_count": 1},
        {},
        "architecture 'mamba' can't be converted",
    ),
    "one part of several": ({"split.count": 3}, {}, "join the parts first"),
    "a mixture": ({"llama.expert_count": 8}, {}, "is a mixture of experts already"),
    "a tensor missing": ({}, {UP: None}, "'model.layers.1.mlp.up_proj.weight' is missing or"),
    "a tensor nobody reads": ({}, {"rope_freqs.weight": ROW}, "'rope_freqs.weight' has no place in Transformers'"),
    "scaled positions": ({"llama.rope.scaling.type": "yarn"}, {}, "scales its positions (yarn)"),
    "a tensor of another shape": ({}, {UP: np.ones((3, 32), dtype=np.float32)}, f"{UP!r} has no place"),
    "a tensor turned over": ({}, {UP: np.ones((32, 64), dtype=np.float32)}, "up_proj.weight' is missing or"),
    "absurdly many layers": ({"llama.block_count": 2**32 - 1}, {}, "says 4294967295 layers, but holds 3"),
    "fewer layers": ({"llama.block_count": 2}, {}, "has no place"),
    "an absurd vocabulary": ({"llama.vocab_size": 2**32 - 1}, {}, "'output.weight' has no place"),
    "no number of layers": ({"llama.block_count": "many"}, {}, "Transformers can't read it"),
    "a tokenizer of no kind": ({"tokenizer.ggml.model": "tea"}, {}, "stating tokenizer 'tea'"),
    "another alignment": ({"general.alignment": "wide"}, {}, "an alignment of 'wide'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_not_what_it_says(case, dense, tmp_path, monkeypatch, capsys):
    values, tensors, words = WRONG[case]
    tokenizer = "tokenizer.ggml.model" not in values
    file = write_gguf(tmp_path / "tiny.gguf", dense, change=rewritten(values, tensors), tokenizer=tokenizer)
    refused(monkeypatch, capsys, tmp_path, 1, words, "upcycle", file, tmp_path / "moe")


def overwrite(position, data):
    def damage(file):
        with open(file, "r+b") as handle:
            handle.seek(position)
            handle.write(data)

    return damage


BROKEN = {
    "empty": (lambda file: truncate(file, 0), "is no GGUF file"),
    "another format": (overwrite(0, b"GGML"), "is no GGUF file"),
    "a version of the past": (overwrite(4, b"\1"), "version 1, where 2 and 3 are read"),
    "the other byte order": (overwrite(4, b"\0\0\0\3"), "version 50331648"),
    "cut in its header": (lambda file: truncate(file, 300), "its GGUF header is cut short or damaged"),
    "cut in its first words": (lambda file: truncate(file, 10), "its GGUF header is cut short or damaged"),
    "cut in its tensors": (lambda file: truncate(file, -200), "it is cut short or damaged"),
    "tensors without end": (overwrite(8, b"\xff" * 8), "its GGUF header is cut short or damaged"),
    "values without end": (overwrite(16, b"\xff" * 8), "its GGUF header is cut short or damaged"),
    "a key without end": (overwrite(24, b"\xff" * 8), "beyond the end of the file"),
    "a key that is no text": (overwrite(32, b"\xff"), "its GGUF header is cut short or damaged"),
    "a value of no type": (overwrite(52, b"\x63"), "a value of type 99"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_file(case, dense, tmp_path, monkeypatch, capsys):
    file = write_gguf(tmp_path / "tiny.gguf", dense)
    damage, words = BROKEN[case]
    damage(file)
    refused(monkeypatch, capsys, tmp_path, 1, words, "upcycle", file, tmp_path / "moe")


def test_any_byte_of_a_header_may_be_wrong(dense, tmp_path):
    """Read or refused, but never a crash or a hang."""
    file = write_gguf(tmp_path / "tiny.gguf", dense)
    good = file.read_bytes()
    refusals = 0
    for position in range(0, 4000, 7):
        file.write_bytes(good[:position] + bytes([good[position] ^ 0x80]) + good[position + 1 :])
        try:
            read_gguf_header(file)
        except hf_moe.errors.SourceError:
            refusals += 1
    assert refusals > 100


def test_an_output_that_holds_the_file(dense, tmp_path, monkeypatch, capsys):
    """Beside a config.json, say, where --overwrite would take its folder for an old checkpoint."""
    shutil.copytree(dense, tmp_path / "both")
    file = write_gguf(tmp_path / "both" / "tiny.gguf", dense)
    open_checkpoint(file)
    refused(monkeypatch, capsys, tmp_path, 2, "overlaps", "upcycle", file, tmp_path / "both", "--overwrite")


def test_without_the_package(dense, tmp_path, monkeypatch, capsys):
    file = write_gguf(tmp_path / "tiny.gguf", dense)
    monkeypatch.setattr(gguf_module, "is_gguf_available", lambda: False)
    refused(monkeypatch, capsys, tmp_path, 2, "pip install 'hf_moe[gguf]'", "upcycle", file, tmp_path / "moe")


def test_a_file_that_is_not_there(tmp_path, monkeypatch, capsys):
    refused(monkeypatch, capsys, tmp_path, 1, "no such file", "upcycle", "tiny.gguf", tmp_path / "moe")


def test_a_cache_without_room(dense, tmp_path, monkeypatch, capsys):
    file = write_gguf(tmp_path / "tiny.gguf", dense)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    refused(monkeypatch, capsys, tmp_path, 1, "1,000 free", "upcycle", file, tmp_path / "moe")
