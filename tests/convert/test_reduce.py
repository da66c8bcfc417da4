"""Back again: downcycle, prune, merge-experts. What can be exact is; what can't is measured."""

import json
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import hf_moe
from hf_moe.cli import main
from hf_moe.convert import align, compare, open_checkpoint
from hf_moe.convert.families import FAMILIES as TABLES
from hf_moe.errors import SourceError, UsageError
from tests.conftest import FAMILIES, WORDS, batch, save_tokenizer, scatter

GRANULAR = {"num_experts": 8, "num_experts_per_tok": 4, "granularity": 2}
FORMS = {
    "plain": {"num_experts": 4},
    "granular": GRANULAR,
    "shared neurons": {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "granular and shared": {**GRANULAR, "shared_expert_intermediate_size": 16},
    "shared copy": {"num_experts": 4, "shared_expert_weight": 0.5},
    "granular, shared copy": {**GRANULAR, "shared_expert_weight": 0.25},
    "split": {"num_experts": 4, "num_experts_per_tok": 4, "method": "split"},
    "some layers": {"num_experts": 4, "moe_layers": [1]},
    "gates not renormalised": {"num_experts": 4, "norm_topk_prob": False},
}
# Of the mixture: as far as gates are equal, or what is rounded was not. The weights come back all the same.
EXACTNESS = {
    "granular, shared copy": "exact if",
    "split": "not preserving",
    "gates not renormalised": "exact if",
}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    words = [word for word in WORDS if "#" not in word]
    file.write_text("\n".join(" ".join(words[i : i + 9]) for i in range(8)) + "\n")
    return file


@pytest.fixture
def upcycled(dense_folder, tmp_path):
    """(family, **recipe) -> the mixture's folder."""

    def make(family, **recipe):
        return hf_moe.upcycle(dense_folder(family), tmp_path / "moe", verify=False, **recipe).path

    return make


def outputs(folder, dtype="float64"):
    """Logits, in float64."""
    config = AutoConfig.from_pretrained(folder)
    [name] = config.architectures
    model_class = getattr(hf_moe, name, None) or getattr(transformers, name)
    model = compare.load_model(model_class, open_checkpoint(folder), dtype)
    family = "gpt2" if config.vocab_size == 300 else "bert"
    inputs = batch(family)
    return compare.run_model(model, compare.Batch("random", inputs))["logits"]


def difference(one, other, dtype="float64"):
    return compare.difference_of(outputs(one, dtype), outputs(other, dtype))["max_rel_by_column"]


def edit(folder, change):
    """`change(name, tensor)` -> what the tensor becomes."""
    file = folder / "model.safetensors"
    tensors = {name: change(name, tensor.clone()) for name, tensor in load_file(file).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def noisy(size=0.01, where="experts"):
    generator = torch.Generator().manual_seed(1)

    def change(name, tensor):
        return tensor + size * torch.randn(tensor.shape, generator=generator) if where in name else tensor

    return change


def permuted(expert):
    """One expert's neurons in another order, in each layer."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))

    def change(name, tensor):
        if name.endswith(("experts.up_proj", "experts.up_proj_bias")):
            tensor[expert] = tensor[expert][order]
        elif name.endswith(("experts.gate_up_proj", "experts.gate_up_proj_bias")):
            tensor[expert] = torch.cat([half[order] for half in tensor[expert].chunk(2)])
        elif name.endswith("experts.down_proj"):
            tensor[expert] = tensor[expert][:, order]
        return tensor

    return change


def same_weights(dense, again):
    """As their class has them: names on disk may be older."""
    one, other = (loaded(folder) for folder in (dense, again))
    assert set(one) == set(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def loaded(folder):
    [name] = json.loads((folder / "config.json").read_text())["architectures"]
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    return model.state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_downcycling_what_was_upcycled_gives_the_original(family, upcycled, dense_folder, tmp_path):
    made = hf_moe.downcycle(upcycled(family, num_experts=4), tmp_path / "again")
    assert made.certificate["passed"], made.certificate
    assert made.certificate["weights"]["identical"]
    assert made.report["exactness"] == "exact"
    assert same_weights(dense_folder(family), made.path)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (dense_folder(family), made.path))
    assert after["architectures"] == before["architectures"]
    assert after["model_type"] == family
    strange = set(after) - set(before) - {"transformers_version"}
    assert not [name for name in strange if "expert" in name or "router" in name or "auto_map" in name], strange
    assert not list(made.path.glob("*.py"))
    assert (made.path / "LICENSE.txt").exists()
    assert type(AutoConfig.from_pretrained(made.path)) is type(AutoConfig.from_pretrained(dense_folder(family)))
    hf_moe.upcycle(made.path, tmp_path / "third", num_experts=4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_every_form_of_copies_comes_back(family, form, upcycled, dense_folder, tmp_path):
    made = hf_moe.downcycle(upcycled(family, **FORMS[form]), tmp_path / "again")
    assert made.report["by"] == "copies"
    assert made.report["exactness"] == EXACTNESS.get(form, "exact")
    if made.report["exactness"] == "exact":
        assert made.certificate["passed"], made.certificate
    if form != "granular, shared copy":  # 0.25 and 0.75 of a weight are rounded each
        assert same_weights(dense_folder(family), made.path)
    assert difference(dense_folder(family), made.path) < 1e-6


def test_clustered_neurons_come_back_in_another_order(upcycled, dense_folder, tmp_path):
    made = hf_moe.downcycle(upcycled("llama", **GRANULAR, partition="kmeans"), tmp_path / "again")
    assert made.certificate["passed"]
    name = "model.layers.0.mlp.up_proj.weight"
    one, other = (load_file(folder / "model.safetensors")[name] for folder in (dense_folder("llama"), made.path))
    assert not torch.equal(one, other)
    assert torch.equal(*(rows[rows[:, 0].argsort()] for rows in (one, other)))


@pytest.mark.parametrize("by", ["auto", "average", "usage", "best"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_experts_that_differ_become_one(family, by, upcycled, dense_folder, text, tmp_path):
    moe = upcycled(family, num_experts=4)
    edit(moe, noisy())
    made = hf_moe.downcycle(moe, tmp_path / "again", by=by, text=None if by == "average" else text)
    assert made.report["by"] == ("usage" if by == "auto" else by)
    assert made.report["why_not_exact"] == ["its experts differ"]
    assert made.certificate is None
    assert 0 < difference(moe, made.path) < 1
    assert json.loads((made.path / "downcycle.json").read_text()) == made.report
    if by != "average":
        measured = made.report["text"]
        assert measured["measure"] == f"loss on the {'masked' if family == 'bert' else 'next'} token"
        assert measured["before"] > 0
        assert measured["difference"] == pytest.approx(measured["after"] - measured["before"])
        assert abs(measured["difference"]) < 0.2


def test_the_best_is_the_one_that_is_used_most(upcycled, text, tmp_path):
    moe = upcycled("gpt2", num_experts=4, num_experts_per_tok=1)
    edit(moe, noisy())
    report = hf_moe.prune(moe, tmp_path / "pruned", num_experts=2, text=text).report
    hf_moe.downcycle(moe, tmp_path / "again", by="best", text=text)
    best = int(torch.tensor(report["scores"]["1"]).argmax())
    expert = load_file(moe / "model.safetensors")["transformer.h.1.mlp.experts.up_proj"][best]
    dense = load_file(tmp_path / "again" / "model.safetensors")["transformer.h.1.mlp.c_fc.weight"]
    assert torch.equal(dense.T, expert)
    assert sum(report["scores"]["1"]) == report["text"]["tokens"] + 8  # the last token of each text has no next one


def test_a_trained_shared_expert_is_averaged_in(upcycled, dense_folder, tmp_path):
    moe = upcycled("llama", num_experts=4, shared_expert_weight=0.5)
    edit(moe, noisy(0.001, "shared_expert"))
    made = hf_moe.downcycle(moe, tmp_path / "again")
    assert made.report["why_not_exact"] == ["its shared expert differs from the others"]
    assert 0 < difference(dense_folder("llama"), made.path) < 0.2


def test_an_encoder_without_a_language_model_is_measured_by_its_outputs(dense_folder, text, tmp_path):
    dense = dense_folder("bert", "BertForSequenceClassification", num_labels=3)
    moe = hf_moe.upcycle(dense, tmp_path / "moe", num_experts=4, verify=False).path
    edit(moe, noisy())
    measured = hf_moe.downcycle(moe, tmp_path / "again", text=text).report["text"]
    assert measured["measure"] == "relative difference of the outputs"
    assert 0 < measured["outputs"]["logits"] < 0.5


@pytest.mark.parametrize("by", ["usage", "activation"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_pruning_keeps_the_best(family, by, upcycled, text, tmp_path):
    moe = upcycled(family, num_experts=4)
    edit(moe, noisy())
    made = hf_moe.prune(moe, tmp_path / "pruned", num_experts=2, by=by, text=text)
    config = AutoConfig.from_pretrained(made.path)
    assert (config.num_experts, config.num_experts_per_tok) == (2, 2)
    assert made.report["notes"] == []
    old, new = (load_file(folder / "model.safetensors") for folder in (moe, made.path))
    prefix = f"{TABLES[family].layer.format(layer=1)}.mlp."
    for layer, groups in made.report["groups"].items():
        scores = torch.tensor(made.report["scores"][layer])
        assert [group[0][0] for group in groups] == scores.topk(2).indices.sort().values.tolist()
    kept = [group[0][0] for group in made.report["groups"]["1"]]
    for name in old:
        wanted = old[name][kept] if prefix in name else old[name]
        if ".mlp." not in name or prefix in name:
            assert torch.equal(new[name], wanted), name
    assert made.report["text"]["before"] != made.report["text"]["after"]
    assert outputs(made.path).isfinite().all()


def test_activation_is_gate_times_norm(upcycled, text, tmp_path):
    """Against the experts run one by one."""
    moe = upcycled("llama", num_experts=4)
    edit(moe, noisy(0.05))
    report = hf_moe.prune(moe, tmp_path / "pruned", num_experts=2, by="activation", text=text).report
    model = hf_moe.LlamaMoeForCausalLM.from_pretrained(moe).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(moe)
    block, sums, counts = model.model.layers[0].mlp, torch.zeros(4), torch.zeros(4)

    def see(module, args):
        x_TD = args[0].flatten(0, 1)
        _, gates_TK, index_TK = block.gate(x_TD)
        for x, gates, index in zip(x_TD, gates_TK, index_TK, strict=True):
            for gate, expert in zip(gates, index, strict=True):
                sums[expert] += gate * block.experts._expert(expert, x[None]).norm()
                counts[expert] += 1

    block.register_forward_pre_hook(see)
    with torch.no_grad():
        for line in text.read_text().splitlines():
            model(torch.tensor([tokenizer(line)["input_ids"]]))
    assert torch.allclose(torch.tensor(report["scores"]["0"]).float(), sums / counts, rtol=1e-4)


def test_a_token_visits_no_more_experts_than_there_are(upcycled, text, tmp_path):
    moe = upcycled("bert", num_experts=6, num_experts_per_tok=4)
    made = hf_moe.prune(moe, tmp_path / "pruned", num_experts=3, text=text)
    assert made.report["num_experts_per_tok"] == {"before": 4, "after": 3}
    assert made.report["notes"] == ["A token visited 4 experts, and now visits all 3."]


@pytest.mark.parametrize("verb", ["prune", "merge"])
@pytest.mark.parametrize("recipe", [{}, {"norm_topk_prob": False}, GRANULAR], ids=["plain", "raw gates", "granular"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_fewer_copies_are_still_the_dense_function(family, recipe, verb, upcycled, dense_folder, text, tmp_path):
    moe = upcycled(family, **{"num_experts": 8, **recipe})
    reduce = {"prune": hf_moe.prune, "merge": hf_moe.merge_experts}[verb]
    made = reduce(moe, tmp_path / "fewer", num_experts=4, text=text)
    assert AutoConfig.from_pretrained(made.path).num_experts == 4
    raw = not recipe.get("norm_topk_prob", True)
    assert difference(dense_folder(family), made.path) < (1e-2 if raw else 1e-12)
    assert abs(made.report["text"]["difference"]) < (1e-3 if raw else 1e-6)
    if not raw:
        assert hf_moe.convert.certify(open_checkpoint(dense_folder(family)), open_checkpoint(made.path))["passed"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_permuted_neurons_merge_exactly(family, upcycled, dense_folder, tmp_path):
    moe = upcycled(family, num_experts=8)
    edit(moe, permuted(3))
    made = hf_moe.merge_experts(moe, tmp_path / "merged", num_experts=4)
    assert difference(dense_folder(family), made.path) < 1e-12
    assert "text" not in made.report
    again = hf_moe.downcycle(moe, tmp_path / "again")
    assert again.report["why_not_exact"] == ["its experts differ"]  # in order only, but that is not looked for
    assert difference(dense_folder(family), again.path) < 1e-12


def test_what_is_alike_is_merged(upcycled, tmp_path):
    moe = upcycled("llama", num_experts=4)
    generator = torch.Generator().manual_seed(3)

    def two_kinds(name, tensor):
        if "experts" in name:
            tensor[[0, 3]] += torch.randn(tensor[0].shape, generator=generator)
            tensor[[3]] += 0.001
        return tensor

    edit(moe, two_kinds)
    report = hf_moe.merge_experts(moe, tmp_path / "merged", num_experts=2).report
    assert all([[e for e, _ in group] for group in groups] == [[0, 3], [1, 2]] for groups in report["groups"].values())


def test_order_and_groups():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(40, 7, generator=generator)
    order = torch.randperm(40, generator=generator)
    near = one[order] + 0.01 * torch.randn(40, 7, generator=generator)
    found = align.find_order(lambda *_: one, lambda *_: near, [("up", "weight")])
    assert torch.equal(found, order.argsort())
    assert align.find_order(lambda *_: one, lambda *_: one, [("up", "weight")]) is None
    far = torch.randn(40, 7, generator=generator)  # where nearest neighbours are shared, still each neuron once
    found = align.find_order(lambda *_: one, lambda *_: far, [("up", "weight")])
    assert sorted(found.tolist()) == list(range(40))
    assert (one - far[found]).square().sum() < (one - far).square().sum()
    points = torch.tensor([0.0, 10.0, 0.1, 10.2, 5.0])
    apart = (points[:, None] - points[None, :]) ** 2
    assert align.group(apart, torch.tensor([1.0, 1, 2, 1, 1]), 3) == [[2, 0], [1, 3], [4]]
    assert align.group(torch.zeros(4, 4), torch.ones(4), 2) == [[0, 1], [2, 3]]


NATIVE = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 8},
    "olmoe": {"num_experts": 4},
}
CAUSAL = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe"}


@pytest.fixture
def native(tmp_path):
    """model_type -> a checkpoint of one of Transformers' own mixtures."""

    def make(model_type, copies=False):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"vocab_size": 300, "max_position_embeddings": 64, "intermediate_size": 64, "num_experts_per_tok": 2}
        config = transformers.CONFIG_MAPPING[model_type](**{**sizes, **NATIVE[model_type], "pad_token_id": 2})
        model = scatter(getattr(transformers, f"{CAUSAL[model_type]}ForCausalLM")(config))
        if copies:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if ".experts." in name:
                        parameter[:] = parameter[:1].clone()
        folder = tmp_path / model_type
        model.save_pretrained(folder)
        save_tokenizer("llama", folder)
        return folder

    return make


@pytest.mark.parametrize("model_type", NATIVE)
def test_mixtures_of_transformers_own(model_type, native, text, tmp_path):
    moe = native(model_type)
    pruned = hf_moe.prune(moe, tmp_path / "pruned", num_experts=3, by="activation", text=text)
    merged = hf_moe.merge_experts(moe, tmp_path / "merged", num_experts=2, text=text)
    for made, number in ((pruned, 3), (merged, 2)):
        assert not list(made.path.glob("*.py"))
        assert AutoConfig.from_pretrained(made.path).num_experts == number
        assert outputs(made.path, "float32").isfinite().all()
        assert 0 < abs(made.report["text"]["difference"]) < 2
    if model_type == "olmoe":
        with pytest.raises(UsageError, match="no dense model with the layers of olmoe"):
            hf_moe.downcycle(moe, tmp_path / "dense", text=text)
        return
    made = hf_moe.downcycle(moe, tmp_path / "dense", text=text)
    assert (
        made.report["class"]
        == {
            "mixtral": "MistralForCausalLM",
            "qwen2_moe": "Qwen2ForCausalLM",
            "qwen3_moe": "Qwen3ForCausalLM",
        }[model_type]
    )
    assert made.report["intermediate_size"] == (96 if model_type == "qwen2_moe" else 64)
    assert outputs(made.path, "float32").isfinite().all()
    assert abs(made.report["text"]["difference"]) < 2


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_copies_in_transformers_own_mixtures(model_type, native, tmp_path):
    moe = native(model_type, copies=True)
    if model_type == "qwen3_moe":
        values = json.loads((moe / "config.json").read_text())
        (moe / "config.json").write_text(json.dumps({**values, "norm_topk_prob": True}))
    made = hf_moe.downcycle(moe, tmp_path / "dense")
    assert made.report["exactness"] == "exact"
    assert made.certificate["passed"]
    assert difference(moe, made.path, "float32") < 1e-4


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("llama", "plain"),
        ("mistral", "granular"),
        ("qwen2", "shared neurons"),
        ("qwen2", "shared copy"),
        ("qwen3", "some layers"),
    ],
)
def test_what_was_upcycled_to_them_comes_back(family, form, upcycled, dense_folder, tmp_path):
    made = hf_moe.downcycle(upcycled(family, target="native", **FORMS[form]), tmp_path / "again")
    assert made.report["class"] == f"{'Mistral' if family == 'llama' else family.capitalize()}ForCausalLM"
    assert made.report["exactness"] == "exact"
    assert made.certificate["passed"], made.certificate
    assert same_weights(dense_folder(family), made.path)
    assert difference(dense_folder(family), made.path) < 1e-12


