"""Bad input: one line, the right exit code, and nothing written, lost or run."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_moe
from hf_moe.cli import main
from hf_moe.convert import output as output_module

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_index(folder, change):
    file = folder / INDEX
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def edit_header(folder, change):
    data = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    write_header(folder, json.dumps(header).encode())


def first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


def shard_without_tensor(folder):
    tensors = load_file(first_shard(folder))
    tensors.pop(next(iter(tensors)))
    save_file(tensors, first_shard(folder))


def double_tensor(folder):
    one, two = sorted(folder.glob("model-*.safetensors"))[:2]
    tensors = load_file(one)
    save_file({**load_file(two), next(iter(tensors)): next(iter(tensors.values()))}, two)


def link_outside(folder):
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / WEIGHTS, outside)
    (folder / WEIGHTS).symlink_to(outside)


def link_out(file):
    outside = file.parent.parent / "outside"
    shutil.move(file, outside)
    file.symlink_to(outside)


def link_side_file(folder):
    (folder.parent / "secret").write_text("secret")
    (folder / "NOTICE").symlink_to(folder.parent / "secret")


def config_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def write_header(folder, raw):
    data = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + size :])


def double_in_header(folder):
    data = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    again = json.dumps({LAYER: header[LAYER]})[1:]
    write_header(folder, (json.dumps(header)[:-1] + ", " + again).encode())


def nest_header(folder):
    write_header(folder, b"[" * 200_000)


def pickles_only(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def truncate(file, count=-100):
    file.write_bytes(file.read_bytes()[:count])


def fill_in(value):
    def change(tensors):
        tensors["bert.encoder.layer.1.intermediate.dense.weight"][3, 4] = value

    return change


LAYER = "bert.encoder.layer.1.attention.self.query.weight"

# What is done to a good checkpoint, and words of the sentence that answers.
BROKEN = {
    "empty folder": (empty, "the folder is empty"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "is no JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "should hold a JSON object"),
    "config says a thing twice": (
        lambda f: (f / "config.json").write_text('{"model_type": "bert", "model_type": "gpt2"}'),
        "'model_type' stands twice",
    ),
    "unknown architecture": (lambda f: edit_config(f, model_type="reformer"), "Known are bert, "),
    "architecture of two stacks": (lambda f: edit_config(f, model_type="mt5"), "start from an encoder or a decoder"),
    "architecture that left": (lambda f: edit_config(f, model_type="transfo-xl"), "start from ModernBERT"),
    "no architecture": (lambda f: edit_config(f, model_type=None), "can't be converted"),
    "unknown head": (lambda f: edit_config(f, architectures=["BertForTea"]), "known for bert are BertForMaskedLM"),
    "remote code": (lambda f: edit_config(f, auto_map={"AutoModel": "evil.Evil"}), "asks for remote code"),
    "mixture already": (lambda f: edit_config(f, model_type="bert_moe"), "is a mixture of experts already"),
    "mixture of another kind": (
        lambda f: edit_config(f, model_type="mixtral", num_local_experts=8),
        "is a mixture of experts already",
    ),
    "quantized": (lambda f: edit_config(f, quantization_config={"bits": 4}), "is quantized"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "but no weights"),
    "pickle only": (pickles_only, "only pickled weights"),
    "other width": (lambda f: edit_config(f, hidden_size=48), "but config.json makes it"),
    "other number of heads": (lambda f: edit_config(f, num_attention_heads=5), "that can be built"),
    "fewer layers": (lambda f: edit_config(f, num_hidden_layers=2), "says 2 layers, but the weights hold 3"),
    "absurdly many layers": (lambda f: edit_config(f, num_hidden_layers=10**10), "but the weights hold 3"),
    "absurd vocabulary": (lambda f: edit_config(f, vocab_size=10**10), "but config.json makes it"),
    "absurdly many labels": (lambda f: edit_config(f, num_labels=10**12), "1000000 is the most"),
    "config with a wrong type": (lambda f: edit_config(f, hidden_size="wide"), "config.json is refused"),
    "truncated file": (lambda f: truncate(f / WEIGHTS), "cut short or damaged"),
    "truncated header": (lambda f: truncate(f / WEIGHTS, 50), "cut short or no safetensors file"),
    "empty file": (lambda f: truncate(f / WEIGHTS, 0), "cut short or no safetensors file"),
    "trailing bytes": (lambda f: (f / WEIGHTS).open("ab").write(b"xx"), "cut short or damaged"),
    "header of a petabyte": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2**50) + (f / WEIGHTS).read_bytes()[8:]),
        "no safetensors file",
    ),
    "overlapping tensors": (
        lambda f: edit_header(f, lambda h: h[LAYER].update(data_offsets=[0, 4096])),
        "do not fit its shape",
    ),
    "negative shape": (lambda f: edit_header(f, lambda h: h[LAYER].update(shape=[-32, -32])), "do not fit its shape"),
    "unknown dtype": (lambda f: edit_header(f, lambda h: h[LAYER].update(dtype="F4")), "dtype F4"),
    "integer weights": (lambda f: edit_weights(f, lambda t: t.update({LAYER: t[LAYER].int()})), "dtype I32"),
    "tensor missing": (lambda f: edit_weights(f, lambda t: t.pop(LAYER)), f"'{LAYER}' is missing"),
    "expert source missing": (
        lambda f: edit_weights(f, lambda t: t.pop("bert.encoder.layer.0.output.dense.bias")),
        "output.dense.bias' is missing",
    ),
    "tensor left over": (
        lambda f: edit_weights(f, lambda t: t.update({"bert.extra": torch.ones(2)})),
        "'bert.extra' is left over",
    ),
    "the same tensor by two names": (
        lambda f: edit_weights(f, lambda t: t.update({LAYER.removeprefix("bert."): t[LAYER].clone()})),
        "are the same tensor",
    ),
    "NaN": (lambda f: edit_weights(f, fill_in(float("nan"))), "holds NaN or Inf"),
    "Inf": (lambda f: edit_weights(f, fill_in(float("inf"))), "holds NaN or Inf"),
    "link out of the folder": (link_outside, "leads out of its folder"),
    "side file that is a link out": (link_side_file, "leads out of its folder"),
    "config that is a link out": (lambda f: link_out(f / "config.json"), "leads out of its folder"),
    "weights under another name": (
        lambda f: edit_config(f, transformers_weights="real.safetensors"),
        "points to weights of another name",
    ),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds a PEFT adapter"),
    "model type that is a list": (lambda f: edit_config(f, model_type=["bert"]), "holds a list as model_type"),
    "architectures of numbers": (lambda f: edit_config(f, architectures=[5]), "names no class"),
    "config that is a folder": (config_folder, "can't be read"),
    "negative number of heads": (lambda f: edit_config(f, num_attention_heads=-1), "does not run"),
    "shape of floats": (lambda f: edit_header(f, lambda h: h[LAYER].update(shape=[32.0, 32.0])), "whole numbers"),
    "offsets of booleans": (
        lambda f: edit_header(f, lambda h: h[LAYER].update(data_offsets=[False, 1])),
        "whole numbers",
    ),
    "metadata of numbers": (lambda f: edit_header(f, lambda h: h.update(__metadata__={"a": 5})), "more than strings"),
    "tensor twice in a header": (double_in_header, "a name stands twice"),
    "header nested without end": (nest_header, "can't be read"),
}
BROKEN_SHARDS = {
    "missing shard": (lambda f: first_shard(f).unlink(), "is missing, though the index names it"),
    "truncated shard": (lambda f: truncate(first_shard(f)), "cut short or damaged"),
    "index points out": (
        lambda f: edit_index(f, lambda m: m.update({LAYER: "../outside.safetensors"})),
        "no safetensors file of this folder",
    ),
    "index names an absolute path": (
        lambda f: edit_index(f, lambda m: m.update({LAYER: "/etc/passwd"})),
        "no safetensors file of this folder",
    ),
    "tensor not in its shard": (shard_without_tensor, "but is not"),
    "tensor not in the index": (lambda f: edit_index(f, lambda m: m.pop(LAYER)), "does not list tensor"),
    "tensor in two shards": (double_tensor, "stands in two shards"),
    "empty index": (lambda f: edit_index(f, lambda m: m.clear()), "has no weight_map"),
}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(monkeypatch, capsys, home, code, words, *arguments):
    """Runs the command, which must fail with `code` and one line that holds `words`, and change nothing in `home`."""
    before = snapshot(home)
    monkeypatch.setattr(sys, "argv", ["hf-moe", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    assert exit_.value.code == code
    assert captured.out == ""
    assert captured.err.startswith("Error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert snapshot(home) == before


@pytest.fixture
def good(dense_folder, tmp_path):
    return Path(shutil.copytree(dense_folder("bert"), tmp_path / "dense"))


@pytest.mark.parametrize("case", BROKEN)
def test_broken_source(case, good, tmp_path, monkeypatch, capsys):
    damage, words = BROKEN[case]
    damage(good)
    refused(monkeypatch, capsys, tmp_path, 1, words, "upcycle", good, tmp_path / "moe")


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_broken_shards(case, dense_folder, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(dense_folder("bert", max_shard_size="40KB"), tmp_path / "dense"))
    damage, words = BROKEN_SHARDS[case]
    damage(folder)
    refused(monkeypatch, capsys, tmp_path, 1, words, "upcycle", folder, tmp_path / "moe")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num-experts", 1], "at least 2 experts"),
        (["--num-experts", 4, "--top-k", 5], "between 1 and num_experts (4)"),
        (["--top-k", 0], "between 1 and num_experts (8)"),
        (["--layers", "3"], "no layer 3; the model's are 0 to 2"),
        (["--layers", "0,0"], "names a layer twice"),
        (["--layers", "every-4"], "chooses none of the model's 3 layers"),
        (["--layers", "every-0"], "write 'all', 'every-2', or indices"),
        (["--layers", "some"], "write 'all', 'every-2', or indices"),
        (["--layers", "-1"], "write 'all', 'every-2', or indices"),
        (["--noise-std", -1], "can't be negative"),
        (["--noise-std", "nan"], "must be finite"),
        (["--noise-std", "1e300"], "leads out of the numbers"),
        (["--router-logit-std", "inf"], "must be finite"),
        (["--num-experts", 10**20], "is the most"),
        (["--max-shard-size", "1B"], "write a size such as '5GB'"),
        (["--router-logit-std", 0], "would tie all experts"),
        (["--max-shard-size", "big"], "write a size such as '5GB'"),
    ],
)
def test_impossible_options(options, words, good, tmp_path, monkeypatch, capsys):
    refused(monkeypatch, capsys, tmp_path, 2, words, "upcycle", good, tmp_path / "moe", *options)


def test_output_in_the_way(good, tmp_path, monkeypatch, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(taken)
    for output, words in [
        (taken, "exists already; --overwrite replaces it"),
        (good, "overlaps the source"),
        (good / "inside", "overlaps the source"),
        (tmp_path, "overlaps the source"),
        (tmp_path / "x" / ".." / "dense" / "inside", "overlaps the source"),
    ]:
        refused(monkeypatch, capsys, tmp_path, 2, words, "upcycle", good, output)
    for output in (tmp_path / "file", link):
        refused(monkeypatch, capsys, tmp_path, 2, "not overwritten", "upcycle", good, output, "--overwrite")
    refused(monkeypatch, capsys, tmp_path, 2, "overlaps", "upcycle", good, tmp_path, "--overwrite")


def test_read_only_output(good, tmp_path, monkeypatch, capsys):
    output = tmp_path / "locked" / "moe"
    output.parent.mkdir(mode=0o555)
    if os.geteuid() == 0:  # permissions do not stop root, so the file system says it

        def read_only(*arguments, **options):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(Path, "mkdir", read_only)
        refused(monkeypatch, capsys, tmp_path, 1, "can't be written", "upcycle", good, tmp_path / "new" / "moe")
    refused(monkeypatch, capsys, tmp_path, 1, "can't be written", "upcycle", good, output)


def test_no_space_left(good, tmp_path, monkeypatch, capsys):
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(monkeypatch, capsys, tmp_path, 1, "1,000 free", "upcycle", good, tmp_path / "moe")


def test_a_disk_that_fills_up_leaves_nothing(good, tmp_path, monkeypatch, capsys):
    import hf_moe.convert.stream as stream

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(stream.METHODS, "router", full)
    refused(monkeypatch, capsys, tmp_path, 1, "No space left on device", "upcycle", good, tmp_path / "new" / "moe")


@pytest.mark.parametrize("source", ["./missing", "/no/such/folder", "a/b/c"])
def test_missing_folder(source, tmp_path, monkeypatch, capsys):
    refused(monkeypatch, capsys, tmp_path, 1, "no such folder", "upcycle", source, tmp_path / "moe")


def test_a_hub_id_without_a_network(tmp_path, monkeypatch, capsys):
    refused(monkeypatch, capsys, tmp_path, 1, "the Hub did not give it", "upcycle", "no/where", tmp_path / "moe")


def test_a_file_as_source(good, tmp_path, monkeypatch, capsys):
    refused(monkeypatch, capsys, tmp_path, 1, "is a file", "upcycle", good / WEIGHTS, tmp_path / "moe")


def test_nan_is_converted_when_asked(good, tmp_path, monkeypatch, capsys):
    edit_weights(good, fill_in(float("nan")))
    arguments = ["upcycle", good, tmp_path / "moe", "--allow-nonfinite", "--no-verify", "-q"]
    monkeypatch.setattr(sys, "argv", ["hf-moe", *map(str, arguments)])
    main_exits_well()
    up = load_file(tmp_path / "moe" / WEIGHTS)["bert.encoder.layer.1.mlp.experts.up_proj"]
    assert up.isnan().sum() == 8


def main_exits_well():
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base_model: x\nnum_expert: 4\n", "did you mean 'num_experts'?"),
        ("num_experts: 4\n", "names no base_model"),
        ("base_model: x\nnum_experts: four\n", "num_experts"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("a: [", "can't be read as a YAML recipe"),
        ("!!python/object/apply:os.system ['true']", "can't be read as a YAML recipe"),
    ],
)
def test_bad_recipe(text, words, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    refused(monkeypatch, capsys, tmp_path, 2, words, "upcycle", recipe, tmp_path / "moe")


def test_a_name_that_no_file_system_takes(good, tmp_path, monkeypatch, capsys):
    name = "a" * 300
    refused(monkeypatch, capsys, tmp_path, 2, "can't be a folder", "upcycle", good, tmp_path / name)
    refused(monkeypatch, capsys, tmp_path, 1, "no such folder", "upcycle", f"./{name}", tmp_path / "moe")
    refused(monkeypatch, capsys, tmp_path, 1, "no such folder", "upcycle", "~nosuchuser/x", tmp_path / "moe")


def test_verify_refuses_what_is_no_pair(good, dense_folder, tmp_path, monkeypatch, capsys):
    refused(monkeypatch, capsys, tmp_path, 1, "has model_type 'bert'", "verify", good, good)
    refused(monkeypatch, capsys, tmp_path, 1, "ixture", "verify", dense_folder("gpt2"), good)
    hf_moe.upcycle(good, tmp_path / "moe", num_experts=4)
    others = {
        "another width": dense_folder("bert", hidden_size=16),
        "another vocabulary": dense_folder("bert", vocab_size=72),
        "fewer layers": dense_folder("bert", num_hidden_layers=2),
        "another head": dense_folder("bert", "BertForTokenClassification"),
    }
    for other in others.values():
        refused(monkeypatch, capsys, tmp_path, 1, "ixture", "verify", other, tmp_path / "moe")


@pytest.mark.parametrize(
    "values",
    [
        {"num_experts": 5},
        {"num_experts_per_tok": 9},
        {"hidden_size": 16},
        {"moe_layers": [0]},
        {"moe_layers": [7]},
        {"hidden_act": "nope"},
        {"architectures": ["Tea"]},
        {"num_experts": "4"},
    ],
    ids=str,
)
def test_verify_refuses_a_mixture_whose_config_is_wrong(values, good, tmp_path, monkeypatch, capsys):
    hf_moe.upcycle(good, tmp_path / "moe", num_experts=4)
    edit_config(tmp_path / "moe", **values)
    refused(monkeypatch, capsys, tmp_path, 1, str(tmp_path / "moe"), "verify", good, tmp_path / "moe")


def test_a_foreign_certificate(good, tmp_path, monkeypatch, capsys):
    hf_moe.upcycle(good, tmp_path / "moe", num_experts=4)
    (tmp_path / "moe" / "certificate.json").write_text("{}")
    refused(monkeypatch, capsys, tmp_path, 1, "certificate.json is none of ours", "inspect", tmp_path / "moe")


def test_markup_in_a_path_is_a_path(good, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf-moe", "upcycle", str(good), str(tmp_path / "[bold]" / "[/x]moe")])
    main_exits_well()
    assert "[bold]/[/x]moe" in capsys.readouterr().out.replace("\n", "").replace(" ", "")


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(number, good, tmp_path):
    """The process is told to write slowly, and is ended in the middle."""
    script = (
        "import sys, time, hf_moe.convert.stream as stream\n"
        "from hf_moe.cli import main\n"
        "def slow(*arguments):\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "stream.METHODS['router'] = slow\n"
        f"sys.argv = ['hf-moe', 'upcycle', {str(good)!r}, {str(tmp_path / 'moe')!r}]\n"
        "main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == [good]


def test_an_interrupted_overwrite_keeps_the_old(good, tmp_path, monkeypatch):
    old = hf_moe.upcycle(good, tmp_path / "moe", num_experts=4).path
    before = snapshot(old)

    def interrupted(one, other):
        raise KeyboardInterrupt

    exchange = output_module._exchange
    monkeypatch.setattr(output_module, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hf_moe.upcycle(good, tmp_path / "moe", num_experts=5, overwrite=True)
    assert snapshot(old) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe", "moe.partial"]
    monkeypatch.setattr(output_module, "_exchange", exchange)
    hf_moe.upcycle(good, tmp_path / "moe", num_experts=5, overwrite=True)
    assert snapshot(old) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]
