"""Disabled experts are as if they were not there: bit for bit as in a router, and a model, without them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_moe.modeling.moe_routers import NEVER, ForwardPass, TopKRouter
from tests.conftest import batch, tiny_moe

# Every kind of router, and what else decides how it routes.
ROUTERS = {
    "softmax": {},
    "not renormalised": {"norm_topk_prob": False},
    "sigmoid": {"router_type": "sigmoid"},
    "noisy": {"router_type": "noisy"},
    "top_p": {"router_type": "top_p", "router_top_p": 0.6},
    "expert_choice": {"router_type": "expert_choice"},
    "laplace": {"router_type": "laplace"},
    "groups": {"router_group_size": 2},
    "groups, top_p": {"router_group_size": 2, "router_type": "top_p"},
    "shared": {"shared_expert_intermediate_size": 16},
}
EXPERTS, GONE = 6, {0: (2, 3), 2: (0, 1)}


def mixture(**config):
    return tiny_moe("bert", num_experts=EXPERTS, **config)


def without(folder, output, gone=GONE):
    """The mixture with the experts' rows cut out of every tensor."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if (".experts." in name and len(tensor) > 1) or ".mlp.gate." in name:
            tensors[name] = tensor[[e for e in range(len(tensor)) if e not in gone[layer]]].contiguous()
    config = json.loads((folder / "config.json").read_text())
    config["num_experts"] -= 2
    output.mkdir()
    (output / "config.json").write_text(json.dumps(config))
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


def disable(command, folder, output, *experts):
    code, _, err = command("experts", "disable", folder, *experts, output, "-q")
    assert code == 0, err


