"""Publishing, against a Hub that speaks the real protocol: what goes, what stays, and what a stranger then has."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.utils._http as http
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import hf_moe
from hf_moe.convert.checkpoint import file_sha256
from hf_moe.hub import publish as published
from hf_moe.hub.staging import is_allowed
from tests.hub.server import TOKENS, Hub

COMMAND = "import sys; from hf_moe.cli import main; sys.argv = ['hf-moe', *sys.argv[1:]]; main()"
LOAD = """
import sys, torch, transformers
from safetensors.torch import save_file
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = tokenizer("abba bed the dog sat on the mat", return_tensors="pt")
with torch.no_grad():
    save_file({"logits": model(**inputs).logits}, sys.argv[3])
"""


@pytest.fixture(scope="session")
def made(dense_folder, tmp_path_factory):
    """family -> a mixture of the tiny dense checkpoint; copied by each test that changes it."""
    folder = tmp_path_factory.mktemp("made")

    def make(family, **how):
        output = folder / f"{family}-moe{''.join(how.values())}"
        if not output.exists():
            hf_moe.upcycle(dense_folder(family), output, num_experts=4, **how)
        return output

    return make


@pytest.fixture
def bert(made, tmp_path):
    return Path(shutil.copytree(made("bert"), tmp_path / "bert-moe"))


@pytest.fixture
def send_alone(client):
    """Runs `hf-moe publish` in a process of its own."""

    def run(folder, *options, **how):
        return client(COMMAND, "publish", folder, "ann/model", "--base-model", "none", *options, **how)

    return run


@pytest.fixture
def send(hub, hf_moe_command, monkeypatch, tmp_path):
    """Runs it in this process, which saves its start, and without trying the folder in a clean one."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(http, "time", SimpleNamespace(**{**vars(http.time), "sleep": lambda seconds: None}))
    monkeypatch.setattr(sys.modules["hf_moe.hub.publish"], "check_loads", lambda staged: 0)

    def run(folder, *options, repo="ann/model", ok=True, token="token-of-ann", base="none"):
        options = (*options, *(("--base-model", base) if base else ()))
        (tmp_path / "token").unlink(missing_ok=True)
        if token:
            (tmp_path / "token").write_text(token)
        code, out, err = hf_moe_command("publish", folder, repo, *options)
        assert not ok or code == 0, err
        return out if ok else SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


def refusal(done) -> str:
    """The one line that a refused command says."""
    assert done.returncode in (1, 2), done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not any(token in done.stdout + done.stderr for token in TOKENS)
    return lines[0]


@pytest.mark.parametrize(
    ("family", "how", "auto_class", "xet"),
    [
        ("bert", {}, "AutoModelForMaskedLM", True),
        ("gpt2", {}, "AutoModelForCausalLM", False),
        ("llama", {"target": "native"}, "AutoModelForCausalLM", False),
    ],
)
def test_a_stranger_gets_the_same_outputs(family, how, auto_class, xet, made, send_alone, client, tmp_path):
    folder = made(family, **how)
    with Hub(tmp_path / "other", xet=xet) as hub:
        told = json.loads(send_alone(folder, "--private", "--tag", "v1", "--json", at=hub))
        assert told["compared"] > 1000
        assert hub.history("ann/model") == ["Published by hf_moe", "initial commit"]
        assert hub.repos.all["ann/model"].private
        assert hub.repos.all["ann/model"].refs["refs/tags/v1"] == told["commit"]
        sent = hub.files("ann/model")
        assert set(told["files"]) == set(sent) - {".gitattributes"}
        client(LOAD, folder, auto_class, tmp_path / "here")
        client(LOAD, "ann/model", auto_class, tmp_path / "there", at=hub, home=tmp_path / "fresh", bare=True)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    if how:
        assert not any(name.endswith(".py") for name in sent)
    if not xet:
        digests = json.loads(sent["manifest.json"])["files"]
        (tmp_path / "got").mkdir()
        for name in set(sent) - {".gitattributes", "manifest.json"}:
            (tmp_path / "got" / name).write_bytes(sent[name])
            assert digests[name]["sha256"] == file_sha256(tmp_path / "got" / name)


