"""How a mixture routes text: run, counted, tested, and written as figures, pictures and a page."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_moe.errors import SourceError, UsageError
from hf_moe.routing import plots
from hf_moe.routing.advice import advise
from hf_moe.routing.domains import specialise
from hf_moe.routing.gather import Forward, empty_stats, forwards
from hf_moe.routing.page import Passage, render
from hf_moe.routing.stats import RoutingStats
from hf_moe.routing.summary import summarise

from .certificate import without_nan
from .checkpoint import Checkpoint, open_checkpoint
from .compare import pad
from .conversion import Progress
from .families import FAMILIES
from .mixture import Mixture, is_mixture, open_mixture
from .output import check_output, whole_folder
from .reduce import class_of
from .similarity import expert_similarity
from .texts import check_ids, load_tokenizer, longest_text, read_texts
from .usage import ROWS, load_for_text

FORMAT = 1
SHOWN = 12  # passages on the page, of all domains together
EXTRAS = ("matplotlib", "jinja2")
REPORT_NAME = "routing.json"


@dataclass(frozen=True)
class Observed:
    """A report: where it lies, and what `routing.json` says."""

    path: Path
    report: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One passage: its text, its tokens' ids and names, and where each stands in the text (None: nowhere, as special
    tokens do)."""

    text: str
    ids: list[int]
    names: list[str]
    spans: list[tuple[int, int] | None]


def observe(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    data: Sequence[str | os.PathLike[str]] = (),
    domains: Mapping[str, str | os.PathLike[str]] | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Observed:
    """Writes a folder with `routing.json`, plots (PNG) and `report.html`: how `source` routes text.

    Args:
        source: a mixture, ours or one of Transformers' own: a folder or a Hub id.
        output: a folder that does not exist yet; by default the source's name and `-routing`, in the current folder.
        data: files of text, a passage a line.
        domains: name -> such a file, of one subject each, to be told apart; two or more, or none.
        revision, overwrite, progress: as in `upcycle`.

    Raises:
        UsageError, SourceError, OutputError: in one line; nothing is written.
    """
    progress = progress or Progress()
    texts = _read(data, domains or {})
    checkpoint = open_checkpoint(source, revision)
    mixture = _open(checkpoint)
    folder = Path(output if output is not None else f"{Path(checkpoint.source).name}-routing").expanduser()
    check_output(folder, [checkpoint.path], 0, overwrite, REPORT_NAME)
    tokenizer = load_tokenizer(checkpoint)
    lines = {name: _tokenized(tokenizer, mixture, some) for name, some in texts.items()}
    progress.stage("running the text")
    stats, passages = _run(mixture, lines)
    progress.stage("comparing experts")
    similarity = expert_similarity(mixture)
    progress.stage("shuffling labels")
    found = specialise(stats) if domains else None
    summary = summarise(stats, specialisation=found, similarity=similarity, name_of=partial(_shown, tokenizer))
    report = without_nan(_report(mixture, lines, summary, stats))
    with whole_folder(folder, "routing", overwrite, REPORT_NAME) as (files, _):
        _write(files, report, passages)
    return Observed(folder, report)


def _read(data: Sequence, domains: Mapping[str, Any]) -> dict[str | None, list[str]]:
    """Domain -> lines; those of `data` are of no domain (None)."""
    missing = [name for name in EXTRAS if util.find_spec(name) is None]
    if missing:
        raise UsageError(f"The report needs {' and '.join(missing)}; pip install 'hf_moe[plots]'.")
    if not data and not domains:
        raise UsageError("There is no text to route; give --data FILE, or --domains NAME=FILE NAME=FILE.")
    if len(domains) == 1:
        raise UsageError(
            f"--domains names {next(iter(domains))!r} alone; name two or more, or give the file as --data."
        )
    texts: dict[str | None, list[str]] = {name: read_texts(Path(file)) for name, file in domains.items()}
    if data:
        texts[None] = [line for file in data for line in read_texts(Path(file))]
    return texts


def _open(checkpoint: Checkpoint) -> Mixture:
    """Raises SourceError where it is dense, or reads no text."""
    model_type = str(checkpoint.config.get("model_type"))
    if not is_mixture(checkpoint.config) and model_type in FAMILIES:
        raise SourceError(
            f"{checkpoint.path}: is dense (model_type {model_type!r}), and routing is that of a mixture; "
            "hf-moe upcycle makes it one."
        )
    mixture = open_mixture(checkpoint)
    if mixture.inputs != "input_ids":
        raise SourceError(
            f"{checkpoint.path}: reads {mixture.inputs}, not text; hf_moe.routing.gather counts its routing in Python."
        )
    return mixture


def _tokenized(tokenizer: PreTrainedTokenizerBase, mixture: Mixture, texts: list[str]) -> list[Line]:
    """Raises SourceError where nothing is left, or the ids are not the model's."""
    path, limit = mixture.checkpoint.path, longest_text(mixture.config)
    lines = []
    for text in texts:
        try:
            made = tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=tokenizer.is_fast)
        except Exception as error:  # tokenizers raise it bare
            raise SourceError(
                f"{path}: its tokenizer does not read {text[:40]!r} ({type(error).__name__})."
            ) from error
        offsets = made.get("offset_mapping") or [(0, 0)] * len(made["input_ids"])
        if made["input_ids"]:
            spans = [(start, end) if end > start else None for start, end in offsets]
            names = [str(tokenizer.convert_ids_to_tokens(token)) for token in made["input_ids"]]
            lines.append(Line(text, made["input_ids"], names, spans))
    if not lines:
        raise SourceError(f"{path}: its tokenizer makes no token of {texts[0][:40]!r}.")
    check_ids((line.ids for line in lines), mixture.config, path)
    return lines


