"""Experts over a Hub: sent, fetched byte by byte, applied, and opened by strangers; each in a clean process."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from tests.conftest import batch, save_tokenizer, tiny_moe
from tests.hub.server import Hub
from tests.hub.test_experts import tune

# Several commands in one process, which takes seconds to start -> of each its exit code and what it said.
CLI = """
import contextlib, io, json, sys
from hf_moe.cli import main
said = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, code = ["hf-moe", *arguments], 0
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code or 0
    said.append((code, err.getvalue()))
print(json.dumps(said))
"""
OPEN = """
import sys, torch
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2])).logits, sys.argv[3])
"""
WEIGHTS = "experts.safetensors"


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtures")
    tiny_moe("bert").save_pretrained(folder / "base")
    tune(folder / "base", folder / "tuned", {"0": [1, 2], "2": [3]}, {"0": [1]})
    torch.save(batch("bert"), folder / "inputs.pt")
    return folder


@pytest.fixture(scope="module")
def sent(mixtures, tmp_path_factory):
    """A Hub with a base, and `ann/law`, experts for it that were exported and published; and the base's commit."""
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        commit = hub.add("ann/base", files(mixtures / "base"))
        export = ["experts", "export", "ann/base", str(mixtures / "tuned"), str(mixtures / "art"), "--as", "xor"]
        done = subprocess.run(
            [sys.executable, "-c", CLI, json.dumps([export, ["publish", str(mixtures / "art"), "ann/law"]])],
            env={**os.environ, **hub.environment(mixtures / "home")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert [code for code, _ in json.loads(done.stdout)] == [0, 0], done.stdout
        assert "base_model_relation: adapter" in hub.files("ann/law")["README.md"].decode()
        hub.add("ann/base", {"config.json": b"{}", "model.safetensors": b"other"})  # what is pinned stays
        yield hub, commit


def commands(client, hub, *lines):
    return json.loads(client(CLI, json.dumps([[*map(str, line)] for line in lines]), at=hub))


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def gets(hub):
    return [request for request in hub.requests if request.method == "GET" and request.sent]


def test_an_artefact_names_its_base(sent, mixtures):
    base = json.loads((mixtures / "art" / "experts_config.json").read_text())["base"]
    assert (base["repo"], base["commit"]) == ("ann/base", sent[1])
    for file in (mixtures / "art").iterdir():  # and nothing of the machine that made it
        assert str(mixtures).encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize("bare", [True, False], ids=["stranger", "friend"])
def test_automodel_and_classes_open_it(bare, sent, client, mixtures, tmp_path):
    tuned = AutoModelForMaskedLM.from_pretrained(mixtures / "tuned")
    with torch.no_grad():
        wanted = tuned(**batch("bert")).logits
    code = OPEN if bare else OPEN.replace("transformers", "hf_moe").replace("AutoModel", "BertMoe")
    client(code, "ann/law", mixtures / "inputs.pt", tmp_path / "got.pt", bare=bare, at=sent[0])
    assert torch.equal(torch.load(tmp_path / "got.pt"), wanted)


def test_pull_fetches_only_the_bytes_it_needs(sent, client, mixtures, tmp_path):
    hub, base, out = sent[0], mixtures / "base", tmp_path / "pulled"
    hub.add("ann/again", files(mixtures / "art"))
    hub.requests.clear()
    done = commands(
        client,
        hub,
        ["experts", "pull", "ann/law@main#0.2", "ann/law@main#2.3", out, "-q"],
        ["experts", "apply", base, out, tmp_path / "applied", "-q"],
        ["experts", "compose", base, tmp_path / "composed", "ann/again#0.2,2.3", "-q"],
    )
    assert [code for code, _ in done] == [0, 0, 0], done
    held = json.loads((mixtures / "art" / "experts_config.json").read_text())["tensors"]
    data = (mixtures / "art" / WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    wanted = [name for name, entry in held.items() if (entry["layer"], entry["expert"]) in ((0, 2), (2, 3))]
    repo = f"/ann/law/resolve/{hub.repos.all['ann/law'].find('main').oid}/{WEIGHTS}"
    store = f"/objects/{hashlib.sha256(data).hexdigest()}"
    first, *ranges = [request for request in gets(hub) if request.path in (repo, store)]
    assert first.range == "bytes=0-65535"
    assert sum(request.sent for request in ranges) == sum(
        end - start for start, end in (header[name]["data_offsets"] for name in wanted)
    )
    assert len(ranges) == 2  # neighbours come together
    assert not [request for request in gets(hub) if request.path.endswith(".py")]
    pulled, whole = load_file(out / WEIGHTS), load_file(mixtures / "art" / WEIGHTS)
    assert pulled.keys() == set(wanted)
    assert all(torch.equal(pulled[name], whole[name]) for name in wanted)

    applied, composed, tuned = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "applied", tmp_path / "composed", mixtures / "tuned")
    )
    name = "bert.encoder.layer.0.mlp.experts.up_proj"
    assert torch.equal(applied[name][2], tuned[name][2])
    assert not torch.equal(applied[name][1], tuned[name][1])
    assert all(torch.equal(applied[name], composed[name]) for name in applied)


def test_rows_are_fitted_to_texts(sent, client, mixtures, tmp_path):
    """The same from the Hub as from the folder that was sent."""
    shutil.copytree(mixtures / "base", tmp_path / "base")
    save_tokenizer("bert", tmp_path / "base")
    for name, words in (("law", "the law of a free people"), ("rest", "a cat sat on the mat")):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{words} {word}" for word in words.split()))
    start, end = ["experts", "compose", tmp_path / "base"], [f"base={tmp_path / 'rest.txt'}", "-q"]
    lines = [
        [*start, tmp_path / name, f"{source}{at}#0.2", "--router", "fitted", "--texts", f"{source}={tmp_path}/law.txt"]
        for name, source, at in (("a", "ann/law", "@main"), ("b", mixtures / "art", ""))
    ]
    done = commands(client, sent[0], *([*line, *end] for line in lines))
    assert [code for code, _ in done] == [0, 0], done
    hub, folder, base = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "base"))
    gate = "bert.encoder.layer.0.mlp.gate.weight"
    assert all(torch.equal(hub[name], folder[name]) for name in hub)
    assert not torch.equal(hub[gate][2], base[gate][2])
    assert torch.equal(hub[gate][[0, 1, 3]], base[gate][[0, 1, 3]])