@pytest.mark.parametrize("experts", ["eager", "sorted_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_as_if_they_were_not_there(kind, experts, tmp_path, hf_moe_command):
    mixture(**ROUTERS[kind]).save_pretrained(tmp_path / "moe")
    disable(hf_moe_command, tmp_path / "moe", tmp_path / "disabled", "0.2", "0.3", "2.0", "2.1")
    without(tmp_path / "moe", tmp_path / "without")
    disabled, cut = (
        AutoModelForMaskedLM.from_pretrained(tmp_path / folder, experts_implementation=experts)
        for folder in ("disabled", "without")
    )
    with torch.no_grad():
        got, wanted = (model(**batch("bert"), output_router_logits=True) for model in (disabled, cut))
    assert torch.equal(got.logits, wanted.logits)
    for layer, one, other in zip(GONE, got.router_logits, wanted.router_logits, strict=True):
        assert torch.equal(one[:, [e for e in range(EXPERTS) if e not in GONE[layer]]], other)
        assert (one[:, list(GONE[layer])] == NEVER).all()
    assert torch.isfinite(got.aux_loss)


@pytest.mark.parametrize("kind", ROUTERS)
def test_the_router_alone(kind):
    """Its choices, by the experts' old numbers, and its gates."""
    router = mixture(**ROUTERS[kind]).bert.encoder.layer[0].mlp.gate
    kept = [e for e in range(EXPERTS) if e not in GONE[0]]
    config = tiny_moe("bert", **ROUTERS[kind]).config
    cut = TopKRouter(config).eval()
    with torch.no_grad():
        for name in ("weight", "noise_weight", "e_score_correction_bias"):
            if getattr(router, name) is not None:
                getattr(cut, name).copy_(getattr(router, name)[kept])
    router.disabled = GONE[0]
    router.forward_pass = cut.forward_pass = ForwardPass(lambda tokens: None, counts=True)
    x_TD = torch.randn(50, config.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, gates_TK, index_TK = router(x_TD)
        _, wanted_gates_TK, wanted_TK = cut(x_TD)
    assert torch.equal(gates_TK, wanted_gates_TK)
    assert torch.equal(index_TK, torch.tensor([*kept, EXPERTS])[wanted_TK])
    assert not router.load_E[list(GONE[0])].any()


def test_trains_without_nan_and_without_them():
    model = mixture(disabled_experts={"0": [2, 3]}, router_z_loss_coef=0.1, router_entropy_coef=0.1).train()
    inputs = batch("bert")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    block = model.bert.encoder.layer[0].mlp
    for parameter in (block.gate.weight, block.experts.up_proj, block.experts.down_proj):
        assert torch.isfinite(parameter.grad).all()
        assert not parameter.grad[[2, 3]].any()
        assert parameter.grad[[0, 1, 4, 5]].any()


def test_balance_without_a_loss_is_among_the_others():
    model = mixture(router_type="sigmoid", disabled_experts={"0": [2, 3]})
    router = model.bert.encoder.layer[0].mlp.gate
    router.load_E = torch.tensor([5, 5, 0, 0, 5, 5])
    model.update_router_bias()
    assert not router.e_score_correction_bias[[0, 1, 4, 5]].any()


def test_equals_what_prune_leaves(tmp_path, hf_moe_command, dense_folder):
    (tmp_path / "text.txt").write_text("the cat sat on a mat\nthe law of the nation\n")
    moe, pruned = tmp_path / "moe", tmp_path / "pruned"
    upcycled = hf_moe_command(
        "upcycle", dense_folder("bert"), moe, "--num-experts", 4, "--noise-std", 0.5, "--no-verify"
    )
    assert upcycled[0] == 0, upcycled
    code, out, _ = hf_moe_command("prune", moe, pruned, "--num-experts", 3, "--text", tmp_path / "text.txt", "--json")
    groups = json.loads(out)["groups"]
    gone = [f"{layer}.{e}" for layer in groups for e in range(4) if e not in [group[0][0] for group in groups[layer]]]
    disable(hf_moe_command, moe, tmp_path / "disabled", *gone)
    with torch.no_grad():
        one, other = (
            AutoModelForMaskedLM.from_pretrained(folder)(**batch("bert")).logits
            for folder in (tmp_path / "disabled", pruned)
        )
    assert torch.equal(one, other)
    code, _, err = hf_moe_command("downcycle", tmp_path / "disabled", tmp_path / "dense")
    assert code == 2
    assert "disabled" in err


def test_one_after_the_other(tmp_path, hf_moe_command):
    mixture().save_pretrained(tmp_path / "moe")
    disable(hf_moe_command, tmp_path / "moe", tmp_path / "one", "0.3")
    disable(hf_moe_command, tmp_path / "one", tmp_path / "two", "0.1", "2.5")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["disabled_experts"] == {"0": [1, 3], "2": [5]}
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("moe", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_native_mixtures_lose_them(tmp_path, hf_moe_command, dense_folder):
    """Their routers can't be told, so the experts are cut out, as many in every layer."""
    made = hf_moe_command(
        "upcycle", dense_folder("llama"), tmp_path / "moe", "--target", "native", "--num-experts", 4, "--no-verify"
    )
    assert made[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    disable(hf_moe_command, tmp_path / "moe", tmp_path / "cut", "0.1", "1.3", "2.0")
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert cut.config.num_local_experts == 3
    for layer, gone in enumerate((1, 3, 0)):
        kept = [e for e in range(4) if e != gone]
        one, other = (m.model.layers[layer].mlp for m in (model, cut))
        assert torch.equal(one.gate.weight[kept], other.gate.weight)
        assert torch.equal(one.experts.down_proj[kept], other.experts.down_proj)
    code, _, err = hf_moe_command("experts", "disable", tmp_path / "moe", "0.1", tmp_path / "no")
    assert code == 2
    assert "as many in every layer" in err


@pytest.mark.parametrize(
    ("experts", "config", "words"),
    [
        (["0.9"], {}, "no expert 0.9"),
        (["1.0"], {}, "no expert 1.0"),
        (["0.0", "0.1", "0.2", "0.3", "0.4"], {}, "visits 2"),
        (["0.0"], {"router_group_size": 2}, "taken or left together"),
        (["0.*"], {}, "no single expert"),
        (["first"], {}, "LAYER.EXPERT"),
    ],
)
def test_what_can_not_be(experts, config, words, tmp_path, hf_moe_command):
    mixture(**config).save_pretrained(tmp_path / "moe")
    code, _, err = hf_moe_command("experts", "disable", tmp_path / "moe", *experts, tmp_path / "no")
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "no").exists()


def test_experts_of_low_rank_agree_to_rounding(tmp_path, hf_moe_command):
    """They are multiplied all at once, the disabled ones by 0, so sums are taken in another order."""
    mixture(expert_rank=2).save_pretrained(tmp_path / "moe")
    disable(hf_moe_command, tmp_path / "moe", tmp_path / "disabled", "0.2", "0.3", "2.0", "2.1")
    without(tmp_path / "moe", tmp_path / "without")
    with torch.no_grad():
        got, wanted = (
            AutoModelForMaskedLM.from_pretrained(tmp_path / folder)(**batch("bert")).logits
            for folder in ("disabled", "without")
        )
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
