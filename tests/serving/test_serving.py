"""Results in the places where models are used, always in a process that can't import hf_moe."""

import json

import pytest

from tests.serving.conftest import alone

PIPELINE = """
from transformers import pipeline
print(json.dumps([
    pipeline(task, model=folder, trust_remote_code=True)(text, **options)
    for task, folder, text, options in json.loads(sys.argv[1])
], default=float))
"""
TASKS = [
    ("fill-mask", "bert", None, "the dog sat on the [MASK]", {}),
    ("text-classification", "bert", "BertForSequenceClassification", "the dog sat", {"top_k": None}),
    ("token-classification", "bert", "BertForTokenClassification", "the dog sat", {}),
    ("text-generation", "gpt2", None, "abba", {"max_new_tokens": 8, "do_sample": False}),
]


def test_pipelines_give_what_the_dense_model_gives(pair, tmp_path):
    jobs = [(task, str(one), text, more) for task, *made, text, more in TASKS for one in pair(*made)]
    said = alone(PIPELINE, json.dumps(jobs), cwd=tmp_path)
    for expected, found in zip(said[::2], said[1::2], strict=True):
        assert len(expected) == len(found) > 0
        for one, other in zip(expected, found, strict=True):
            assert one.pop("score", 0) == pytest.approx(other.pop("score", 0), abs=1e-5)
            assert one == other


SENTENCES = """
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
said, trust = [], {"trust_remote_code": True}
for folder in sys.argv[1:3]:
    words = modules.Transformer(folder, model_kwargs=trust, config_kwargs=trust, processor_kwargs=trust)
    pooling = modules.Pooling(words.get_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[words, pooling], device="cpu")
    said.append(model.encode(["the dog sat", "war and peace"]).tolist())
model.save(sys.argv[3])
model = SentenceTransformer(sys.argv[3], trust_remote_code=True, device="cpu")
said.append(model.encode(["the dog sat", "war and peace"]).tolist())
print(json.dumps(said))
"""


def test_sentence_transformers(pair, tmp_path):
    """Built from the mixture, saved with its code, and loaded again."""
    expected, built, loaded = alone(SENTENCES, *pair("bert", "BertModel"), tmp_path / "saved", cwd=tmp_path)
    assert built == loaded
    for one, other in zip(expected, built, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert (tmp_path / "saved" / "modeling_bert_moe.py").is_file()


GENERATE = """
import torch
from transformers import AutoModelForCausalLM
ids = torch.tensor([[3, 4, 5, 6]])
models = [AutoModelForCausalLM.from_pretrained(folder) for folder in sys.argv[1:]]
said = [[type(one).__name__, one.generate(ids, max_new_tokens=12, do_sample=False).tolist()] for one in models]
print(json.dumps(said))
"""


def test_native_export_needs_no_code(pair, tmp_path):
    pairs = [pair(family, target="native") for family in ("llama", "qwen3")]
    assert not [file for _, moe in pairs for file in moe.glob("*.py")]
    llama, mixtral, qwen, qwen_moe = alone(GENERATE, *(one for two in pairs for one in two), cwd=tmp_path)
    assert [mixtral[0], qwen_moe[0]] == ["MixtralForCausalLM", "Qwen3MoeForCausalLM"]
    assert [mixtral[1], qwen_moe[1]] == [llama[1], qwen[1]]