def test_bad_input_is_refused_in_a_line(sent, client, mixtures, tmp_path):
    hub, out = sent[0], tmp_path / "out"
    hub.add("ann/corrupt", files(mixtures / "art"))
    hub.fault("GET /ann/corrupt/resolve/.*experts.safetensors", "corrupt", skip=1)
    damaged = bytearray((mixtures / "art" / WEIGHTS).read_bytes())
    damaged[-20] ^= 1
    hub.add("ann/damaged", {**files(mixtures / "art"), WEIGHTS: bytes(damaged)})
    tune(mixtures / "base", tmp_path / "other", {"0": [0]})
    was, found = (
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in (mixtures / "base", tmp_path / "other")
    )
    # experts, exit code, words
    pulls = [
        ("ann/corrupt#0.2", 1, ("ann/corrupt", "damaged", "sha256")),
        ("ann/damaged", 1, ("ann/damaged", "damaged", "sha256")),
        ("ann/law#0.9", 2, ("no expert 0.9",)),
        ("ann/none#0.1", 1, ("ann/none",)),
        ("ann/law@nowhere#0.1", 1, ("ann/law",)),
        ("ann/base#0.1", 1, ("gave no experts",)),
        ("ann/law#first", 2, ("LAYER.EXPERT",)),
        ("ann law#0.1", 1, ("ann law",)),
    ]
    lines = [(["experts", "pull", spec, out, "-q"], code, words) for spec, code, words in pulls]
    lines.append((["experts", "apply", tmp_path / "other", "ann/law", out, "-q"], 2, (was, found)))
    lines.append((["experts", "apply", tmp_path / "other", "ann/law#", out, "-q"], 2, ("after '#'",)))
    lines.append((["upcycle", mixtures / "art", out, "-q"], 1, ("experts apply",)))
    done = commands(client, hub, *(line for line, _, _ in lines))
    for (code, said), (line, wanted, words) in zip(done, lines, strict=True):
        assert code == wanted, (line, said)
        assert all(word in said for word in words), (line, said)
        assert len(said.strip().splitlines()) == 1, (line, said)
    assert not out.exists()


def test_a_stranger_refuses_a_base_that_changed(sent, client, mixtures, tmp_path):
    tune(mixtures / "base", tmp_path / "other", {"0": [0]})
    shutil.copytree(mixtures / "art", tmp_path / "local")
    held = json.loads((tmp_path / "local" / "experts_config.json").read_text())
    was = held["base"]["files"]["model.safetensors"]
    held["base"] |= {"repo": "other", "commit": None}
    (tmp_path / "local" / "experts_config.json").write_text(json.dumps(held))
    done = client(OPEN, tmp_path / "local", mixtures / "inputs.pt", tmp_path / "got.pt", bare=True, ok=False)
    found = hashlib.sha256((tmp_path / "other" / "model.safetensors").read_bytes()).hexdigest()
    assert was in done.stderr
    assert found in done.stderr
