"""Transformers' own mixtures: written as they write themselves, exact, loaded with no code of ours; and read."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import hf_moe
from hf_moe.convert import certify, open_checkpoint, plan_upcycle
from hf_moe.convert.describe import describe_checkpoint, describe_plan
from hf_moe.convert.mixture import NATIVE, open_mixture
from hf_moe.convert.native import CANDIDATES
from hf_moe.errors import SourceError, UsageError
from hf_moe.recipe import UpcycleRecipe
from tests.conftest import scatter, tiny_moe

# dense -> its configuration where the tiny one has what the mixture lacks, a recipe that fits, and the class it gives
FITS = {
    "llama": ({}, {}, "Mixtral"),
    "mistral": ({"sliding_window": 6, "tie_word_embeddings": True}, {"granularity": 2}, "Mixtral"),
    "qwen2": ({}, {"shared_expert_weight": 0.5, "moe_layers": [0, 2], "num_experts": 3}, "Qwen2Moe"),
    "qwen3": ({}, {"moe_layers": [1]}, "Qwen3Moe"),
}
HEADS = ("ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification", "Model")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2} | {
    "intermediate_size": 48,
    "vocab_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.0,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "mlp_only_layers": [1],
}


def dense_name(family: str, head: str) -> str:
    return transformers.CONFIG_MAPPING[family].__name__.removesuffix("Config") + head


def names_of(folder) -> dict[str, tuple]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def made(dense_folder, tmp_path):
    """(family, head, **options) -> the dense folder, and what became of it."""

    def make(family, head="ForCausalLM", **options):
        config, recipe, _ = FITS[family]
        dense = dense_folder(family, dense_name(family, head), **config)
        options = {"target": "native", "num_experts": 4, **recipe, **options}
        return dense, hf_moe.upcycle(dense, tmp_path / "moe", **options)

    return make


def test_every_candidate_is_tested_and_read():
    assert set(FITS) == set(CANDIDATES)
    assert {native.model_type for natives in CANDIDATES.values() for native in natives} <= set(NATIVE)


@pytest.mark.parametrize("family", FITS)
def test_it_is_what_the_native_class_writes_and_the_same_function(family, made, tmp_path):
    _, result = made(family)
    assert not [*result.path.glob("*.py")]
    config = json.loads((result.path / "config.json").read_text())
    assert "auto_map" not in config
    assert config["model_type"] == NATIVE_TYPE[family]
    model = AutoModelForCausalLM.from_pretrained(result.path)
    assert type(model).__name__ == f"{FITS[family][2]}ForCausalLM" == result.plan.moe_class.__name__
    assert type(model).__module__.startswith("transformers.")
    model.save_pretrained(tmp_path / "again")
    assert names_of(result.path) == names_of(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {**config, "transformers_version": ""} == {**again, "transformers_version": ""}

    certificate = result.certificate
    assert certificate["passed"]
    assert certificate["weights"]["identical"]
    assert certificate["float64"]["max_rel_by_column"] <= 1e-12
    assert certificate["float32"]["greedy"]["identical"] == certificate["float32"]["greedy"]["prompts"] > 0
    assert result.plan.exactness.kind == "exact"


NATIVE_TYPE = {family: natives[0].model_type for family, natives in CANDIDATES.items()}


@pytest.mark.parametrize("family", FITS)
def test_greedy_generation_is_identical_with_the_kernels_users_get(family, made):
    dense, result = made(family)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (dense, result.path)]
    prompt = torch.arange(5, 13).view(2, 4)
    one, other = (model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None) for model in models)
    assert torch.equal(one, other)


@pytest.mark.parametrize("family", FITS)
@pytest.mark.parametrize("head", HEADS)
def test_every_head(family, head, made):
    _, result = made(family, head)
    assert result.certificate["passed"]
    assert result.plan.moe_class.__name__ == FITS[family][2] + head
    _, info = result.plan.moe_class.from_pretrained(result.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_labels_and_rope_come_along(dense_folder, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    labels = {"id2label": {0: "bad", 1: "good", 2: "odd"}, "label2id": {"bad": 0, "good": 1, "odd": 2}}
    dense = tmp_path / "dense"
    model = transformers.LlamaForSequenceClassification.from_pretrained(
        dense_folder("llama", "LlamaForSequenceClassification", num_labels=3)
    )
    model.config.update({"rope_parameters": rope, **labels})
    model.save_pretrained(dense)
    values = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**values, "sliding_window": 4, "a_note": "kept"}))
    result = hf_moe.upcycle(dense, tmp_path / "moe", num_experts=4, target="native")
    config = AutoConfig.from_pretrained(result.path)
    assert config.id2label == labels["id2label"]
    assert config.rope_parameters == rope
    assert config.a_note == "kept"
    assert config.sliding_window is None, "Llama does not read it, Mixtral would"
    assert config.intermediate_size == 64
    assert result.certificate["passed"]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"shared_expert_weight": 0.5, "granularity": 2, "num_experts": 8, "num_experts_per_tok": 4}, "exact"),
        ({"shared_expert_intermediate_size": 16}, "exact"),
        ({"shared_expert_weight": 0.5, "dtype": "bfloat16"}, "exact"),
        ({"shared_expert_weight": 0.25}, "exact if"),
        ({"shared_expert_intermediate_size": 16, "norm_topk_prob": False}, "exact if"),
    ],
)
def test_the_sigmoid_before_the_shared_expert_is_made_up_for(options, kind, made):
    _, result = made("qwen2", **{"shared_expert_weight": None, "moe_layers": "all", "num_experts": 4, **options})
    assert result.plan.exactness.kind == kind
    assert result.certificate["passed"] or kind != "exact"
    assert result.certificate["float64"]["max_rel"] <= max(1e-12, 20 * result.plan.exactness.expected_error)
    mixture = open_mixture(open_checkpoint(result.path))
    assert not mixture.shared_gate(0).any()
    assert mixture.shared_width == (64 if options.get("shared_expert_weight") else 16)


def test_an_expert_and_a_layer_that_differ_are_found(made):
    dense, result = made("llama")
    model = result.plan.moe_class.from_pretrained(result.path)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0] += 1.0
    model.save_pretrained(result.path)
    certificate = certify(open_checkpoint(dense), open_checkpoint(result.path))
    assert certificate["weights"]["different"] == ["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    assert certificate["float64"]["bisect"]["summary"] == "the experts of layer 1 are not its dense network"
    assert not certificate["passed"]
    assert certificate["moe"]["made_from_this_dense"], "the configuration keeps what it does not know"


@pytest.mark.parametrize("family", FITS)
def test_verify_finds_the_plan_by_itself(family, made):
    dense, result = made(family)
    assert certify(open_checkpoint(dense), open_checkpoint(result.path))["passed"]


def test_verify_refuses_another_family(made, dense_folder):
    _, result = made("llama")
    with pytest.raises(SourceError, match=r"has model_type .mixtral., a mixture of Qwen3ForCausalLM"):
        certify(open_checkpoint(dense_folder("qwen3")), open_checkpoint(result.path))


BAD = [
    ("llama", {"mlp_bias": True, "attention_bias": True}, {}, ["experts have no biases", "attention has no biases"]),
    (
        "llama",
        {},
        {"moe_layers": [0], "norm_topk_prob": False, "shared_expert_intermediate_size": 16, "router_z_loss_coef": 0.1},
        ["every layer", "renormalises", "no shared expert", "no router z-loss"],
    ),
    ("qwen2", {}, {}, ["has a shared expert"]),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, {}, ["sliding window"]),
    ("qwen3", {}, {"shared_expert_weight": 0.5}, ["no shared expert"]),
    ("gpt2", {}, {}, ["no mixture of a gpt2's form"]),
]


@pytest.mark.parametrize(("family", "config", "options", "reasons"), BAD)
def test_what_does_not_fit_is_refused_with_every_reason_or_becomes_ours(
    family, config, options, reasons, dense_folder
):
    dense = open_checkpoint(dense_folder(family, **config))
    options = {"base_model": "x", "num_experts": 4, **options}
    [problem] = plan_upcycle(dense, UpcycleRecipe(target="native", **options)).problems
    assert isinstance(problem, UsageError)
    assert "\n" not in str(problem)
    assert all(reason in str(problem) for reason in reasons)
    plan = plan_upcycle(dense, UpcycleRecipe(target="auto", **options))
    assert not plan.problems
    assert describe_plan(plan)["target"] == "hf_moe"
    assert all(any(reason in note for note in plan.notes) for reason in reasons)


def test_auto_is_native_where_it_fits(dense_folder):
    plan = plan_upcycle(open_checkpoint(dense_folder("qwen3")), UpcycleRecipe(base_model="x", target="auto"))
    described = describe_plan(plan)
    assert (described["target"], described["class"]) == ("native", "Qwen3MoeForCausalLM")
    assert any("without remote code" in note for note in described["notes"])


def test_a_window_over_all_layers_is_kept(dense_folder, tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}
    result = hf_moe.upcycle(dense_folder("qwen3", **window), tmp_path / "moe", num_experts=4, target="native")
    assert result.plan.config.sliding_window == 6
    assert result.certificate["passed"]


def test_it_runs_where_hf_moe_was_never_heard_of(made):
    _, result = made("llama")
    code = (
        "import sys; sys.modules['hf_moe'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(result.path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "MixtralForCausalLM"


def native_model(model_type, **config):
    torch.manual_seed(0)
    values = {**SIZES, **config}
    config_class = transformers.CONFIG_MAPPING[model_type]
    known = {**config_class().to_dict(), "num_experts": 0}
    made = config_class(**{name: value for name, value in values.items() if name in known})
    return scatter(getattr(transformers, f"{config_class.__name__.removesuffix('Config')}ForCausalLM")(made))


def save_stacked(model, folder):
    """As the class holds its tensors in memory."""
    from safetensors.torch import save_file

    model.config.architectures = [type(model).__name__]
    model.config.to_json_file(folder / "config.json")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")


@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize("model_type", NATIVE)
def test_native_mixtures_are_read(model_type, stacked, tmp_path):
    model = native_model(model_type)
    if stacked:
        save_stacked(model, tmp_path)
    else:
        model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    mixture = open_mixture(checkpoint)
    assert (mixture.num_experts, mixture.top_k, mixture.kinds) == (4, 2, ("weight",))
    assert mixture.form.stacked == stacked
    assert set(mixture.layers) == ({0, 2} if "mlp_only_layers" in model.config.to_dict() else {0, 1, 2})
    assert mixture.shared_width == (16 if model_type == "qwen2_moe" else 0)
    block = model.model.layers[2].mlp
    gate, up = block.experts.gate_up_proj[3].chunk(2)
    assert torch.equal(mixture.projection(2, "gate", "weight", 3), gate)
    assert torch.equal(mixture.projection(2, "up", "weight", 3), up)
    assert torch.equal(mixture.projection(2, "down", "weight", 1), block.experts.down_proj[1])
    assert torch.equal(mixture.router(2), block.gate.weight)
    if mixture.shared_width:
        assert torch.equal(mixture.shared(2, "up", "weight"), block.shared_expert.up_proj.weight)
        assert torch.equal(mixture.shared_gate(2), block.shared_expert_gate.weight)
    described = describe_checkpoint(checkpoint)
    assert (described["num_experts"], described["num_experts_per_tok"]) == (4, 2)
    assert described["moe_layers"] == list(mixture.layers)
    assert described["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    unused = sum(p.numel() // 2 for name, p in model.named_parameters() if ".experts." in name)
    assert described["active_parameters"] == described["parameters"] - unused


def test_active_parameters_are_those_that_the_router_lets_a_token_use(tmp_path):
    def described(router_type, **config):
        folder = tmp_path / f"{router_type}-{len(list(tmp_path.iterdir()))}"
        tiny_moe("bert", router_type=router_type, **config).save_pretrained(folder)
        return describe_checkpoint(open_checkpoint(folder))

    of_two = described("softmax", num_experts_per_tok=2)
    assert described("expert_choice", router_capacity_factor=2.0) | {"source": of_two["source"]} == of_two
    all_of_them = described("expert_choice", router_capacity_factor=4.0)
    assert all_of_them["active_parameters"] == all_of_them["parameters"]
    assert described("top_p")["active_parameters"] is None


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_our_own_are_read_the_same_way(family, tmp_path):
    shared = {"shared_expert_intermediate_size": 16} if family == "llama" else {}
    model = tiny_moe(family, **shared)
    model.save_pretrained(tmp_path)
    mixture = open_mixture(open_checkpoint(tmp_path))
    assert mixture.layers == (0, 2)
    name = f"{mixture.prefix(2)}.{mixture.block}"
    block = model.get_submodule(name)
    assert torch.equal(mixture.projection(2, "down", "weight", 3), block.experts.down_proj[3])
    if family == "llama":
        assert torch.equal(mixture.projection(2, "up", "weight", 1), block.experts.gate_up_proj[1].chunk(2)[1])
        assert torch.equal(mixture.shared(2, "down", "weight"), block.shared_expert.down_proj.weight)
        assert mixture.shared_gate(2) is None
    else:
        assert torch.equal(mixture.projection(2, "up", "bias", 3), block.experts.up_proj_bias[3])
    assert set(mixture.names(2)) == {key for key in model.state_dict() if key.startswith(f"{name}.")}


def test_only_the_wanted_experts_bytes_are_read(tmp_path, monkeypatch):
    tiny_moe("llama").save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    mixture = open_mixture(checkpoint)
    read = []
    pieces = type(checkpoint).read_pieces

    def counted(self, name, piece_bytes):
        read.append(self.tensors[name].nbytes)
        return pieces(self, name, piece_bytes)

    monkeypatch.setattr(type(checkpoint), "read_pieces", counted)
    mixture.projection(0, "up", "weight", 2)
    assert read == [32 * 64 * 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 5}, "routes to 4 experts, but config.json says 5"),
        ({"num_hidden_layers": 10**9}, "says 1000000000 layers, but the weights hold 3"),
        ({"model_type": "qwen3_moe"}, "none of its tensors are the experts of a qwen3_moe"),
        ({"model_type": "mamba"}, "no mixture known here"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(change, message, tmp_path):
    native_model("mixtral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(SourceError, match=message):
        open_mixture(open_checkpoint(tmp_path))
