"""Fusion: every expert is its checkpoint's, the rest is as asked for, and fitted routers know what is for whom."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import hf_moe
from hf_moe.convert import FAMILIES as TABLES
from hf_moe.convert import fit, open_checkpoint, routers
from hf_moe.convert.compare import capture_feed_forward, load_model, pad
from hf_moe.convert.fusion_plan import plan_fuse
from hf_moe.convert.texts import load_tokenizer
from hf_moe.convert.tune import build_model
from hf_moe.errors import SourceError, UsageError
from hf_moe.recipe import FuseRecipe
from tests.conftest import TEXT_FAMILIES
from tests.families import TESTED

TRAINED = ("bert", "llama")  # an encoder and a decoder
# What two experts are for, in words that the tests' tokenizers know.
DOMAINS = {
    "wordpiece": (["dog", "cat", "sat", "mat", "light"], ["war", "peace", "nation", "law", "people"]),
    "bpe": (["abba", "bed", "cab", "fade", "deaf"], ["vow", "wynx", "zuyt", "tux", "yurt"]),
}


def sentences(family: str, domain: int, count: int = 40, seed: int = 0) -> list[str]:
    drawn = random.Random(seed)
    words = DOMAINS[TESTED[family].tokenizer][domain]
    return [" ".join(drawn.choices(words, k=drawn.randint(3, 9))) for _ in range(count)]


def change(source: Path, folder: Path, seed: int, dtype=None, class_name: str | None = None) -> Path:
    """A checkpoint like `source` with other weights everywhere."""
    if folder != source:
        shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text())
    model = getattr(transformers, class_name or config["architectures"][0]).from_pretrained(source, dtype=dtype)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def finetune(family: str, source: Path, folder: Path, texts: list[str]) -> Path:
    """A few steps on `texts`, every token predicted."""
    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = getattr(transformers, TESTED[family].lm).from_pretrained(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for start in range(0, 40, 8):
        batch = pad("train", [tokenizer(text)["input_ids"] for text in texts[start : start + 8]])
        labels = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, -100)
        model(
            input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"], labels=labels
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tuned(dense_folder, tmp_path_factory):
    """family -> (base, the recipe's experts, with texts), made once."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(f"tuned-{family}")
            experts = []
            for domain in (0, 1):
                texts = sentences(family, domain)
                (folder / f"{domain}.txt").write_text("\n".join(texts) + "\n")
                source = finetune(family, dense_folder(family), folder / f"expert{domain}", texts)
                experts.append({"source_model": str(source), "texts": str(folder / f"{domain}.txt")})
            made[family] = (dense_folder(family), experts)
        base, experts = made[family]
        return base, [dict(expert) for expert in experts]

    return make


@pytest.fixture
def changed(dense_folder, tmp_path):
    """A base and two checkpoints like it, of the family and dtypes given."""

    def make(family="bert", dtypes=(None, None)):
        base = dense_folder(family)
        return base, [str(change(base, tmp_path / f"c{i}", i + 1, dtype)) for i, dtype in enumerate(dtypes)]

    return make


def fused(base, sources, output, verify=False, **options):
    values = {"base_model": str(base), "experts": [{"source_model": str(source)} for source in sources]}
    return hf_moe.fuse({"gate_mode": "random", **values, **options}, output, verify=verify)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def block_of(model, family, layer):
    return model.base_model.get_submodule(f"{TABLES[family].layer.format(layer=layer)}.{TABLES[family].block}")


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_every_expert_computes_what_its_checkpoint_does(family, changed, tmp_path):
    base, sources = changed(family)
    made = fused(base, [*sources, base], tmp_path / "moe", moe_layers=[0, 2])
    model = load_model(made.plan.moe_class, open_checkpoint(made.path), "float64")
    batch = pad("ids", [[5, 6, 7, 8], [9, 10, 11, 12]])
    for expert, source in enumerate([*sources, base]):
        dense = load_model(made.plan.dense_class, open_checkpoint(source), "float64")
        for layer in (0, 2):
            x, y = capture_feed_forward(dense, TABLES[family], batch)[layer]
            x = x.reshape(-1, x.shape[-1])
            chosen, all_of_it = torch.full((len(x), 1), expert), torch.ones(len(x), 1, dtype=x.dtype)
            ours = block_of(model, family, layer).experts.loop(x, chosen, all_of_it)
            torch.testing.assert_close(ours, y.reshape(ours.shape))
    untouched = {name: tensor for name, tensor in weights(base).items() if name in weights(made.path)}
    assert len(untouched) > 10
    assert all(torch.equal(weights(made.path)[name], tensor) for name, tensor in untouched.items())


@pytest.mark.parametrize("family", TRAINED)
def test_experts_like_the_base_are_exact(family, dense_folder, tmp_path):
    base = dense_folder(family)
    made = fused(base, [base, base, base], tmp_path / "moe", verify=True)
    assert str(made.plan.exactness) == "exact"
    assert made.certificate["passed"]
    assert made.certificate["judged"]
    assert any("routers can't matter" in note for note in made.plan.notes)


def test_experts_unlike_the_base_are_measured_and_not_judged(changed, tmp_path):
    base, sources = changed()
    made = fused(base, sources, tmp_path / "moe", verify=True)
    assert str(made.plan.exactness) == "not preserving: experts differ from the base"
    certificate = made.certificate
    assert certificate["passed"]
    assert not certificate["judged"]
    assert certificate["weights"]["identical"]
    assert certificate["float64"]["max_rel"] > 1e-3
    assert not any("same network" in note for note in made.plan.notes)
    config = json.loads((made.path / "config.json").read_text())
    assert [entry["source"] for entry in config["fused_from"]] == ["c0", "c1"]
    assert config["fused_from"][1]["sha256"] == open_checkpoint(sources[1]).sha256
    assert config["upcycled_from"]["sha256"] == open_checkpoint(base).sha256
    assert str(base) not in (made.path / "recipe.yaml").read_text()
    assert FuseRecipe.from_yaml(made.path / "recipe.yaml").experts[1].source_model == "c1"


def test_the_rest_can_be_the_experts_average(changed, tmp_path):
    base, sources = changed()
    made = weights(fused(base, sources, tmp_path / "moe", verify=True, rest="average", moe_layers="1").path)
    parts = [weights(source) for source in sources]
    shared = [name for name in made if name in parts[0]]
    assert len(shared) > 10
    for name in shared:
        mean = torch.stack([part[name].double() for part in parts]).mean(0)
        assert torch.equal(made[name], mean.to(made[name].dtype)), name


def test_the_average_of_the_base_is_the_base(dense_folder, tmp_path):
    base = dense_folder("bert")
    made = fused(base, [base, base, base], tmp_path / "moe", verify=True, rest="average")
    assert made.certificate["judged"]
    assert made.certificate["passed"]


def test_experts_may_have_another_head_but_not_for_averages(dense_folder, tmp_path):
    base = dense_folder("bert", "BertForMaskedLM")
    source = dense_folder("bert", "BertForSequenceClassification")
    other = change(source, tmp_path / "other", 1)
    made = fused(base, [source, other], tmp_path / "moe", verify=True)
    assert made.certificate["weights"]["identical"]
    with pytest.raises(UsageError, match=r"rest 'average'.*rest 'base' needs none"):
        fused(base, [source, other], tmp_path / "average", rest="average")


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [((torch.bfloat16, torch.bfloat16), torch.float32), ((torch.float64, torch.bfloat16), torch.float64)],
)
def test_nothing_is_rounded_unasked(dtypes, wanted, changed, tmp_path):
    base, sources = changed(dtypes=dtypes)
    made = weights(fused(base, sources, tmp_path / "moe", verify=True).path)
    [name] = [name for name in made if name.endswith("0.mlp.experts.up_proj")]
    assert made[name].dtype == wanted
    [source] = [name for name in weights(sources[0]) if name.endswith("layer.0.intermediate.dense.weight")]
    assert torch.equal(made[name][0], weights(sources[0])[source].to(wanted))
    half = weights(fused(base, sources, tmp_path / "half", verify=True, dtype="bfloat16").path)
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}


