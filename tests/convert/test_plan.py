"""Plans, for any choice of options: every source tensor accounted for, every target tensor written once."""

import json

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import hf_moe
from hf_moe.convert import FAMILIES as TABLES
from hf_moe.convert import open_checkpoint, plan_upcycle
from hf_moe.convert.classes import body_of, find_family, moe_classes
from hf_moe.convert.experts import with_noise
from hf_moe.convert.routers import calibrated_normal
from hf_moe.convert.writer import split
from hf_moe.errors import SourceError, UsageError
from hf_moe.modeling import CONFIGS
from hf_moe.recipe import UpcycleRecipe, parse_layers
from tests.conftest import FAMILIES, TEXT_FAMILIES, batch, block_name
from tests.families import TESTED

HEADS = [(family, name) for family in FAMILIES for name in sorted(moe_classes(TABLES[family]))]


def test_every_registered_family_has_a_table():
    assert {name: table.config_class for name, table in TABLES.items()} == CONFIGS


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(FAMILIES),
    num_experts=st.integers(2, 9),
    layers=st.sets(st.integers(0, 2), min_size=1),
    top_k=st.integers(1, 9),
    shard=st.sampled_from(["5GB", "40KB", "1MB", "5KB"]),
)
def test_everything_is_used_once(dense_folder, family, num_experts, layers, top_k, shard):
    checkpoint = open_checkpoint(dense_folder(family))
    recipe = UpcycleRecipe(
        base_model="x",
        num_experts=num_experts,
        num_experts_per_tok=min(top_k, num_experts),
        moe_layers=sorted(layers),
        max_shard_size=shard,
    )
    plan = plan_upcycle(checkpoint, recipe)
    assert not plan.problems
    used = {plan.source.names[source] for tensor in plan.tensors for source in tensor.sources}
    assert used | set(plan.dropped) == set(checkpoint.tensors)
    names = [tensor.name for tensor in plan.tensors]
    assert len(names) == len(set(names))
    in_shards = [tensor.name for tensors in split(plan.tensors, shard).values() for tensor in tensors]
    assert sorted(in_shards) == sorted(names)
    assert plan.nbytes == sum(tensor.nbytes for tensor in plan.tensors)
    with torch.device("meta"):
        model = plan.moe_class(plan.config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {tensor.name: tensor.shape for tensor in plan.tensors}.items() <= wanted.items()
    assert set(wanted) - set(names) <= set(model.all_tied_weights_keys)


@pytest.mark.parametrize(("family", "name"), HEADS)
def test_every_head_is_converted_exactly(family, name, dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder(family, name), tmp_path / "moe", num_experts=4, moe_layers=[0, 2])
    certificate = made.certificate
    assert certificate["passed"]
    assert certificate["moe"]["class"] == moe_classes(TABLES[family])[name].__name__
    assert certificate["moe"]["made_from_this_dense"]
    assert certificate["float32"]["max_rel"] <= max(1e-6, 2 * certificate["float32"]["dense_rounding"])
    assert certificate["float64"]["max_rel"] <= 1e-12
    reads_text = family in TEXT_FAMILIES
    assert certificate["inputs"]["text"].startswith("10 texts" if reads_text else "none: the model reads ")
    assert certificate["inputs"]["padding"] == ("attention_mask" in batch(family))


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in FAMILIES for name in TABLES[family].refused]
)
def test_a_form_that_the_table_refuses(family, name, dense_folder, tmp_path):
    with pytest.raises(SourceError, match=f"sets {name}, which can't be converted"):
        hf_moe.upcycle(dense_folder(family, **{name: True}), tmp_path / "moe")


VARIANTS = [(family, config) for family, row in TESTED.items() for config in row.variants]


@pytest.mark.parametrize(("family", "config"), VARIANTS, ids=str)
def test_variants_are_converted_exactly(family, config, dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder(family, **config), tmp_path / "moe", num_experts=4, moe_layers=[0, 2])
    assert made.certificate["passed"]
    assert made.certificate["float64"]["max_rel"] <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("top_k", "dtype"), [(1, "float16"), (2, "bfloat16"), (4, "bfloat16")])
