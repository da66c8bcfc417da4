"""What must not leave this machine: things that look like a token, a key or a password."""

import re
import struct
from pathlib import Path

from hf_moe.errors import SourceError

# What it is called -> how it looks. Long forms only: a vocabulary is full of short ones.
SECRETS: dict[str, str] = {
    "a Hugging Face token": r"\b(?:hf_|api_org_)[A-Za-z0-9]{30,}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})\b",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}\b",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}\b",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{20,}\b",
    "an OpenAI or Anthropic key": r"\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}\b",
    "a PyPI token": r"\bpypi-[A-Za-z0-9_-]{50,}\b",
    "a Weights & Biases key": r"(?i)wandb_api_key\W{1,6}[a-f0-9]{40}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\bhttps?://[^\s/:@\"']+:[^\s/:@\"']{6,}@",
    "a password": r"(?i)[\"']?\b(?:password|passwd|secret|api_?key|access_?token|auth_?token)[\"']?\s*[:=]\s*"
    r"[\"']?[A-Za-z0-9+/_=.-]{16,}",
}
_ANY = {kind: re.compile(pattern.encode()) for kind, pattern in SECRETS.items()}


def check_no_secrets(file: Path, *, shown: str) -> None:
    """Raises SourceError where a file holds what looks like a secret, naming the file and never the secret.

    Of safetensors the header is looked at, of pictures nothing.
    """
    content = _text(file)
    for kind, pattern in _ANY.items():
        if found := pattern.search(content):
            line = content.count(b"\n", 0, found.start()) + 1
            raise SourceError(f"{shown}: line {line} holds what looks like {kind}; take it out before publishing.")


def _text(file: Path) -> bytes:
    if file.suffix == ".png":
        return b""
    if file.suffix != ".safetensors":
        return file.read_bytes()
    with open(file, "rb") as handle:
        return handle.read(struct.unpack("<Q", handle.read(8))[0])