BAD = {
    "prune dense --num-experts 2 --text text.txt": (1, "is no mixture known here"),
    "merge-experts dense --num-experts 2": (1, "is no mixture known here"),
    "downcycle dense": (1, "is no mixture known here"),
    "downcycle nowhere/at/all": (1, "no such folder"),
    "prune moe --num-experts 5 --text text.txt": (2, "num_experts is 5, but moe has 4"),
    "prune moe --num-experts 4 --text text.txt": (2, "so there is nothing to prune"),
    "prune moe --num-experts 1 --text text.txt": (2, "needs at least 2; downcycle"),
    "prune moe --num-experts -3 --text text.txt": (2, "needs at least 2"),
    "prune moe --num-experts 2 --text text.txt --by luck": (2, "by is 'luck'; choose from usage, activation"),
    "prune moe --num-experts 2 --text none.txt": (1, "can't be read as text"),
    "prune moe --num-experts 2 --text empty.txt": (2, "holds no text"),
    "prune moe --num-experts 2 --text latin.txt": (1, "can't be read as text"),
    "prune bare --num-experts 2 --text text.txt": (2, "can't read text.txt: the source has no tokenizer"),
    "prune granular --num-experts 3 --text text.txt": (2, "is no multiple of 2"),
    "merge-experts moe --num-experts 4": (2, "so there is nothing to merge"),
    "merge-experts moe --num-experts 9": (2, "but moe has 4"),
    "merge-experts raw --num-experts 2": (2, "give a text"),
    "merge-experts moe --num-experts 2 --max-shard-size huge": (2, "write a size such as"),
    "downcycle moe --by best": (2, "by 'best' needs a text"),
    "downcycle moe --by worst": (2, "choose from auto, average, usage, best"),
    "downcycle moe --text latin.txt": (1, "can't be read as text"),
    "downcycle broken": (1, "config.json: upcycled_from: unknown key"),
}