@pytest.mark.parametrize("scale", [1, 0.1])
def test_a_shared_expert(scale, changed, tmp_path):
    base, sources = changed()
    shared = [{"source_model": sources[0], "residual_scale": scale}]
    made = fused(base, [base, sources[1]], tmp_path / "moe", verify=True, shared_experts=shared)
    tensors, source = weights(made.path), weights(sources[0])
    down = tensors["bert.encoder.layer.0.mlp.shared_expert.down_proj.weight"]
    wanted = source["bert.encoder.layer.0.output.dense.weight"] * (scale / (1 + scale))
    torch.testing.assert_close(down, wanted)
    [entry] = [entry for entry in made.plan.config.fused_from if entry.get("shared")]
    assert entry["source"] == "c0"
    same = fused(base, [base, base], tmp_path / "same", verify=True, shared_experts=[{"source_model": str(base)}])
    assert same.certificate["judged"]
    assert same.certificate["passed"]


# What is for whom


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("gate", ["hidden", "centroid", "lda", "probe"])
def test_texts_go_to_their_expert(family, gate, tuned, tmp_path):
    base, experts = tuned(family)
    recipe = {"base_model": str(base), "experts": experts, "gate_mode": gate, "num_experts_per_tok": 1}
    made = hf_moe.fuse(recipe, tmp_path / "moe", verify=False)
    for entry in made.routing["layers"]:
        assert entry["chance"] == 0.5
        assert entry["held_out_texts"] >= 0.8, entry
        assert entry["held_out_tokens"] > 0.6, entry
        assert (entry["condition"] is None) == (gate in ("hidden", "centroid"))
    model = made.plan.moe_class.from_pretrained(made.path)
    tokenizer = AutoTokenizer.from_pretrained(made.path)
    for domain in (0, 1):
        batch = pad("new", [tokenizer(text)["input_ids"] for text in sentences(family, domain, 20, seed=1)])
        with torch.no_grad():
            outputs = model(
                input_ids=batch.inputs["input_ids"],
                attention_mask=batch.inputs["attention_mask"],
                output_router_logits=True,
            )
        kept = batch.inputs["attention_mask"].bool().reshape(-1)
        for logits in outputs.router_logits:
            assert (logits.reshape(-1, 2)[kept].argmax(-1) == domain).float().mean() > 0.6


