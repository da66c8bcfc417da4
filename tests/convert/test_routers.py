"""Every kind of router as the start of a mixture: exact where the plan says so, refused where it can't be."""

import json

import pytest
import torch

import hf_moe
from hf_moe.convert import certify, open_checkpoint, plan_upcycle
from hf_moe.convert.compare import capture_feed_forward, load_model, make_batches
from hf_moe.convert.families import FAMILIES as TABLES
from hf_moe.errors import UsageError
from hf_moe.modeling.moe_router_kinds import ROUTERS
from hf_moe.modeling.moe_routers import TopKRouter
from hf_moe.recipe import UpcycleRecipe
from tests.conftest import FAMILIES

EXACT = [kind for kind in ROUTERS if kind != "expert_choice"]
GRANULAR = {"num_experts": 8, "num_experts_per_tok": 4, "granularity": 2}
TEXT = ["the dog sat on the mat", "war and peace"]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("options", [{}, GRANULAR, {"shared_expert_intermediate_size": 16}], ids=str)
def test_exact(family, kind, options, dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder(family), tmp_path / "moe", router_type=kind, **options)
    assert str(made.plan.exactness) == "exact"
    assert made.certificate["passed"]
    assert made.certificate["float64"]["max_rel"] <= 1e-12
    assert json.loads((made.path / "config.json").read_text())["router_type"] == kind
    again = certify(open_checkpoint(dense_folder(family)), open_checkpoint(made.path))
    assert again["passed"]
    assert again["weights"]["identical"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_with_a_selection_bias(family, dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder(family), tmp_path / "moe", router_type="sigmoid")
    assert made.certificate["passed"]
    bias = [tensor for tensor in made.plan.tensors if tensor.name.endswith("gate.e_score_correction_bias")]
    assert [tensor.shape for tensor in bias] == [(8,)] * len(made.plan.networks)


def test_the_selection_bias_is_float32_in_a_checkpoint_of_bfloat16(dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe", router_type="sigmoid", dtype="bfloat16")
    assert made.certificate["passed"]
    held = open_checkpoint(made.path).tensors
    assert {info.dtype for name, info in held.items() if name.endswith("e_score_correction_bias")} == {"F32"}
    assert {info.dtype for name, info in held.items() if name.endswith("gate.weight")} == {"BF16"}


def test_experts_that_choose_are_not_the_dense_network(dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe", router_type="expert_choice")
    assert str(made.plan.exactness).startswith("not preserving: experts choose tokens, and some tokens are chosen by")
    assert made.certificate["weights"]["identical"]
    assert not made.certificate["passed"]
    dense = load_model(made.plan.dense_class, open_checkpoint(dense_folder("bert")), "float64")
    model = load_model(made.plan.moe_class, open_checkpoint(made.path), "float64")
    batch = make_batches(open_checkpoint(dense_folder("bert")), dense.config)[0][-1]
    x, y = capture_feed_forward(dense, TABLES["bert"], batch)[1]
    with torch.no_grad():
        measured = float((model.base_model.encoder.layer[1].mlp(x) - y).norm() / y.norm())
    assert made.plan.exactness.expected_error / 4 < measured < made.plan.exactness.expected_error * 4


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_router_of_distances_starts_with_the_deviation_asked_for(family, dense_folder, tmp_path):
    """On inputs as the plan takes them: what the norm puts out, of unit variance before its weight and bias."""
    made = hf_moe.upcycle(dense_folder(family), tmp_path / "moe", router_type="laplace", num_experts=64, verify=False)
    model = load_model(made.plan.moe_class, open_checkpoint(made.path), "float64")
    names = made.plan.networks[1].norm
    weight, *bias = [made.plan.source.read(name).double() for name in names]
    z = torch.randn(2000, len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = z * weight + (bias[0] if bias else 0)
    router = [module for module in model.modules() if isinstance(module, TopKRouter)][1]
    logits = router(x)[0]
    logits = logits - logits.mean(1, keepdim=True)
    assert 0.07 < logits.std() < 0.13


def test_groups_of_granular_copies_stay_tied(dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe", verify=False, **GRANULAR)
    model = load_model(made.plan.moe_class, open_checkpoint(made.path), "float32")
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    assert {router.group_size for router in routers} == {2}
    before = model(torch.arange(5, 15)[None]).logits
    model.config.router_group_size = 1  # as a checkpoint from before the field
    model.save_pretrained(tmp_path / "untied")
    again = load_model(made.plan.moe_class, open_checkpoint(tmp_path / "untied"), "float32")
    torch.testing.assert_close(again(torch.arange(5, 15)[None]).logits, before, rtol=1e-5, atol=1e-6)


REFUSED = {
    "did you mean 'sigmoid'": {"router_type": "sigmod"},
    "what gates sum to would be unknown": {"router_type": "sigmoid", "norm_topk_prob": False},
    "use method 'copy'": {"router_type": "top_p", "method": "split"},
    "its routers are softmax top-k": {"router_type": "laplace", "target": "native"},
    "leak the future": {"router_type": "expert_choice"},
}


@pytest.mark.parametrize("words", REFUSED)
def test_impossible_kinds(words, dense_folder, tmp_path):
    with pytest.raises(UsageError, match=words):
        hf_moe.upcycle(dense_folder("llama"), tmp_path / "moe", **REFUSED[words])
    assert not (tmp_path / "moe").exists()


def test_auto_writes_our_class_where_the_native_one_has_no_such_router(dense_folder):
    checkpoint = open_checkpoint(dense_folder("llama"))
    plan = plan_upcycle(checkpoint, UpcycleRecipe(base_model="x", router_type="sigmoid", target="auto"))
    assert plan.target.kind == "hf_moe"
    assert "softmax top-k" in plan.notes[0]


@pytest.mark.parametrize("kind", ["top_p", "expert_choice"])
def test_a_note_says_that_k_is_not_read(kind, dense_folder):
    plan = plan_upcycle(open_checkpoint(dense_folder("bert")), UpcycleRecipe(base_model="x", router_type=kind))
    assert any("num_experts_per_tok is not read" in note for note in plan.notes)


@pytest.mark.parametrize("kind", EXACT)
def test_the_way_back_to_dense(kind, dense_folder, tmp_path):
    hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe", router_type=kind, verify=False)
    (tmp_path / "text").write_text("\n".join(TEXT))
    made = hf_moe.downcycle(tmp_path / "moe", tmp_path / "dense", by="best", text=tmp_path / "text")
    assert made.report["text"]["difference"] == pytest.approx(0, abs=1e-5)


def test_fewer_experts_are_for_softmax_routers(dense_folder, tmp_path):
    hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe", router_type="sigmoid", verify=False)
    with pytest.raises(UsageError, match="has routers of type 'sigmoid'; merge-experts knows softmax ones only"):
        hf_moe.merge_experts(tmp_path / "moe", tmp_path / "fewer", num_experts=4)
