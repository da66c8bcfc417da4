"""Results in the places where models are used, always in a process that can't import hf_moe."""

import json
import os
import subprocess
import sys

import pytest

import hf_moe

WITHOUT = "import json, sys; sys.modules['hf_moe'] = None\n"


def alone(code, *arguments, cwd):
    """What `code` prints as JSON, in a clean process without a network."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cwd / "modules")},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def pair(dense_folder, tmp_path_factory):
    """(family, head) -> a dense folder and its mixture."""
    made = {}

    def make(family, head=None, **how):
        key = (family, head, *how.values())
        if key not in made:
            dense = dense_folder(family, head)
            output = tmp_path_factory.mktemp("serving") / "moe"
            made[key] = dense, hf_moe.upcycle(dense, output, num_experts=4, verify=False, **how).path
        return made[key]

    return make


PIPELINE = """
from transformers import pipeline
run = pipeline(sys.argv[1], model=sys.argv[2], trust_remote_code=True)
print(json.dumps(run(sys.argv[3], **json.loads(sys.argv[4]))))
"""


@pytest.mark.parametrize(
    ("task", "family", "head", "text", "options"),
    [
        ("fill-mask", "bert", None, "the dog sat on the [MASK]", {}),
        ("text-classification", "bert", "BertForSequenceClassification", "the dog sat", {"top_k": None}),
        ("token-classification", "bert", "BertForTokenClassification", "the dog sat", {}),
        ("text-generation", "gpt2", None, "abba", {"max_new_tokens": 8, "do_sample": False}),
    ],
)
def test_pipelines_give_what_the_dense_model_gives(task, family, head, text, options, pair, tmp_path):
    dense, moe = pair(family, head)
    expected, found = (alone(PIPELINE, task, one, text, json.dumps(options), cwd=tmp_path) for one in (dense, moe))
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        assert {key: value for key, value in one.items() if key != "score"} == {
            key: value for key, value in other.items() if key != "score"
        }
        assert one.get("score", 0) == pytest.approx(other.get("score", 0), abs=1e-5)


SENTENCES = """
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
trust = {"trust_remote_code": True}
words = modules.Transformer(sys.argv[1], model_kwargs=trust, config_kwargs=trust)
model = SentenceTransformer(modules=[words, modules.Pooling(words.get_embedding_dimension(), "mean")], device="cpu")
if len(sys.argv) > 2:
    model.save(sys.argv[2])
    model = SentenceTransformer(sys.argv[2], trust_remote_code=True, device="cpu")
print(json.dumps(model.encode(["the dog sat", "war and peace"]).tolist()))
"""


def test_sentence_transformers(pair, tmp_path):
    """Built from the mixture, saved with its code, and loaded again."""
    dense, moe = pair("bert", "BertModel")
    expected = alone(SENTENCES, dense, cwd=tmp_path)
    found = alone(SENTENCES, moe, tmp_path / "saved", cwd=tmp_path)
    for one, other in zip(expected, found, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert (tmp_path / "saved" / "modeling_bert_moe.py").is_file()


GENERATE = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([[3, 4, 5, 6]])
print(json.dumps([type(model).__name__, model.generate(ids, max_new_tokens=12, do_sample=False).tolist()]))
"""


@pytest.mark.parametrize(("family", "name"), [("llama", "MixtralForCausalLM"), ("qwen3", "Qwen3MoeForCausalLM")])
def test_native_export_needs_no_code(family, name, pair, tmp_path):
    dense, moe = pair(family, target="native")
    assert not list(moe.glob("*.py"))
    (_, expected), (found, ids) = (alone(GENERATE, one, cwd=tmp_path) for one in (dense, moe))
    assert (found, ids) == (name, expected)