def test_routers_have_the_spread_asked_for(tuned, tmp_path):
    base, experts = tuned("bert")
    for std in (1.0, 0.25):
        recipe = FuseRecipe.from_dict({"base_model": str(base), "experts": experts, "router_logit_std": std})
        plan = plan_fuse(recipe)
        rows, _ = fit.fit_routers(plan, recipe)
        checkpoint = plan.source.checkpoint
        ids = [
            fit.token_ids(checkpoint, plan.config, load_tokenizer(checkpoint), entry.positive)
            for entry in fit.read_passages(recipe)
        ]
        sample = fit.take_sample(fit.dense_reader(plan), ids, fit.TOKENS)
        for layer, rows_ED in rows.items():
            logits = sample.x[layer] @ rows_ED.T
            assert logits.std(dim=1, unbiased=False).square().mean().sqrt() == pytest.approx(std, rel=1e-3)


def test_padding_is_no_input(tuned, monkeypatch):
    base, experts = tuned("bert")
    plan = plan_fuse(FuseRecipe.from_dict({"base_model": str(base), "experts": experts}))
    reader = fit.dense_reader(plan)
    rows = [[[2, 5, 6, 3], [2, 5, 6, 7, 8, 9, 3]], [[2, 3]]]
    together = fit.take_sample(reader, rows, 1000)
    monkeypatch.setattr(fit, "ROWS", 1)
    alone = fit.take_sample(reader, rows, 1000)
    assert together.label.tolist() == [0] * 11 + [1] * 2
    assert together.passage.tolist() == [0] * 4 + [1] * 7 + [2] * 2
    for layer in together.x:
        torch.testing.assert_close(together.x[layer], alone.x[layer])
    x, _ = capture_feed_forward(reader.model, TABLES["bert"], pad("one", [rows[1][0]]))[1]
    torch.testing.assert_close(together.x[1][-2:], x)
    assert len(fit.take_sample(reader, rows, 12).label) == 6 + 2


