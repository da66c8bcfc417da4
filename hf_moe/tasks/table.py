"""The tasks: a table."""

from collections.abc import Callable
from dataclasses import dataclass

from .answers import prepare_answers
from .classification import prepare_classification
from .context import Context, Encoded
from .language import prepare_language
from .sentences import prepare_sentences
from .tagging import prepare_tagging


@dataclass(frozen=True, kw_only=True)
class Task:
    """Args:
    auto_class: Transformers' Auto class of its models.
    prepare: how rows become a model's input.
    usual: role -> the names that its column usually has, the first that is there.
    optional: roles whose column need not be there.
    labelled: whether it reads more than text.
    metric: what its models are compared by.
    greater_is_better: of that metric.
    """

    auto_class: str
    prepare: Callable[[Context], Encoded]
    usual: dict[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    labelled: bool = True
    metric: str
    greater_is_better: bool = True


TEXT = ("text", "content", "sentence", "document")

TASKS: dict[str, Task] = {
    "masked-lm": Task(
        auto_class="AutoModelForMaskedLM",
        prepare=prepare_language,
        usual={"text": TEXT},
        labelled=False,
        metric="nll",
        greater_is_better=False,
    ),
    "causal-lm": Task(
        auto_class="AutoModelForCausalLM",
        prepare=prepare_language,
        usual={"text": TEXT},
        labelled=False,
        metric="nll",
        greater_is_better=False,
    ),
    "text-classification": Task(
        auto_class="AutoModelForSequenceClassification",
        prepare=prepare_classification,
        usual={
            "text": (*TEXT, "sentence1", "premise", "question1", "text1", "review"),
            "text_pair": ("text_pair", "sentence2", "hypothesis", "question2", "text2"),
            "label": ("label", "labels", "target", "class", "category", "score"),
        },
        optional=("text_pair",),
        metric="f1_macro",
    ),
    "token-classification": Task(
        auto_class="AutoModelForTokenClassification",
        prepare=prepare_tagging,
        usual={"text": ("tokens", "words", "text"), "label": ("ner_tags", "tags", "labels", "label")},
        metric="f1",
    ),
    "question-answering": Task(
        auto_class="AutoModelForQuestionAnswering",
        prepare=prepare_answers,
        usual={"question": ("question",), "context": ("context",), "answers": ("answers", "answer")},
        metric="f1",
    ),
    "sentence-embedding": Task(
        auto_class="AutoModel",
        prepare=prepare_sentences,
        usual={
            "text": ("anchor", "query", "sentence1", "text", "question", "premise", "sentence"),
            "text_pair": ("positive", "sentence2", "text_pair", "answer", "entailment", "hypothesis"),
            "negative": ("negative", "contradiction"),
            "label": ("score", "similarity", "label"),
        },
        optional=("negative", "label"),
        metric="spearman",
    ),
}
