"""Every way to make experts: exact where the plan says so, off by about as much as it says where not."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import hf_moe
from hf_moe.convert import certify, open_checkpoint
from hf_moe.convert.compare import capture_feed_forward, load_model, make_batches
from hf_moe.convert.families import FAMILIES as TABLES
from hf_moe.convert.partition import balanced_kmeans, deal
from hf_moe.convert.scheme import scheme_of
from hf_moe.errors import SourceError, UsageError
from hf_moe.recipe import UpcycleRecipe
from tests.conftest import FAMILIES, dense_classes

EXACT = {
    "granular": {"num_experts": 8, "num_experts_per_tok": 4, "granularity": 2},
    "granular by weights": {"num_experts": 16, "num_experts_per_tok": 4, "granularity": 4, "partition": "kmeans"},
    "shared neurons": {"shared_expert_intermediate_size": 16},
    "shared by weights": {"shared_expert_intermediate_size": 16, "partition": "kmeans"},
    "shared and granular": {
        "shared_expert_intermediate_size": 16,
        "granularity": 4,
        "num_experts": 8,
        "num_experts_per_tok": 4,
    },
    "whole network shared": {"shared_expert_weight": 0.5},
    "half precision": {"dtype": "bfloat16", "granularity": 2},
}
NEARLY = {
    "thirds": {"granularity": 1, "shared_expert_weight": 0.3},
    "gates as they are": {"norm_topk_prob": False},
    "granular, gates as they are": {"norm_topk_prob": False, "granularity": 2},
    "all parts": {"method": "split", "num_experts_per_tok": 8, "router_init": "zero"},
}
CHANGED = {
    "noise": {"noise_std": 0.1},
    "drop": {"drop_ratio": 0.5},
    "a little drop": {"drop_ratio": 0.1},
    "split": {"method": "split"},
    "split by weights": {"method": "split", "partition": "kmeans"},
    "split with shared neurons": {"method": "split", "shared_expert_intermediate_size": 32},
    "unequal gates": {"norm_topk_prob": False, "router_init": "normal"},
}
FORMS = ("bert", "gpt2", "llama")  # plain, transposed, gated; every family is run through copies elsewhere


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("name", EXACT)
def test_exact(family, name, dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder(family), tmp_path / "moe", **EXACT[name])
    assert str(made.plan.exactness) == "exact"
    assert made.certificate["passed"]
    assert made.certificate["float64"]["max_rel"] < 1e-12
    again = certify(open_checkpoint(dense_folder(family)), open_checkpoint(made.path))  # from what is on disk alone
    assert again["passed"]
    assert again["weights"]["identical"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_may_share_and_cut(family, dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder(family), tmp_path / "moe", **EXACT["shared and granular"])
    assert made.certificate["passed"]


def block_error(dense, moe, family, layer=1):
    """Relative error of one mixture, root mean square, on what its dense twin sees."""
    dense_model = load_model(moe.plan.dense_class, open_checkpoint(dense), "float64")
    model = load_model(moe.plan.moe_class, open_checkpoint(moe.path), "float64")
    table = TABLES[family]
    batch = make_batches(open_checkpoint(dense), dense_model.config)[0][-1]
    x, y = capture_feed_forward(dense_model, table, batch)[layer]
    block = model.base_model.get_submodule(f"{table.layer.format(layer=layer)}.{table.block}")
    with torch.no_grad():
        return ((block(x) - y).norm() / y.norm()).item()


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("name", [*NEARLY, *CHANGED])
def test_the_expected_error_is_about_right(family, name, dense_folder, tmp_path):
    options = {**NEARLY, **CHANGED}[name]
    made = hf_moe.upcycle(dense_folder(family), tmp_path / "moe", verify=False, **options)
    exactness = made.plan.exactness
    assert exactness.kind == ("exact if" if name in NEARLY else "not preserving")
    measured = block_error(dense_folder(family), made, family)
    assert exactness.expected_error / 4 < measured < exactness.expected_error * 4, exactness


def test_not_exact_is_written_but_never_certified(dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe", method="split")
    assert made.certificate["weights"]["identical"]
    assert not made.certificate["passed"]


REFUSED = {
    "no multiple of granularity 4: the experts": {"num_experts": 6, "granularity": 4},
    "4 or 8 would do": {"num_experts": 8, "num_experts_per_tok": 6, "granularity": 4},
    "does not divide the 64 neurons": {"num_experts": 6, "num_experts_per_tok": 3, "granularity": 3},
    "must be at least 1": {"granularity": 0},
    "every expert is a part already": {"method": "split", "granularity": 2},
    "must leave some of the network's 64": {"shared_expert_intermediate_size": 64},
    "must lie between 0 and 1": {"shared_expert_weight": 1.0},
    "choose one": {"shared_expert_weight": 0.5, "shared_expert_intermediate_size": 8},
    "a share, from 0 to 1": {"drop_ratio": 1.5},
    "nothing cuts them": {"partition": "kmeans"},
    "name a file as calibration": {"granularity": 2, "partition": "coactivation"},
    "method is 'copied'; choose from copy, split": {"method": "copied"},
    "dtype is 'int8'; choose from float64, float32, bfloat16, float16": {"dtype": "int8"},
}


@pytest.mark.parametrize("words", REFUSED)
def test_impossible_schemes(words, dense_folder, tmp_path):
    with pytest.raises(UsageError, match=words):
        hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe", **REFUSED[words])
    assert not list(tmp_path.iterdir())


@settings(max_examples=200, deadline=None)
@given(
    experts=st.integers(2, 64),
    top_k=st.integers(1, 64),
    granularity=st.integers(1, 16),
    shared=st.integers(0, 300),
    width=st.integers(1, 300),
    method=st.sampled_from(["copy", "split"]),
)
def test_schemes_are_refused_or_whole(experts, top_k, granularity, shared, width, method):
    recipe = UpcycleRecipe(
        base_model="x",
        num_experts=experts,
        num_experts_per_tok=min(top_k, experts),
        granularity=granularity,
        shared_expert_intermediate_size=shared,
        method=method,
    )
    try:
        scheme = scheme_of(recipe, width, gated=False, dtype="float32")
    except UsageError:
        return
    assert scheme.parts * scheme.expert_width + scheme.shared_width == width
    assert experts % scheme.parts == 0
    if method == "copy":  # each copy of a network's W2 is counted once
        assert scheme.down_scale == granularity
        assert scheme.bias_scale + (1 if shared else 0) == 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), parts=st.integers(1, 6), room=st.integers(1, 9), shared=st.integers(0, 7))
def test_neurons_are_dealt_once(seed, parts, room, shared):
    generator = torch.Generator().manual_seed(seed)
    count = parts * room + shared
    for features in (None, torch.randn(count, 4, generator=generator)):
        parts_PF, shared_F = deal(count, parts, shared, features, generator)
        assert parts_PF.shape == (parts, room)
        assert sorted([*parts_PF.flatten().tolist(), *shared_F.tolist()]) == list(range(count))


def test_clusters_are_found():
    centres = torch.eye(4)
    points = (centres.repeat_interleave(8, 0) + 0.1 * torch.randn(32, 4)) * torch.rand(32, 1)
    order = torch.randperm(32)
    found = balanced_kmeans(points[order], 4, torch.Generator().manual_seed(0))
    assert all(len(set((order[part] // 8).tolist())) == 1 for part in found)


def test_the_neurons_that_fire_together_are_dealt_together(dense_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the dog sat on the mat\nwar and peace\n")
    options = {"granularity": 2, "partition": "coactivation", "calibration": str(text)}
    made = hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe", **options)
    assert made.certificate["passed"]
    recorded = json.loads((made.path / "config.json").read_text())["upcycled_from"]["recipe"]
    assert recorded["calibration"] == "text.txt"  # a path of this machine is nobody's business
    text.unlink()
    again = certify(open_checkpoint(dense_folder("bert")), open_checkpoint(made.path))
    assert again["weights"]["identical"]


def test_neurons_are_not_measured_on_text_that_the_model_does_not_read(dense_folder, tmp_path):
    (tmp_path / "text.txt").write_text("war and peace\n")
    options = {"granularity": 2, "partition": "coactivation", "calibration": str(tmp_path / "text.txt")}
    with pytest.raises(UsageError, match="measures on text, but a vit reads pixel_values: choose another"):
        hf_moe.upcycle(dense_folder("vit"), tmp_path / "moe", **options)
    assert not (tmp_path / "moe").exists()


def test_one_set_of_neurons_starts_anew_in_all_matrices(dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder("llama"), tmp_path / "moe", drop_ratio=0.25, verify=False)
    copies = hf_moe.upcycle(dense_folder("llama"), tmp_path / "copies", verify=False)
    one, other = (load_file(folder / "model.safetensors") for folder in (made.path, copies.path))
    prefix = "model.layers.1.mlp.experts."
    changed = (one[prefix + "gate_up_proj"] != other[prefix + "gate_up_proj"]).any(2).view(8, 2, 64)
    down = (one[prefix + "down_proj"] != other[prefix + "down_proj"]).any(1)
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert torch.equal(changed[:, 0], down)
    assert changed[:, 0].sum(1).tolist() == [16] * 8
    assert not torch.equal(changed[0], changed[1])


@pytest.mark.parametrize(
    "options", [{}, {"granularity": 2, "partition": "kmeans", "drop_ratio": 0.5, "noise_std": 0.1}]
)
def test_threads_do_not_matter(options, dense_folder, tmp_path):
    made = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made[threads] = hf_moe.upcycle(dense_folder("gpt2"), tmp_path / str(threads), verify=False, **options).path
    torch.set_num_threads(1)
    for file in made[1].iterdir():
        assert file.read_bytes() == (made[2] / file.name).read_bytes()


def test_numbers_that_a_dtype_can_not_hold(dense_folder, tmp_path):
    dense = tmp_path / "dense"
    model = dense_classes("bert")["BertForMaskedLM"].from_pretrained(dense_folder("bert"))
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[0, 0] = 1e30
    model.save_pretrained(dense)
    with pytest.raises(SourceError, match="holds numbers that F16 can't; choose bfloat16 or float32"):
        hf_moe.upcycle(dense, tmp_path / "moe", dtype="float16")
    assert hf_moe.upcycle(dense, tmp_path / "moe", dtype="bfloat16").certificate["passed"]