def test_what_is_not_listed_stays(hub, send, bert, tmp_path):
    for name in (".env", ".git-credentials", "id_rsa", "optimizer.pt", "training_args.bin", "notes.txt", "run.py"):
        (bert / name).write_text("nobody's business")
    (bert / "checkpoint-3").mkdir()
    (bert / "checkpoint-3" / "model.safetensors").write_bytes(b"old")
    (bert / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier save")
    dry = json.loads(send(bert, "--dry-run", "--json", token=None))
    assert {".env", "id_rsa", "optimizer.pt", "run.py", "checkpoint-3/model.safetensors"} <= set(dry["left_out"])
    assert hub.requests == []
    shown = send(bert, "--dry-run")
    assert "not published: .env" in shown
    assert "model.safetensors" in shown
    send(bert, "-q")
    sent = set(hub.files("ann/model")) - {".gitattributes"}
    assert sent == set(dry["files"])
    assert not sent & set(dry["left_out"])
    assert all(is_allowed(name) or name.endswith(".py") for name in sent)


def test_the_code_is_ours_and_whole(hub, send, bert):
    config = json.loads((bert / "config.json").read_text())
    config["auto_map"] = {"AutoModelForMaskedLM": "modeling_bert_moe.BertMoeForMaskedLM"}
    (bert / "config.json").write_text(json.dumps(config))
    (bert / "modeling_bert_moe.py").write_text("raise SystemExit('not ours')")
    (bert / "moe_layers.py").unlink()
    send(bert)
    sent = hub.files("ann/model")
    assert len(json.loads(sent["config.json"])["auto_map"]) == len(hf_moe.BertMoeConfig.auto_classes) + 1
    for file in hf_moe.BertMoeConfig.code_files():
        assert sent[file.name] == file.read_bytes()


def test_once_more_sends_nothing_twice(hub, send, bert):
    send(bert)
    uploads = [request for request in hub.requests if request.method == "PUT"]
    again = json.loads(send(bert, "--json"))
    assert not again["changed"]
    assert [request for request in hub.requests if request.method == "PUT"] == uploads
    assert len(hub.history("ann/model")) == 2


def test_what_an_earlier_version_left_is_taken_away(hub, send, bert, tmp_path):
    """Else one file of old weights would be loaded in the place of the new shards."""
    send(bert)
    hub.add("ann/model", {"examples.ipynb": b"{}", "NOTICE": b"x", "moe_notes.md": b"y"})
    model = hf_moe.BertMoeForMaskedLM.from_pretrained(bert)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, tmp_path / "shards")
    told = json.loads(send(tmp_path / "shards", "--json"))
    assert "model.safetensors" in told["removed"]
    there = hub.files("ann/model")
    assert {"examples.ipynb", "NOTICE", "moe_notes.md"} <= set(there)
    assert "model.safetensors" not in there
    assert "model.safetensors.index.json" in there
    assert hub.history("ann/model")[0] == "Published by hf_moe"


def test_a_branch_and_a_pull_request(hub, send, bert):
    send(bert, "--revision", "draft", "--message", "first try")
    assert set(hub.files("ann/model")) == {".gitattributes"}
    assert hub.history("ann/model", "draft") == ["first try", "initial commit"]
    hub.add("bob/model", {"config.json": b"{}"})
    told = json.loads(send(bert, "--pr", "--json", repo="bob/model"))
    assert told["pull_request"] == f"{hub.endpoint}/bob/model/discussions/1"
    assert set(hub.files("bob/model")) == {".gitattributes", "config.json"}
    assert "model.safetensors" in hub.files("bob/model", "refs/pr/1")
    assert "tagged" in refusal(send(bert, "--pr", "--tag", "v1", repo="bob/model", ok=False))


def test_a_name_alone_is_of_whoever_is_logged_in(hub, send, bert):
    assert json.loads(send(bert, "--json", repo="model"))["repo_id"] == "ann/model"


@pytest.mark.parametrize(
    ("pattern", "kind", "told"),
    [
        ("POST .*/commit/", "drop-half", "the connection was lost; run it again"),
        ("POST .*/commit/", "status", "the Hub answers 500; run it again"),
        ("PUT /objects", "full", "no room"),
        ("POST .*/commit/", "stale", "somebody else has changed"),
    ],
)
def test_half_way_leaves_nothing_to_see_and_goes_on(pattern, kind, told, hub, send, bert):
    fault = hub.fault(pattern, kind)
    assert told in refusal(send(bert, ok=False))
    assert "model.safetensors" not in hub.files("ann/model")
    before = [request for request in hub.requests if request.method == "PUT" and request.status == 200]
    send(bert)
    after = [request for request in hub.requests if request.method == "PUT" and request.status == 200]
    assert fault.hits == 1
    assert len(after) == 1
    assert (before == after) == (kind != "full")
    assert hub.files("ann/model")["model.safetensors"] == (bert / "model.safetensors").read_bytes()


