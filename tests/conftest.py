"""Tiny dense checkpoints, made once a session: real files on disk, as a user would have them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in a test may wait for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers run side by side

import pytest
import torch
from transformers import BertTokenizer, GPT2Tokenizer, XLMRobertaTokenizer
from transformers.utils import logging

import hf_moe
from hf_moe.convert import FAMILIES as TABLES
from hf_moe.modeling import CONFIGS, model_class
from tests.families import TESTED

torch.set_num_threads(1)
logging.disable_progress_bar()

WORDS = [
    "the",
    "a",
    "dog",
    "cat",
    "sat",
    "on",
    "mat",
    "war",
    "peace",
    "nation",
    "free",
    "people",
    "law",
    "god",
    "earth",
    "light",
    "##s",
    "##ing",
    "##ed",
]
FAMILIES = sorted(CONFIGS)


def block_name(family: str) -> str:
    """What the mixture is called in its layer."""
    return TABLES[family].block


def dense_classes(family: str) -> dict[str, type]:
    """Name of each dense class of a family -> the class."""
    return {cls.__bases__[1].__name__: cls.__bases__[1] for cls in moe_classes(family).values()}


def lm_class(family: str) -> str:
    """Name of the mixture class with the family's language model."""
    return CONFIGS[family].auto_classes[TESTED[family].lm]


def moe_classes(family: str) -> dict[str, type]:
    """Name of each mixture class of a family -> the class, bodies and heads."""
    config_class = CONFIGS[family]
    names = [name for name in dir(hf_moe) if name.startswith(config_class.__name__.removesuffix("Config"))]
    classes = {name: getattr(hf_moe, name) for name in names}
    return {name: cls for name, cls in classes.items() if "forward" in vars(cls)}


def scatter(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from its start: biases that are zero, and norms that are one, would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save_tokenizer(family: str, folder) -> None:
    if TESTED[family].tokenizer == "wordpiece":
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    elif TESTED[family].tokenizer == "unigram":
        pieces = ["<s>", "<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS if "#" not in word), "<mask>"]
        XLMRobertaTokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)]).save_pretrained(folder)
    else:
        letters = ["<s>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwxyzĠ.,"]
        GPT2Tokenizer(
            vocab={letter: i for i, letter in enumerate(letters)},
            merges=[],
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            unk_token="<pad>",
        ).save_pretrained(folder)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    """(family, dense class name, **config) -> a checkpoint folder with tokenizer, made once."""
    made = {}

    def make(family: str, name: str | None = None, max_shard_size: str = "5GB", **config):
        name = name or moe_classes(family)[lm_class(family)].__bases__[1].__name__
        key = (name, max_shard_size, *sorted(config.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            if name == "BertLMHeadModel":
                config["is_decoder"] = True
            model = scatter(dense_classes(family)[name](TESTED[family].tiny(**config)))
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            save_tokenizer(family, folder)
            (folder / "LICENSE.txt").write_text("Apache-2.0\n")
            made[key] = folder
        return made[key]

    return make


def tiny_moe(family: str, class_name: str | None = None, **config):
    """A mixture with random weights, in evaluation mode."""
    config_class = CONFIGS[family]
    dense = TESTED[family].tiny().to_dict()
    values = {name: value for name, value in dense.items() if name not in ("model_type", "architectures")}
    values = {"num_experts": 4, "moe_layers": [0, 2], **values, **config}
    class_name = class_name or lm_class(family)
    torch.manual_seed(0)
    return scatter(model_class(config_class, class_name)(config_class(**values)))


def batch(
    family: str, rows: int = 2, length: int = 10, padding: bool = True, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Token ids and mask (rows, length), the last row padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}