def test_negative_prompts_take_their_mean_away(tuned):
    base, experts = tuned("bert")
    prompts = [{"positive_prompts": ["dog cat"], "negative_prompts": ["war law"]}, {"positive_prompts": ["war"]}]
    experts = [{"source_model": e["source_model"], **p} for e, p in zip(experts, prompts, strict=True)]
    recipe = FuseRecipe.from_dict({"base_model": str(base), "experts": experts})
    plan = plan_fuse(recipe)
    rows, report = fit.fit_routers(plan, recipe)
    model = load_model(plan.dense_class, plan.source.checkpoint, "float32")
    tokenizer = load_tokenizer(plan.source.checkpoint)
    means = []
    for text in ("dog cat", "war law", "war"):
        captured = capture_feed_forward(model, TABLES["bert"], pad("one", [tokenizer(text)["input_ids"]]))
        means.append(captured[1][0].mean(0).double())
    wanted = [means[0] - means[1], means[2]]
    one, other = (vector / vector.norm() for vector in wanted)
    difference = rows[1][0] - rows[1][1]
    assert torch.cosine_similarity(difference.double(), one - other, dim=0) == pytest.approx(1)
    assert report["layers"][0]["held_out_texts"] is None
    assert any("No texts were held out" in note for note in report["notes"])


def test_few_tokens_are_said(tuned):
    base, experts = tuned("bert")
    experts = [
        {**expert, "texts": None, "positive_prompts": [word]} for expert, word in zip(experts, "ab", strict=True)
    ]
    recipe = FuseRecipe.from_dict({"base_model": str(base), "experts": experts, "gate_mode": "lda"})
    _, report = fit.fit_routers(plan_fuse(recipe), recipe)
    assert any("Layers 0, 1, 2: lda has 6 tokens to fit 32 dimensions to" in note for note in report["notes"])