def test_an_answer_that_got_lost_is_no_second_commit(hub, send, bert):
    hub.fault("POST .*/commit/", "drop-after")
    refusal(send(bert, ok=False))
    assert not json.loads(send(bert, "--json"))["changed"]
    assert len(hub.history("ann/model")) == 2


def test_a_kill_while_sending_leaves_nothing_to_see(hub, bert, tmp_path):
    import os

    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    command = [sys.executable, "-c", COMMAND, "publish", str(bert), "ann/model", "--base-model", "none", "-q"]
    running = subprocess.Popen(command, env=environment, cwd=tmp_path)
    hub.fault("PUT /objects", "call", call=lambda: running.send_signal(signal.SIGKILL))
    assert running.wait() == -signal.SIGKILL
    assert set(hub.files("ann/model")) == {".gitattributes"}
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    assert len(hub.history("ann/model")) == 2


def test_who_may_not(hub, send, bert):
    assert "hf auth login" in refusal(send(bert, token=None, ok=False))
    assert "log in again" in refusal(send(bert, token="token-nobody-has", ok=False))
    assert "no right to write" in refusal(send(bert, token="token-of-bob", ok=False))
    assert "no right to write" in refusal(send(bert, token="token-that-reads", ok=False))
    hub.add("bob/model", {"config.json": b"{}"})
    assert "no right to write" in refusal(send(bert, repo="bob/model", ok=False))
    assert "ann/model" not in hub.repos.all


@pytest.mark.parametrize("wrong", ["./model", "a/b/c", "ann/mo del", "ann/model.git", "ann/..", ""])
def test_what_is_no_repository(wrong, bert, hf_moe_command):
    code, _, err = hf_moe_command("publish", bert, wrong, "--dry-run")
    assert code == 2
    assert "no id of a repository" in err


SECRETS = {
    ("recipe.yaml", "hf_" + "aB3" * 12): "a Hugging Face token",
    ("tokenizer_config.json", "ghp_" + "x1Y2" * 10): "a GitHub token",
    ("LICENSE.txt", "-----BEGIN RSA " + "PRIVATE KEY-----"): "a private key",
    ("generation_config.json", '{"api_key": "' + "Zz09" * 5 + '"}'): "a password",
    ("recipe.yaml", "https://ann:" + "hunter2hunter2@example.org/x"): "a password in an address",
}


@pytest.mark.parametrize(("place", "kind"), SECRETS.items(), ids=lambda value: str(value)[:20])
def test_what_looks_like_a_secret_is_not_sent_nor_shown(place, kind, bert, hf_moe_command):
    name, secret = place
    with open(bert / name, "a") as file:
        file.write(secret)
    code, out, err = hf_moe_command("publish", bert, "ann/model", "--dry-run", "--base-model", "none")
    assert code == 1
    assert f"{name}: line" in err
    assert f"looks like {kind};" in err
    assert secret[12:] not in out + err


def test_a_secret_among_the_weights_metadata(bert, hf_moe_command):
    tensors = load_file(bert / "model.safetensors")
    save_file(tensors, bert / "model.safetensors", {"format": "pt", "note": "hf_" + "aB3" * 12})
    (bert / "manifest.json").unlink()
    code, _, err = hf_moe_command("publish", bert, "ann/model", "--dry-run", "--base-model", "none")
    assert code == 1
    assert "model.safetensors: line 1 holds what looks like a Hugging Face token" in err


def break_link(bert):
    (bert.parent / "elsewhere.json").write_text("{}")
    (bert / "generation_config.json").symlink_to(bert.parent / "elsewhere.json")