def test_half_precision_checkpoints(family, top_k, dtype, dense_folder, tmp_path):
    dense = tmp_path / "dense"
    getattr(transformers, TESTED[family].lm).from_pretrained(dense_folder(family), dtype=dtype).save_pretrained(dense)
    made = hf_moe.upcycle(dense, tmp_path / "moe", num_experts=4, num_experts_per_tok=top_k)
    assert made.certificate["passed"]
    assert {tensor.dtype for tensor in load_file(made.path / "model.safetensors").values()} == {getattr(torch, dtype)}
    assert json.loads((made.path / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_on_the_way_is_exactly_the_rounded_dense_model(family, dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder(family), tmp_path / "moe", num_experts=4, dtype="bfloat16")
    assert made.certificate["passed"]
    assert {tensor.dtype for tensor in load_file(made.path / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_copies_and_noise_is_seeded(family, dense_folder, tmp_path):
    made = {
        name: load_file(hf_moe.upcycle(dense_folder(family), tmp_path / name, **options).path / "model.safetensors")
        for name, options in {
            "copies": {},
            "noisy": {"noise_std": 0.1},
            "again": {"noise_std": 0.1},
            "other": {"noise_std": 0.1, "seed": 1},
        }.items()
    }
    [down] = [name for name in made["copies"] if name.endswith(f"0.{block_name(family)}.experts.down_proj")]
    copies, noisy = made["copies"][down], made["noisy"][down]
    assert all(torch.equal(copies[0], expert) for expert in copies)
    deviation = (noisy - copies).std() / copies[0].std()
    assert 0.08 < deviation < 0.12
    assert not torch.equal(noisy[0], noisy[1])
    assert torch.equal(noisy, made["again"][down])
    assert not torch.equal(noisy, made["other"][down])
    biases = [name for name in made["copies"] if name.endswith("_bias")]
    assert all(torch.equal(made["noisy"][name], made["copies"][name]) for name in biases)


@pytest.mark.parametrize(
    ("family", "config"), [(family, config) for family, row in TESTED.items() for config in ({}, *row.variants)]
)
def test_the_router_is_calibrated_on_what_it_reads(family, config, dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder(family, **config), tmp_path / "moe", num_experts=64, verify=False)
    model = made.plan.moe_class.from_pretrained(made.path).eval()
    with torch.no_grad():
        router_logits = model(**batch(family, rows=8, padding=False), output_router_logits=True).router_logits
    for logits in router_logits:
        assert 0.05 < logits.std(0).mean() < 0.2, "0.1 was asked for"


@pytest.mark.parametrize("before", [True, False])
def test_the_norm_that_calibrates_is_the_one_before(before, dense_folder):
    checkpoint = open_checkpoint(dense_folder("opt", do_layer_norm_before=before))
    plan = plan_upcycle(checkpoint, UpcycleRecipe(base_model="x"))
    sources = {source for tensor in plan.tensors if tensor.method == "router" for source in tensor.sources}
    name = "final_layer_norm" if before else "self_attn_layer_norm"
    wanted = {f"model.decoder.layers.{layer}.{name}.{kind}" for layer in range(3) for kind in ("weight", "bias")}
    assert sources == wanted


def test_noise_is_no_exact_start_and_says_so(dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe", noise_std=0.1)
    assert made.plan.exactness.kind == "not preserving"
    assert not made.certificate["passed"]
    assert made.certificate["float64"]["max_rel"] > 1e-3


def test_the_same_recipe_gives_the_same_bytes(dense_folder, tmp_path):
    for name in ("one", "two"):
        hf_moe.upcycle(dense_folder("bert"), tmp_path / name, max_shard_size="40KB")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "two").iterdir())
    assert len([file for file in files if file.startswith("model-")]) > 1
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    whole = hf_moe.upcycle(dense_folder("bert"), tmp_path / "whole").path / "model.safetensors"
    parts = [load_file(file) for file in (tmp_path / "one").glob("model-*.safetensors")]
    merged = {name: tensor for part in parts for name, tensor in part.items()}
    for name, tensor in load_file(whole).items():
        assert torch.equal(tensor, merged[name])


def test_notes_warn_of_what_training_will_meet(dense_folder):
    checkpoint = open_checkpoint(dense_folder("bert"))
    notes = plan_upcycle(checkpoint, UpcycleRecipe(base_model="x", num_experts_per_tok=1)).notes
    assert any("top-k 1" in note for note in notes)


@pytest.mark.parametrize(("family", "config"), [*((family, {}) for family in FAMILIES), *VARIANTS], ids=str)
def test_the_norm_by_which_routers_are_calibrated_makes_their_inputs(family, config, dense_folder):
    checkpoint = open_checkpoint(dense_folder(family, **config))
    table = find_family(checkpoint)
    model = getattr(transformers, TESTED[family].lm).from_pretrained(checkpoint.path)
    layer = body_of(table, model).get_submodule(table.layer.format(layer=1))
    seen = {}
    layer.get_submodule(table.norm).register_forward_hook(lambda module, args, output: seen.update(norm=output))
    layer.get_submodule(table.up).register_forward_pre_hook(lambda module, args: seen.update(up=args[0]))
    model(**batch(family))
    assert torch.equal(seen["up"].view_as(seen["norm"]), seen["norm"])  # OPT flattens them in between


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), logit_std=st.floats(0.01, 2.0), dim=st.integers(8, 64))
def test_calibrated_router_has_the_deviation_it_was_asked_for(seed, logit_std, dim):
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.rand(dim, generator=generator) + 0.5, torch.randn(dim, generator=generator)
    rows = calibrated_normal(6, weight, bias, logit_std, generator)
    z = torch.randn(4000, dim, generator=generator)
    logits = (z * weight + bias) @ rows.T
    torch.testing.assert_close(logits.std(0), torch.full((6,), logit_std), rtol=0.1, atol=0)
    assert (logits.mean(0).abs() < 0.1 * logit_std).all()


def test_a_biasless_norm_calibrates_too():
    rows = calibrated_normal(4, torch.ones(16), None, 0.1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rows.norm(dim=1), torch.full((4,), 0.1))


def test_noise_in_half_precision_keeps_the_dtype():
    weight = torch.randn(32, 32).to(torch.bfloat16)
    assert with_noise(weight, 0.1, torch.Generator()).dtype == torch.bfloat16
    assert with_noise(weight, 0.0, torch.Generator()) is weight


@given(layers=st.integers(1, 200), step=st.integers(1, 200))
def test_every_nth_layer(layers, step):
    if step > layers:
        with pytest.raises(UsageError):
            parse_layers(f"every-{step}", layers)
    else:
        chosen = parse_layers(f"every-{step}", layers)
        assert chosen == [layer for layer in range(layers) if (layer + 1) % step == 0]


@given(text=st.text(max_size=12), layers=st.integers(1, 40))
def test_any_text_is_layers_or_refused(text, layers):
    try:
        chosen = parse_layers(text, layers)
    except UsageError:
        return
    assert chosen
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(layers))


@settings(max_examples=30, deadline=None)
@given(
    num_experts=st.integers(-3, 99),
    moe_layers=st.one_of(st.text(max_size=8), st.lists(st.integers(-5, 50), max_size=4)),
    noise_std=st.floats(allow_nan=False, allow_infinity=False),
    revision=st.one_of(st.none(), st.text(max_size=8)),
)
def test_recipes_survive_yaml(tmp_path_factory, num_experts, moe_layers, noise_std, revision):
    recipe = UpcycleRecipe(
        base_model="some/model", num_experts=num_experts, moe_layers=moe_layers, noise_std=noise_std, revision=revision
    )
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert UpcycleRecipe.from_yaml(file) == recipe