def gaussians(dim=8, count=4000, offset=3.0):
    """Two classes two standard deviations apart, far from the origin, with a tilted covariance. They differ across
    the way to the origin: along it no plane through the origin parts them, and no router without a bias."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(dim, dtype=torch.float64) + 0.5 * torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    z = torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix
    expert = torch.arange(count) % 2
    gap = torch.randn(dim, generator=generator, dtype=torch.float64)
    away = torch.linalg.solve(mix.T @ mix, torch.full((dim,), offset, dtype=torch.float64))
    gap = gap - offset * (gap @ away) / (offset * away.sum())
    gap = gap * (2 / (gap @ torch.linalg.solve(mix.T @ mix, gap)).sqrt())
    return z + offset + expert[:, None] * gap, expert


def right(rows, x, expert):
    return ((x @ rows.T).argmax(1) == expert).double().mean().item()


@pytest.mark.parametrize(("gate", "lost"), [("lda", 0.03), ("probe", 0.08)])
def test_classifiers_without_an_offset_come_near_the_best(gate, lost):
    x, expert = gaussians()
    means = routers.class_means(x, expert, 2)
    precision = torch.linalg.inv((x - means[expert]).T @ (x - means[expert]) / len(x))
    best = (x - means.mean(0)) @ precision @ (means[1] - means[0]) > 0
    rows = routers.GATES[gate](x, expert, torch.zeros(2, x.shape[1], dtype=x.dtype))
    assert (best.long() == expert).double().mean() > 0.8
    assert right(rows, x, expert) > (best.long() == expert).double().mean() - lost


def test_an_offset_costs_nothing_after_a_layer_norm():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 16, generator=generator, dtype=torch.float64)
    expert = torch.arange(2000) % 2
    x[:, :4] += 2 * expert[:, None]
    bias = torch.randn(16, generator=generator, dtype=torch.float64) + 0.5
    x = torch.nn.functional.layer_norm(x, (16,)) * torch.linspace(0.5, 2, 16, dtype=torch.float64) + bias
    means = routers.class_means(x, expert, 2)
    covariance = routers.shrunk_covariance(x - means[expert])
    rows = routers.nearest_mean(means, covariance)
    weighted = torch.linalg.solve(covariance, means.T).T
    with_offset = x @ weighted.T - (weighted * means).sum(1) / 2
    logits = x @ rows.T
    ours, theirs = logits[:, 1] - logits[:, 0], with_offset[:, 1] - with_offset[:, 0]
    assert ((ours > 0) == (theirs > 0)).double().mean() > 0.99


def test_covariances_shrink_by_what_is_uncertain():
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.1, 3, 12, dtype=torch.float64)
    many = torch.randn(50_000, 12, generator=generator, dtype=torch.float64) * scale
    torch.testing.assert_close(routers.shrunk_covariance(many).diagonal(), scale**2, rtol=0.05, atol=0.01)
    few = routers.shrunk_covariance(many[:4])
    assert torch.linalg.cond(few) < 1e3
    assert torch.linalg.eigvalsh(routers.shrunk_covariance(torch.zeros(5, 3, dtype=torch.float64)))[0] > 0


@pytest.mark.parametrize("family", TRAINED)
def test_routers_train_and_nothing_else(family, tuned, tmp_path):
    base, experts = tuned(family)
    recipe = {"base_model": str(base), "experts": experts, "gate_mode": "random", "train_router": 30}
    made = hf_moe.fuse(recipe, tmp_path / "moe", verify=True)
    assert made.certificate["weights"]["identical"]
    training = made.routing["training"]
    assert training["steps"] == 30
    assert training["first_loss"] > 0
    plain = hf_moe.fuse({**recipe, "train_router": 0}, tmp_path / "plain", verify=False)
    one, other = weights(made.path), weights(plain.path)
    assert {name for name in one if not torch.equal(one[name], other[name])} == {
        tensor.name for tensor in made.plan.tensors if tensor.method == "router"
    }
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = sentences(family, 0, 60, seed=2) + sentences(family, 1, 60, seed=2)
    batch = pad("new", [tokenizer(text)["input_ids"] for text in texts])
    labels = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, -100)
    ids = batch.inputs["input_ids"]
    if not TESTED[family].is_decoder:
        hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.15
        ids, labels = ids.masked_fill(hidden, tokenizer.mask_token_id), labels.masked_fill(~hidden, -100)
    losses = []
    for folder in (made.path, plain.path):
        model = made.plan.moe_class.from_pretrained(folder)
        with torch.no_grad():
            losses.append(
                model(input_ids=ids, attention_mask=batch.inputs["attention_mask"], labels=labels).loss.item()
            )
    assert losses[0] < losses[1]


def test_the_mixture_in_memory_is_the_one_on_disk(changed, tmp_path):
    base, sources = changed()
    made = fused(base, sources, tmp_path / "moe")
    built, loaded = build_model(made.plan).state_dict(), made.plan.moe_class.from_pretrained(made.path).state_dict()
    assert all(torch.equal(built[name], tensor) for name, tensor in loaded.items())


# As a user types it


def test_a_recipe_of_mergekits(changed, hf_moe_command, tmp_path):
    base, sources = changed("llama")
    recipe = {
        "base_model": str(base),
        "gate_mode": "hidden",
        "dtype": "bfloat16",
        "experts_per_token": 1,
        "architecture": "mixtral",
        "experts": [
            {"source_model": sources[0], "positive_prompts": ["a cat", "a dog"], "negative_prompts": ["the law"]},
            {"source_model": sources[1], "positive_prompts": ["the law"]},
        ],
    }
    file, output = tmp_path / "recipe.yaml", tmp_path / "moe"
    file.write_text(yaml.safe_dump(recipe))
    code, out, err = hf_moe_command("fuse", file, output, "--dry-run", "--json")
    assert code == 0, err
    assert not output.exists()
    described = json.loads(out)
    assert described["experts"] == ["c0", "c1"]
    assert described["num_experts_per_tok"] == 1
    assert any("architecture 'mixtral'" in note for note in described["notes"])
    code, out, err = hf_moe_command("fuse", file, output, "--top-k", 2, "--max-shard-size", "40KB")
    assert code == 0, err
    assert "as the recipe says" in out
    assert len(list(output.glob("model-*.safetensors"))) > 1
    assert json.loads((output / "config.json").read_text())["num_experts_per_tok"] == 2
    assert hf_moe_command("fuse", file, output)[2].endswith("--overwrite replaces it.\n")
    code, out, err = hf_moe_command("fuse", file, output, "--overwrite", "-q", "--no-verify")
    assert (code, out, err) == (0, "", "")
    assert [entry["source"] for entry in json.loads(hf_moe_command("inspect", output, "--json")[1])["fused_from"]] == [
        "c0",
        "c1",
    ]
    code, out, err = hf_moe_command("verify", base, output)
    assert code == 1
    assert "is fused from several models" in err
    code, out, err = hf_moe_command("verify", file, output)
    assert code == 0, err
    assert "as the recipe says" in out
    change(Path(sources[1]), Path(sources[1]), 9)
    code, out, _ = hf_moe_command("verify", file, output)
    assert code == 1
    assert "is not as planned" in out


def test_random_gates_say_what_they_are(changed, tmp_path):
    base, sources = changed()
    made = fused(base, sources, tmp_path / "moe", gate_mode="uniform_random")
    assert any("drawn at random, with logits of deviation 0.1" in note for note in made.plan.notes)
    assert made.routing == {}


PROMPTS = [{"positive_prompts": ["dog"]}, {"positive_prompts": ["law"]}]


def bad(**values):
    """A recipe of two experts that is right but for `values`; BASE and OTHER are folders."""
    experts = [{"source_model": source, **prompts} for source, prompts in zip(("BASE", "OTHER"), PROMPTS, strict=True)]
    return {"base_model": "BASE", "experts": experts, **values}


def of_experts(*changes):
    recipe = bad()
    recipe["experts"] = [{**expert, **change} for expert, change in zip(recipe["experts"], changes, strict=True)]
    return recipe


BAD = [
    (bad(gate_mod="hidden"), "did you mean 'gate_mode'?"),
    (bad(gate_mode="hiden"), "gate_mode"),
    (bad(expert_per_token=2), "did you mean 'experts_per_token'?"),
    (bad(experts_per_token=2, num_experts_per_tok=2), "which are the same"),
    (bad(experts_per_token=3), "between 1 and num_experts (2)"),
    (bad(experts_per_token="two"), "num_experts_per_tok"),
    (bad(experts="BASE"), "experts"),
    (bad(experts=["BASE", "OTHER"]), "experts[0]: should be a mapping"),
    (bad(experts=[{"source_model": "BASE", "positive_prompts": ["a"]}]), "at least 2"),
    (bad(experts=[]), "at least 2"),
    ({"base_model": "BASE"}, "names no experts"),
    (of_experts({"source": "x"}, {}), "did you mean 'source_model'?"),
    (of_experts({"positive_prompts": "dog"}, {}), "positive_prompts"),
    (of_experts({"positive_prompts": [1]}, {}), "positive_prompts"),
    (of_experts({"positive_prompts": []}, {}), "has neither positive_prompts nor texts"),
    (of_experts({"positive_prompts": [" "]}, {}), "has an empty prompt"),
    (of_experts({"positive_prompts": ["law"]}, {}), "have the same prompts and texts"),
    (of_experts({"texts": "NOWHERE"}, {}), "can't be read as text"),
    (of_experts({"noise_scale": 0.1}, {}), "noise_scale is not read"),
    (of_experts({"residual_scale": 0.1}, {}), "residual_scale is for shared_experts"),
    (of_experts({"source_model": "BASE+lora"}, {}), "merge it into its base model first"),
    (of_experts({"source_model": "./nowhere"}, {}), "no such folder"),
    (of_experts({}, {"source_model": "GPT2"}), "is a gpt2, but the base"),
    (of_experts({}, {"source_model": "SHALLOW"}), "its number of layers is 2, but that of the base"),
    (of_experts({}, {"source_model": "THIN"}), "its hidden size is 16"),
    (of_experts({}, {"source_model": "NARROW"}), "of layer 0's feed-forward network"),
    (of_experts({}, {"source_model": "RELU"}), "its activation is relu"),
    (of_experts({}, {"source_model": "FEW"}), "its vocabulary size is 60"),
    (of_experts({}, {"source_model": "OTHER_WORDS"}), "in its tokenizer 'cat' is id 7, in that of the base"),
    (bad(shared_experts=[{"source_model": "BASE"}] * 2), "1 is the most"),
    (bad(shared_experts=[{"source_model": "BASE", "residual_scale": 0}]), "must be above 0"),
    (bad(train_router=-1), "train_router"),
    (bad(router_logit_std=0), "router_logit_std"),
    (bad(max_shard_size="big"), "max_shard_size"),
    (bad(moe_layers="7"), "no layer 7"),
    (bad(dtype="int8"), "dtype"),
    (bad(rest="mean"), "rest"),
]


@pytest.fixture
def folders(dense_folder, tmp_path, changed):
    base = dense_folder("bert")
    made = {"BASE": base, "OTHER": change(base, tmp_path / "other", 1), "GPT2": dense_folder("gpt2")}
    made["SHALLOW"] = dense_folder("bert", num_hidden_layers=2)
    made["THIN"] = dense_folder("bert", hidden_size=16)
    made["NARROW"] = dense_folder("bert", intermediate_size=32)
    made["RELU"] = dense_folder("bert", hidden_act="relu")
    made["FEW"] = dense_folder("bert", vocab_size=60)
    made["OTHER_WORDS"] = shutil.copytree(made["OTHER"], tmp_path / "words")
    swapped = (made["OTHER_WORDS"] / "tokenizer.json").read_text()
    swapped = swapped.replace('"dog"', '"tmp"').replace('"cat"', '"dog"').replace('"tmp"', '"cat"')
    (made["OTHER_WORDS"] / "tokenizer.json").write_text(swapped)
    return {name: str(folder) for name, folder in made.items()}


def test_bad_recipes_are_refused_in_one_line(folders, hf_moe_command, tmp_path):
    before = sorted(tmp_path.iterdir())
    file = tmp_path / "recipe.yaml"
    for recipe, message in BAD:
        text = yaml.safe_dump(recipe)
        for name, folder in folders.items():
            text = text.replace(f": {name}\n", f": {folder}\n").replace(f": {name}+", f": {folder}+")
        file.write_text(text)
        code, out, err = hf_moe_command("fuse", file, tmp_path / "moe")
        assert code in (1, 2), message
        assert message in err
        assert err.count("\n") == 1, err
        assert out == ""
        file.unlink()
        assert sorted(tmp_path.iterdir()) == before, message


LAUGHS = "x: &a [y, y, y, y, y, y, y, y, y, y]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "aliases written out"),
        ("a: &a {x: 1}\n<<: [*a, *a]\nb: &b [*b]\n", "aliases written out"),
        ("base_model: " + "[" * 3000, "can't be read as a YAML recipe"),
        ("seed: " + "1" * 5000, "can't be read as a YAML recipe"),
        ("seed: 2001-99-99", "can't be read as a YAML recipe"),
        ("!!python/object/apply:os.system ['true']", "can't be read as a YAML recipe"),
        ("seed: 1\nseed: 2", "key 'seed' stands twice"),
        ("- a", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("1: 2", "unknown key 1"),
    ],
)
@pytest.mark.parametrize("verb", ["fuse", "upcycle"])
def test_hostile_recipes(verb, text, message, hf_moe_command, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    code, _, err = hf_moe_command(verb, file, tmp_path / "moe")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_base_that_can_not_read_prompts(changed, tmp_path):
    base, sources = changed()
    bare = shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "vocab*"))
    experts = [{"source_model": s, **p} for s, p in zip(sources, PROMPTS, strict=True)]
    with pytest.raises(SourceError, match="has no tokenizer"):
        hf_moe.fuse({"base_model": str(bare), "experts": experts}, tmp_path / "moe")
    broken = shutil.copytree(base, tmp_path / "broken")
    tensors = weights(broken)
    tensors["bert.embeddings.word_embeddings.weight"][:] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="layer 0 makes NaN or Inf of the passages"):
        hf_moe.fuse({"base_model": str(broken), "experts": experts, "allow_nonfinite": True}, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()
    assert not (tmp_path / "moe.partial").exists()


def test_embeddings_of_another_width(tmp_path, dense_folder):
    base = dense_folder("electra")
    other = change(base, tmp_path / "other", 1)
    experts = [{"source_model": str(s), **p} for s, p in zip((base, other), PROMPTS, strict=True)]
    recipe = {"base_model": str(base), "experts": experts, "gate_mode": "cheap_embed"}
    with pytest.raises(UsageError, match="has embeddings of 16 numbers"):
        hf_moe.fuse(recipe, tmp_path / "moe")
    base = dense_folder("bert")
    experts = [{"source_model": str(base), **p} for p in PROMPTS]
    made = hf_moe.fuse({**recipe, "base_model": str(base), "experts": experts}, tmp_path / "moe", verify=False)
    cosine = torch.cosine_similarity(made.plan.routers[0].flatten(), made.plan.routers[2].flatten(), dim=0)
    assert cosine == pytest.approx(1)
