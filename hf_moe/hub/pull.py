"""Fetches single experts of an artefact on the Hub: of its weights, only their bytes."""

import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from hf_moe.convert.checkpoint import Checkpoint, read_config, read_json
from hf_moe.convert.conversion import Progress
from hf_moe.convert.headers import DTYPES, TensorInfo, parse_header
from hf_moe.convert.mixture import config_of
from hf_moe.convert.output import check_output, whole_folder
from hf_moe.errors import SourceError, UsageError
from hf_moe.modeling.moe_artefact import CONFIG_NAME, WEIGHTS_NAME

from .artefact import Artefact, check_described, check_held, key_of, open_artefact, write_beside
from .encodings import sha256_of_values
from .export import Exported
from .select import Spec, chosen, is_folder
from .tensor_file import write_tensors

FIRST_BYTES = 64 * 2**10  # of the file, which hold most headers
CHUNK_BYTES = 64 * 2**20  # of neighbouring tensors, at most, in one request
_LOST = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)


def pull(
    spec: Spec, output: str | os.PathLike[str], *, overwrite: bool = False, progress: Progress | None = None
) -> Exported:
    """Writes the chosen experts of an artefact on the Hub to the folder `output`, an artefact again.

    `huggingface_hub`'s own session, token and endpoint are used. Each tensor's digest is checked. The code beside it
    is this package's, not the repository's.

    Raises:
        UsageError, SourceError, OutputError: where it can't be done, in one line; nothing is written.
    """
    progress, output = progress or Progress(), Path(output).expanduser()
    progress.stage("reading")
    if is_folder(spec.source):
        raise UsageError(f"{spec.source}: is a folder; name a repository of the Hub.")
    check_output(output, [], 0, overwrite, CONFIG_NAME)
    commit, held, config = _described(spec)
    keys = chosen((key_of(entry) for entry in held["tensors"].values()), spec.choices, spec.source)
    infos = _header(spec.source, commit)
    check_held(held, infos, spec.source)
    wanted = {name: entry for name, entry in held["tensors"].items() if key_of(entry) in keys}
    nbytes = sum(infos[name].nbytes for name in wanted)
    check_output(output, [], nbytes, overwrite, CONFIG_NAME)
    with whole_folder(output, "", overwrite, CONFIG_NAME) as (folder, _):
        progress.stage("fetching")
        progress.total(nbytes)
        ordered = sorted((infos[name] for name in wanted), key=lambda info: info.start)
        fetched = _fetched(spec.source, commit, ordered, wanted, progress)
        size = write_tensors(folder / WEIGHTS_NAME, fetched, wanted)
        described = {
            **{key: value for key, value in held.items() if key not in ("format", "versions")},
            "complete": held.get("complete") is True and len(wanted) == len(held["tensors"]),
            "bytes": size,
            "smaller": round(held.get("tuned_bytes", 0) / size, 2),
            "error": max(entry.get("error", 0.0) for entry in wanted.values()),
            "tensors": wanted,
            "pulled": {"repo": spec.source, "commit": commit},
        }
        sources = [{"source": spec.source, "revision": commit}]
        checkpoint = Checkpoint(folder, spec.source, commit, config, {})
        write_beside(folder, described, config_of(checkpoint), checkpoint, sources)
    return Exported(output, described)


def get_artefact(spec: Spec, scratch: Path) -> Artefact:
    """An artefact's folder opened; of one on the Hub, what is chosen is fetched to `scratch`."""
    if is_folder(spec.source):
        return open_artefact(Path(spec.source).expanduser(), spec.source)
    if spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1:
        raise SourceError(f"{spec.source}: no such folder.")
    return replace(open_artefact(pull(spec, scratch).path), source=spec.source)


def _described(spec: Spec) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Commit, `experts_config.json` and `config.json` of the repository."""
    try:
        described = Path(hf_hub_download(spec.source, CONFIG_NAME, revision=spec.revision))
        commit = described.parent.name
        config = Path(hf_hub_download(spec.source, "config.json", revision=commit))
    except _LOST as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(f"{spec.source}: the Hub gave no experts ({reason})") from error
    return commit, check_described(read_json(described), spec.source), read_config(config.parent)


def _header(repo: str, commit: str) -> dict[str, TensorInfo]:
    first = _get(repo, commit, 0, FIRST_BYTES, short=True)
    length = struct.unpack("<Q", first[:8])[0] if len(first) >= 8 else 0
    if not 2 <= length <= 100_000_000:
        raise SourceError(f"{repo}: its {WEIGHTS_NAME} is cut short or no safetensors file.")
    if len(first) < 8 + length:
        first += _get(repo, commit, len(first), 8 + length)
    return {info.name: info for info in parse_header(first[8 : 8 + length], Path(repo) / WEIGHTS_NAME)}


def _fetched(
    repo: str, commit: str, infos: list[TensorInfo], entries: dict[str, dict[str, Any]], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in the order of the file, neighbours in one request."""
    for chunk in _chunks(infos):
        start = chunk[0].start
        data = bytearray(_get(repo, commit, start, chunk[-1].start + chunk[-1].nbytes))
        for info in chunk:
            held = data[info.start - start : info.start - start + info.nbytes]
            values = torch.frombuffer(held, dtype=torch.uint8) if held else torch.empty(0, dtype=torch.uint8)
            found = sha256_of_values(values)
            if found != entries[info.name]["sha256"]:
                raise SourceError(
                    f"{repo}: {info.name} came damaged: its sha256 is {found}, and should be "
                    f"{entries[info.name]['sha256']}."
                )
            progress.wrote(info.nbytes)
            yield info.name, values.view(DTYPES[info.dtype]).view(info.shape)


def _chunks(infos: list[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Runs of tensors that follow each other in the file, each of at most `CHUNK_BYTES` (but one tensor)."""
    number, end, size = 0, -1, 0
    numbered = []
    for info in infos:
        if info.start != end or size + info.nbytes > CHUNK_BYTES:
            number, size = number + 1, 0
        numbered.append((number, info))
        end, size = info.start + info.nbytes, size + info.nbytes
    for _, group in groupby(numbered, key=lambda pair: pair[0]):
        yield [info for _, info in group]


def _get(repo: str, commit: str, start: int, end: int, short: bool = False) -> bytes:
    """Bytes `start` to `end` of the weights; `short`: or as many as there are."""
    if start == end:
        return b""
    url = hf_hub_url(repo, WEIGHTS_NAME, revision=commit)
    try:
        response = http_backoff("GET", url, headers={**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"})
        hf_raise_for_status(response)
    except Exception as error:  # the session's own: the library it is built on changes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(f"{repo}: the Hub gave no bytes {start} to {end} of {WEIGHTS_NAME} ({reason})") from error
    data = response.content
    if response.status_code != 206 or len(data) > end - start or (len(data) < end - start and not short):
        raise SourceError(
            f"{repo}: asked for {end - start} bytes of {WEIGHTS_NAME}, the server gave {len(data)} "
            f"(status {response.status_code})."
        )
    return data