def _run(mixture: Mixture, lines: Mapping[str | None, list[Line]]) -> tuple[RoutingStats, list[Passage]]:
    """One pass over everything; the statistics, and some passages to show."""
    model = load_for_text(class_of(mixture), mixture.checkpoint)
    stats, passages = empty_stats(model), []
    for domain, some in lines.items():
        held = [some[start : start + ROWS] for start in range(0, len(some), ROWS)]
        left = max(1, SHOWN // len(lines))
        for rows, seen in zip(held, forwards(model, _batches(held)), strict=True):
            stats.update(seen.choices, ids=seen.ids, rows=seen.rows, domain=domain)
            for row, line in enumerate(rows[:left]):
                passages.append(_passage(domain, line, seen, row, stats))
            left -= len(rows[:left])
    return stats, passages


def _batches(held: list[list[Line]]) -> Iterator[dict[str, torch.Tensor]]:
    return (pad("text", [line.ids for line in rows]).inputs for rows in held)


def _passage(domain: str | None, line: Line, seen: Forward, row: int, stats: RoutingStats) -> Passage:
    """A row of a batch as the page shows it."""
    of_row = seen.rows == row
    choices = []
    for layer in stats.layers:
        index_TK, gates_TK = (values[of_row] for values in seen.choices[layer])
        order_TK = gates_TK.argsort(dim=1, descending=True, stable=True)
        index_TK, gates_TK = index_TK.gather(1, order_TK), gates_TK.float().gather(1, order_TK)
        choices.append(
            tuple(
                tuple((e, round(100 * g)) for e, g in zip(experts, gates, strict=True) if e < stats.num_experts)
                for experts, gates in zip(index_TK.tolist(), gates_TK.tolist(), strict=True)
            )
        )
    return Passage(domain, tuple(_pieces(line)), tuple(choices))


def _pieces(line: Line) -> Iterator[tuple[str, str]]:
    """(text that belongs to no token, the token's text) by token. What stands nowhere in the text has its name; of
    several tokens of one letter the first has it, and the others are dots."""
    end = 0
    for name, span in zip(line.names, line.spans, strict=True):
        if span is None:
            yield "", name
            continue
        start = max(span[0], end)
        own = line.text[start : span[1]]
        yield line.text[end:start], own if own.strip() else f"{own}·"
        end = max(end, span[1])


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    text = str(tokenizer.decode([token]))
    return text if text.strip() else repr(text)[1:-1].replace(" ", "␣") or "·"


def _report(mixture: Mixture, lines: Mapping[str | None, list[Line]], summary: dict, stats: RoutingStats) -> dict:
    return {
        "format": FORMAT,
        "source": mixture.checkpoint.source,
        "revision": mixture.checkpoint.revision,
        "class": class_of(mixture).__name__,
        "num_experts_per_tok": mixture.top_k,
        "passages": sum(map(len, lines.values())),
        **summary,
        "advice": advise(summary),
        "stats": stats.to_json(passages=False),
        "versions": {name: metadata.version(name) for name in ("hf_moe", "torch", "transformers")},
    }


def _write(folder: Path, report: dict[str, Any], passages: list[Passage]) -> None:
    name, layers = report["source"], [layer["layer"] for layer in report["layers"]]
    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
    page = render(report, report["advice"], passages, name)
    (folder / "report.html").write_text(page, encoding="utf-8")
    stats = RoutingStats.from_json(report["stats"])
    plots.load_heat_map(stats.load, layers, folder / "load.png", f"{name}: share of tokens, in %")
    if any(layer["together"] for layer in report["layers"]):
        plots.coactivation_map(stats.coactivation_lift, layers, folder / "together.png", f"{name}: chosen together")
    if report["specialisation"] is not None:
        plots.specialisation_bars(report["specialisation"], folder / "domains.png", f"{name}: what a domain tells")