@pytest.fixture(scope="module")
def bad_inputs(dense_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.txt").write_text("the dog\n")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    dense = dense_folder("gpt2")
    (folder / "dense").symlink_to(dense)
    raw = {"num_experts": 4, "norm_topk_prob": False}
    for name, recipe in {"moe": {"num_experts": 4}, "granular": GRANULAR, "raw": raw}.items():
        hf_moe.upcycle(dense, folder / name, verify=False, **recipe)
    for name in ("bare", "broken"):
        hf_moe.upcycle(dense, folder / name, num_experts=4, verify=False)
    for file in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / "bare" / file).unlink(missing_ok=True)
    config = json.loads((folder / "broken" / "config.json").read_text())
    config["upcycled_from"]["recipe"] = {"experts": 3}
    (folder / "broken" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("command", BAD)
def test_what_can_not_be_is_said_in_one_line(command, bad_inputs, monkeypatch, capsys):
    verb, source, *options = command.split()
    monkeypatch.chdir(bad_inputs)
    monkeypatch.setattr(sys, "argv", ["hf-moe", verb, source, "out", *options])
    before = sorted(file.name for file in bad_inputs.iterdir())
    with pytest.raises(SystemExit) as exit_:
        main()
    code, words = BAD[command]
    error = capsys.readouterr().err
    assert exit_.value.code == code, error
    assert words in error
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert sorted(file.name for file in bad_inputs.iterdir()) == before


def test_commands_print_and_write(bad_inputs, hf_moe_command, tmp_path):
    def run(*arguments):
        code, out, err = hf_moe_command(*arguments)
        assert code == 0, err
        return out

    moe, text = bad_inputs / "moe", bad_inputs / "text.txt"
    out = run("downcycle", moe, tmp_path / "dense", "--text", text)
    assert "the same function" in out
    assert "GPT2LMHeadModel" in out
    assert run("downcycle", moe, tmp_path / "dense", "--overwrite", "-q") == ""
    made = json.loads(run("prune", moe, tmp_path / "pruned", "--num-experts", 2, "--text", text, "--json"))
    assert made["num_experts"] == {"before": 4, "after": 2}
    assert "loss on the next token" in run(
        "merge-experts", moe, tmp_path / "merged", "--num-experts", 2, "--text", text
    )
    assert json.loads((tmp_path / "merged" / "merge-experts.json").read_text())["verb"] == "merge-experts"
    manifest = json.loads((tmp_path / "pruned" / "manifest.json").read_text())
    assert {"prune.json", "model.safetensors", "config.json"} <= set(manifest["files"])


def test_python_says_the_same(bad_inputs, tmp_path):
    with pytest.raises(UsageError, match="must be a whole number"):
        hf_moe.prune(bad_inputs / "moe", tmp_path / "out", num_experts=2.5, text=bad_inputs / "text.txt")
    with pytest.raises(SourceError, match="no mixture"):
        hf_moe.downcycle(bad_inputs / "dense", tmp_path / "out")