def break_digest(bert):
    content = bytearray((bert / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (bert / "model.safetensors").write_bytes(content)


def break_pickle(bert):
    torch.save({}, bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()


def break_code(bert):
    config = json.loads((bert / "config.json").read_text())
    config |= {"model_type": "something", "auto_map": {"AutoModel": "modeling_theirs.Model"}}
    (bert / "config.json").write_text(json.dumps(config))


def break_loading(bert):
    (bert / "experts.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    (bert / "experts_config.json").write_text("{}")


def break_everything(bert):
    shutil.rmtree(bert)


def break_certificate(bert):
    (bert / "certificate.json").write_text('{"moe": {"sha256": 3}, "passed": true}')


def break_routing(bert):
    (bert / "routing.json").write_text('{"source": "another"}')


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (break_link, "leads out of its folder"),
        (break_digest, "is not what manifest.json says"),
        (break_pickle, "pickled weights"),
        (break_code, "no code of hf_moe"),
        (break_loading, "would load as a whole model"),
        (break_everything, "no such folder"),
        (break_certificate, "none of ours"),
        (break_routing, "of another model, 'another'"),
    ],
)
def test_what_is_refused(harm, told, bert, hf_moe_command):
    harm(bert)
    code, out, err = hf_moe_command("publish", bert, "ann/model", "--dry-run", "--base-model", "none")
    assert (code, out) == (1, "")
    assert told in err
    assert err.count("\n") == 1


def test_what_does_not_load_elsewhere_is_not_sent(hub, bert, monkeypatch, tmp_path):
    """The staged folder is what is tried, not the source."""
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    from hf_moe.errors import SourceError
    from hf_moe.hub import checks, staging

    (tmp_path / "staged").mkdir()
    staged = staging.stage(bert, tmp_path / "staged")
    assert checks.check_loads(staged) > 0
    layers = tmp_path / "staged" / "moe_layers.py"
    layers.write_text(layers.read_text() + "\nimport hf_moe\n")
    with pytest.raises(SourceError, match="does not load where hf_moe is not"):
        checks.check_loads(staged)
    weights = {name: value + 1e-3 for name, value in load_file(bert / "model.safetensors").items()}
    staging.stage(bert, (tmp_path / "other"))
    (tmp_path / "other" / "model.safetensors").unlink()
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match="differs by up to"):
        checks.check_loads(staging.Staged(tmp_path / "other", bert, staged.config, []))


def test_the_base_is_a_repository_and_still_the_same(hub, send, client, bert, dense_folder, tmp_path):
    assert "the bases are" in refusal(send(bert, base="elsewhere=x/y", ok=False))
    assert "which others don't have" in refusal(send(bert, base=None, ok=False))
    assert "no id of a repository" in refusal(send(bert, base="../bert", ok=False))
    assert "no such repository" in refusal(send(bert, base="google/bert", ok=False))
    dense = dense_folder("bert")
    card = "---\nlicense: cc-by-4.0\nlanguage: [en, de]\n---\nA base.\n"
    upload = """
import sys
from huggingface_hub import CommitOperationAdd, HfApi
adds = [CommitOperationAdd("model.safetensors", sys.argv[1]), CommitOperationAdd("README.md", sys.argv[2].encode())]
HfApi().create_repo("ann/base", exist_ok=True)
HfApi().create_commit("ann/base", adds, commit_message="m")
"""
    client(upload, dense / "model.safetensors", card)
    send(bert, base="ann/base")
    sent = hub.files("ann/model")["README.md"].decode()
    front = sent.split("---")[1]
    for line in ("license: cc-by-4.0", "- en\n- de", "base_model:\n- ann/base", "base_model_relation: finetune"):
        assert line in front
    hub.fault("HEAD .*README.md", "status", times=9)
    shutil.rmtree(tmp_path / "cache")
    assert "ann/base" in refusal(send(bert, "--revision", "other", base="ann/base", ok=False))
    hub.faults.clear()
    client(upload, bert / "model.safetensors", card)
    told = refusal(send(bert, base="ann/base", ok=False))
    assert file_sha256(dense / "model.safetensors") in told
    assert file_sha256(bert / "model.safetensors") in told


def test_the_python_of_a_card_runs_as_it_stands(hub, send, client, bert, tmp_path):
    send(bert)
    [code] = re.findall(r"```python\n(.*?)```", hub.files("ann/model")["README.md"].decode(), re.DOTALL)
    assert client(code + "print(outputs.logits.shape)", bare=True).startswith("torch.Size([1, ")


def test_without_a_card(hub, send, bert):
    send(bert, "--no-card")
    assert "README.md" not in hub.files("ann/model")


def test_in_python(hub, bert, tmp_path):
    made = published(bert, "ann/model", dry_run=True, base_model=["none"])
    assert made.url is None
    assert made.card is not None
    assert made.files["model.safetensors"] == (bert / "model.safetensors").stat().st_size
