"""Question answering: exact match and F1 of words, as SQuAD counts them."""

import re
import string
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from hf_moe.tasks.answers import answer_of

from .measured import Measured

BEST = 20  # starts, and ends, that are tried together
LONGEST = 30  # tokens of an answer
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normal(text: str) -> str:
    """Small letters; no punctuation, articles or needless blanks (Rajpurkar et al. 2016, arXiv 1606.05250)."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", bare).split())


def exact_match(predicted: str, answers: list[str]) -> float:
    """1 where it is one of the answers; "" is the answer to a question without any."""
    return float(any(normal(predicted) == normal(answer) for answer in answers or [""]))


def word_f1(predicted: str, answers: list[str]) -> float:
    """The best over the answers."""
    return max(_f1(normal(predicted).split(), normal(answer).split()) for answer in answers or [""])


def _f1(one: list[str], other: list[str]) -> float:
    if not one or not other:
        return float(one == other)
    same = sum((Counter(one) & Counter(other)).values())
    return 2 * same / (len(one) + len(other))


def best_answers(
    starts: np.ndarray, ends: np.ndarray, details: Any, contexts: list[str], *, may_be_none: bool
) -> list[tuple[str, float]]:
    """The best span over all windows of each question, and its score (a sum of two logits).

    Args:
        starts, ends: (windows, T) logits.
        details: of each window, as `prepare_data` gives them.
        may_be_none: whether "" is an answer; it is where the first token scores higher than any span.
    """
    best: dict[int, tuple[float, str]] = {}
    none: dict[int, float] = defaultdict(lambda: float("inf"))
    for window, detail in enumerate(details):
        example, offsets = detail["example"], detail["offset_mapping"]
        start_T, end_T = starts[window, : len(offsets)], ends[window, : len(offsets)]
        none[example] = min(none[example], float(start_T[0] + end_T[0]))
        inside = np.array([place for place, span in enumerate(offsets) if span and span[1] > span[0]], dtype=int)
        firsts, lasts = (inside[np.argsort(-scores[inside], kind="stable")[:BEST]] for scores in (start_T, end_T))
        for first in firsts:
            for last in lasts:
                score = float(start_T[first] + end_T[last])
                if 0 <= last - first < LONGEST and score > best.get(example, (-np.inf, ""))[0]:
                    best[example] = (score, contexts[example][offsets[first][0] : offsets[last][1]])
    made = []
    for example in range(len(contexts)):
        score, text = best.get(example, (-np.inf, ""))
        made.append(("", none[example]) if may_be_none and none[example] > score else (text, score))
    return made


def measure_answers(predictions: Any, labels: Any, prepared: Any, split: str) -> Measured:
    """From the two logits of each window."""
    starts, ends = (np.asarray(logits, dtype=np.float64) for logits in predictions[:2])
    raw, columns = prepared.raw[split], prepared.report["columns"]
    answers = [answer_of(cell)[0] for cell in raw[columns["answers"]]]
    some_without = any(not texts for texts in answers)
    contexts = list(raw[columns["context"]])
    found = best_answers(starts, ends, prepared.details[split], contexts, may_be_none=some_without)
    exact = np.array([exact_match(text, own) for (text, _), own in zip(found, answers, strict=True)])
    f1 = np.array([word_f1(text, own) for (text, _), own in zip(found, answers, strict=True)])
    ids = list(raw["id"]) if "id" in raw.column_names else [None] * len(answers)
    metrics: dict[str, float | None] = {"exact_match": float(exact.mean()), "f1": float(f1.mean())}
    if some_without:
        has = np.array([bool(texts) for texts in answers])
        metrics["f1_answerable"] = float(f1[has].mean()) if has.any() else None
        metrics["f1_unanswerable"] = float(f1[~has].mean())
    return Measured(
        metrics=metrics,
        records=[
            {"row": row, "id": ids[row], "prediction": text, "score": score, "answers": own}
            | {"exact_match": float(exact[row]), "f1": float(f1[row])}
            for row, ((text, score), own) in enumerate(zip(found, answers, strict=True))
        ],
        metric="f1",
        greater_is_better=True,
        statistic=lambda rows: float(f1[rows].mean()),
        examples=answers,
        notes=["Between 0 and 1; the best answer over all windows of a context."],
    )
