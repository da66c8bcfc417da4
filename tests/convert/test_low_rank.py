"""Upcycling to experts that share one network: an exact start, and back to experts of their own."""

import json

import pytest
import torch
from safetensors.torch import load_file

import hf_moe
from hf_moe.convert import certify, open_checkpoint, open_mixture
from hf_moe.errors import UsageError
from tests.conftest import batch

FORMS = ("bert", "gpt2", "llama")  # plain, transposed, gated
SIZES = {"num_experts": 4, "num_experts_per_tok": 2}


def scattered(folder, output):
    """As if trained: every weight moved, factors too."""
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(hf_moe, config["architectures"][0])
    model = model_class.from_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(output)
    return output


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("options", [{}, {"shared_expert_weight": 0.5}, {"dtype": "bfloat16"}], ids=str)
def test_the_start_is_exact(family, options, dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder(family), tmp_path / "moe", expert_rank=2, **SIZES, **options)
    assert str(made.plan.exactness) == "exact"
    assert made.certificate["passed"]
    assert made.certificate["weights"]["identical"]
    assert made.certificate["float64"]["max_rel"] < 1e-12
    again = certify(open_checkpoint(dense_folder(family)), open_checkpoint(made.path))  # from what is on disk alone
    assert again["passed"]


def test_the_network_is_stored_once(dense_folder, tmp_path):
    low = hf_moe.upcycle(dense_folder("llama"), tmp_path / "low", expert_rank=2, **SIZES)
    tensors = load_file(low.path / "model.safetensors")
    [prefix] = {name.rpartition(".")[0] for name in tensors if ".layers.0.mlp.experts." in name}
    assert tensors[f"{prefix}.down_proj"].shape == (1, 32, 64)
    assert tensors[f"{prefix}.gate_up_proj_a"].shape == (4, 2, 32)
    assert tensors[f"{prefix}.gate_up_proj_b"].shape == (4, 128, 2)
    assert not tensors[f"{prefix}.gate_up_proj_b"].any()
    first, second, *_ = tensors[f"{prefix}.gate_up_proj_a"]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("family", FORMS)
def test_expanded_experts_are_the_same_function(family, dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder(family), tmp_path / "low", expert_rank=2, dtype="float64", **SIZES)
    low = scattered(made.path, tmp_path / "trained")
    whole = hf_moe.expand_experts(low, tmp_path / "whole")
    config = json.loads((whole.path / "config.json").read_text())
    assert config["expert_rank"] == 0
    models = [
        getattr(hf_moe, config["architectures"][0]).from_pretrained(folder, dtype=torch.float64).eval()
        for folder in (low, whole.path)
    ]
    inputs = batch(family)
    with torch.no_grad():
        one, other = (model(**inputs).logits for model in models)
    torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-12)
    [report] = whole.path.glob("expand-experts.json")
    assert json.loads(report.read_text())["expert_rank"] == 2
    assert not [name for name, _ in models[1].named_parameters() if name.endswith(("_a", "_b"))]


def test_an_expert_is_read_whole(dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder("llama"), tmp_path / "low", expert_rank=2, **SIZES)
    low = scattered(made.path, tmp_path / "trained")
    mixture = open_mixture(open_checkpoint(low))
    tensors = load_file(low / "model.safetensors")
    prefix = next(name for name in tensors if name.endswith("layers.1.mlp.experts.gate_up_proj"))
    whole = tensors[prefix][0] + tensors[f"{prefix}_b"][3] @ tensors[f"{prefix}_a"][3]
    for role, rows in (("gate", whole[:64]), ("up", whole[64:])):
        torch.testing.assert_close(mixture.projection(1, role, "weight", 3), rows)
        pieces = torch.cat(list(mixture.projection_pieces(1, role, "weight", 3, 100)))
        torch.testing.assert_close(pieces.view_as(rows), rows)


def test_the_ways_back_take_them(dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder("bert"), tmp_path / "low", expert_rank=2, **SIZES)
    back = hf_moe.downcycle(made.path, tmp_path / "dense")
    assert back.certificate["passed"]
    low = scattered(made.path, tmp_path / "trained")
    fewer = hf_moe.merge_experts(low, tmp_path / "fewer", num_experts=2)
    model = hf_moe.BertMoeForMaskedLM.from_pretrained(fewer.path)
    assert (model.config.num_experts, model.config.expert_rank) == (2, 0)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"method": "split"}, "rules out method 'split'"),
        ({"granularity": 2}, "rules out granularity"),
        ({"noise_std": 0.1, "drop_ratio": 0.1}, "rules out drop_ratio, noise_std"),
        ({"expert_rank": -1}, "can't be negative"),
        ({"target": "native"}, "each of its experts is a network of its own"),
    ],
)
def test_what_does_not_go_together_is_refused(options, why, dense_folder, tmp_path):
    with pytest.raises(UsageError, match=why):
        hf_moe.upcycle(dense_folder("llama"), tmp_path / "moe", **{"expert_rank": 2, **SIZES, **options})
    assert not (tmp_path / "moe").exists()


def test_experts_of_their_own_are_not_expanded(dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe", **SIZES)
    with pytest.raises(UsageError, match="networks of their own already"):
        hf_moe.expand_experts(made.path, tmp_path / "again")


def test_commands(dense_folder, tmp_path, hf_moe_command):
    code, _, error = hf_moe_command(
        "upcycle", dense_folder("gpt2"), tmp_path / "low", "--expert-rank", 2, "--num-experts", 4
    )
    assert code == 0, error
    code, out, _ = hf_moe_command("inspect", tmp_path / "low", "--json")
    described = json.loads(out)
    assert described["expert_rank"] == 2
    tensors = load_file(tmp_path / "low" / "model.safetensors")
    factors = sum(t.numel() for name, t in tensors.items() if name.endswith(("_a", "_b")))
    assert described["parameters"] - described["active_parameters"] == factors // 2  # a token visits 2 of 4
    code, out, error = hf_moe_command("expand-experts", tmp_path / "low", tmp_path / "moe")
    assert code == 0, error
    code, out, error = hf_moe_command("verify", dense_folder("gpt2"), tmp_path / "moe")
    assert code == 0, error
