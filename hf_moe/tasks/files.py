"""Local files as datasets: their kind by their ending, and an error that names the file and the line."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_moe.errors import HfMoeError, SourceError, UsageError

from .conll import read_conll
from .settings import DataSettings

ENDINGS = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".conll": "conll",
}
# In .tsv a quotation mark is one: files with tabs are seldom quoted, and their texts may begin with it.
FORMS: dict[str, dict[str, Any]] = {
    "csv": {"delimiter": ","},
    "tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
STREAMED = ("text", "jsonl", "csv", "tsv", "parquet")


def kind_of(files: list[str]) -> str:
    """What the files hold, by their endings.

    Raises:
        UsageError: for an ending that is not known, or several kinds.
        SourceError: for a file that is not there.
    """
    for name in files:
        if not Path(name).expanduser().is_file():
            raise SourceError(f"{name}: no such file.")
        if Path(name).suffix.lower() not in ENDINGS:
            raise UsageError(f"{name}: of this ending nothing is known; known are {', '.join(ENDINGS)}.")
    kinds = {ENDINGS[Path(name).suffix.lower()]: name for name in files}
    if len(kinds) > 1:
        raise UsageError(f"{' and '.join(list(kinds.values())[:2])}: one split is made of files of one kind.")
    return next(iter(kinds))


def read_files(files: list[str], settings: DataSettings) -> Any:
    """A Dataset, or with `streaming` an IterableDataset, of one split's rows.

    Raises:
        SourceError: where a file can't be read as what its ending says; with its line, where one is to blame.
    """
    kind = kind_of(files)
    paths = [str(Path(name).expanduser()) for name in files]
    if settings.streaming and kind not in STREAMED:
        raise UsageError(f"{files[0]}: can't be streamed; {', '.join(f'.{name}' for name in STREAMED)} can.")
    try:
        rows = READERS[kind](paths, settings)
        if settings.streaming and next(iter(rows), None) is None:
            raise UsageError(f"{files[0]}: holds no rows.")
        return rows
    except HfMoeError:
        raise
    except Exception as error:  # the library wraps what its readers raise, and they raise anything
        raise _why(paths, kind, error) from error


def _load(builder: str, files: list[str], settings: DataSettings, **options: Any) -> Any:
    from datasets import load_dataset

    return load_dataset(builder, data_files=files, split="train", streaming=settings.streaming, **options)


def _text(files: list[str], settings: DataSettings) -> Any:
    return _load("text", files, settings, sample_by=settings.sample_by, encoding="utf-8-sig")


def _jsonl(files: list[str], settings: DataSettings) -> Any:
    for file in [] if settings.streaming else files:
        _check_encoding(file)
    return _load("json", files, settings, on_mixed_types=None, parse_agent_traces=False)


def _check_encoding(file: str) -> None:
    """The library reads bytes that are no text, without a word."""
    with open(file, encoding="utf-8") as text:
        for _ in text:
            pass


def _parquet(files: list[str], settings: DataSettings) -> Any:
    return _load("parquet", files, settings)


def _csv(files: list[str], settings: DataSettings) -> Any:
    """Every column is text: "NA", "01" and "1" stay what they are, in every part of a file."""
    from datasets import Features, Value

    form = FORMS[kind_of(files)]
    headers = [_header(file, form) for file in files]
    if any(header != headers[0] for header in headers):
        raise SourceError(f"{files[0]}: the other files of this split have other columns.")
    if not settings.streaming:
        for file in files:
            _check_csv(file, form)
    features = Features({name: Value("string") for name in headers[0]})
    return _load("csv", files, settings, **form, features=features, na_filter=False, encoding="utf-8-sig")


def _header(file: str, form: dict[str, Any]) -> list[str]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        names = next(csv.reader(lines, **form), [])
    if not names:
        raise UsageError(f"{file}: holds no rows.")
    if len(set(names)) < len(names) or "" in names:
        raise SourceError(f"{file}: its first line should name the columns, each once, but is {names}.")
    return names


def _check_csv(file: str, form: dict[str, Any]) -> None:
    """The library fills up lines that are too short, without a word."""
    csv.field_size_limit(2**31 - 1)  # of a document in a cell
    with open(file, encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, **form)
        width = len(next(rows))
        for row in rows:
            if row and len(row) != width:
                raise SourceError(f"{file}: line {rows.line_num} has {len(row)} fields, where the header has {width}.")


def _json(files: list[str], settings: DataSettings) -> Any:
    """A list of objects, SQuAD's form, or {"data": [objects]}."""
    from datasets import Dataset

    rows: list[dict[str, Any]] = []
    for file in files:
        text = Path(file).read_text(encoding="utf-8-sig")
        try:
            held = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":  # an object a line
                return _jsonl(files, settings)
            raise
        held = held.get("data") if isinstance(held, dict) else held
        if not isinstance(held, list) or not all(isinstance(row, dict) for row in held):
            raise SourceError(f"{file}: should hold a list of objects, or an object with such a list as 'data'.")
        rows += [question for row in held for question in _questions(file, row)]
    columns = dict.fromkeys(name for row in rows for name in row)  # of all rows; from_list looks at the first
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})


def _questions(file: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an article in SQuAD's form; another row as it is."""
    if "paragraphs" not in row:
        return [row]
    made = []
    try:
        for paragraph in row["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = asked.get("answers") or []
                texts, starts = [a["text"] for a in answers], [a["answer_start"] for a in answers]
                made.append(
                    {
                        "id": str(asked.get("id", "")),
                        "question": asked["question"],
                        "context": paragraph["context"],
                        "answers": {"text": texts, "answer_start": starts},
                    }
                )
    except (KeyError, TypeError) as error:
        raise SourceError(f"{file}: is not of SQuAD's form ({type(error).__name__}: {error}).") from error
    return made


def _conll(files: list[str], settings: DataSettings) -> Any:
    from datasets import Dataset

    words, tags = [], []
    for file in files:
        for sentence in read_conll(Path(file)):
            words.append([word for word, _ in sentence])
            tags.append([tag for _, tag in sentence])
    return Dataset.from_dict({"tokens": words, "tags": tags})


READERS: dict[str, Callable[[list[str], DataSettings], Any]] = {
    "text": _text,
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet,
    "conll": _conll,
}


def _why(files: list[str], kind: str, error: Exception) -> SourceError | UsageError:
    """What is wrong with the files that the library could not read."""
    for file in files:
        if kind != "parquet" and (found := _broken_line(file, kind)):
            return found
        if not Path(file).read_bytes().strip():
            return UsageError(f"{file}: holds no rows.")
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = (str(cause) or type(cause).__name__).strip().splitlines()[0]
    if "corresponds to no data" in reason:  # of a header alone
        return UsageError(f"{files[0]}: holds no rows.")
    return SourceError(f"{files[0]}: can't be read as {kind} ({reason}).")


def _broken_line(file: str, kind: str) -> SourceError | None:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if kind == "jsonl" and text.strip() and not isinstance(json.loads(text), dict):
                    return SourceError(f"{file}: line {number} is no JSON object.")
            except UnicodeDecodeError as error:
                byte = f"0x{line[error.start]:02x}"
                return SourceError(f"{file}: line {number} is not UTF-8 (byte {byte}); save the file as UTF-8.")
            except ValueError as error:
                return SourceError(f"{file}: line {number} is no JSON ({error}).")
    if kind == "json":
        try:
            json.loads(Path(file).read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            return SourceError(f"{file}: line {error.lineno} is no JSON ({error.msg}).")
    return None
