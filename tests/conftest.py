"""Tiny dense checkpoints, made once a session: real files on disk, as a user would have them."""

import atexit
import json
import os
import shutil
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in a test may wait for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers run side by side
if "HF_DATASETS_CACHE" not in os.environ:  # each worker has its own, and takes it away
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="hf-moe-datasets-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest
import torch
from transformers import BertTokenizer, GPT2Tokenizer, Wav2Vec2CTCTokenizer, XLMRobertaTokenizer
from transformers.utils import logging

import hf_moe
from hf_moe.cli import main
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
TEXT_FAMILIES = [family for family in FAMILIES if TABLES[family].inputs == "input_ids"]


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


def save_processors(family: str, folder) -> None:
    """Tokenizer and preprocessor, as far as the family has them."""
    if TESTED[family].tokenizer is not None:
        save_tokenizer(family, folder)
    if TESTED[family].preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(TESTED[family].preprocessor))


def save_tokenizer(family: str, folder) -> None:
    if TESTED[family].tokenizer == "wordpiece":
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    elif TESTED[family].tokenizer == "unigram":
        pieces = ["<s>", "<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS if "#" not in word), "<mask>"]
        XLMRobertaTokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)]).save_pretrained(folder)
    elif TESTED[family].tokenizer == "ctc":
        letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"]
        (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
        Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
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
    """(family, dense class name, **config) -> a checkpoint folder with its processors, made once."""
    made = {}

    def make(family: str, name: str | None = None, max_shard_size: str = "5GB", **config):
        name = name or moe_classes(family)[lm_class(family)].__bases__[1].__name__
        key = (name, max_shard_size, repr(sorted(config.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            if name == "BertLMHeadModel":
                config["is_decoder"] = True
            model = scatter(dense_classes(family)[name](TESTED[family].tiny(**config)))
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            save_processors(family, folder)
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
    """Random inputs of the family's kind; where it has a mask, the last row is padded."""
    generator = torch.Generator().manual_seed(seed)
    inputs = BATCHES[TABLES[family].inputs](TESTED[family].tiny(), rows, length, generator)
    if padding and "attention_mask" in inputs:
        inputs["attention_mask"][-1, inputs["attention_mask"].shape[1] // 2 :] = 0
    return inputs


def _ids(config, rows, length, generator):
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _images(config, rows, length, generator):
    shape = (rows, config.num_channels, config.image_size, config.image_size)
    return {"pixel_values": torch.randn(shape, generator=generator)}


def _waves(config, rows, length, generator):
    waves = torch.randn((rows, 20 * length), generator=generator)
    return {"input_values": waves, "attention_mask": torch.ones(waves.shape, dtype=torch.long)}


def _features(config, rows, length, generator):
    shape = (rows, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": torch.randn(shape, generator=generator)}


BATCHES = {"input_ids": _ids, "pixel_values": _images, "input_values": _waves, "input_features": _features}


def _patches(config) -> int:
    return (config.image_size // config.patch_size) ** 2


def _frames(config, samples: int) -> int:
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


# How many tokens a row makes, of so many ids or samples.
TOKENS = {
    "input_ids": lambda config, length: length,
    "pixel_values": lambda config, length: _patches(config) + 1,
    "input_values": _frames,
    "input_features": lambda config, length: config.max_source_positions,
}


def real_tokens(family: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which of its tokens are no padding, (rows, tokens)."""
    config, count = TESTED[family].tiny(), TOKENS[TABLES[family].inputs]
    shape = inputs[TABLES[family].inputs].shape
    lengths = inputs["attention_mask"].sum(1).tolist() if "attention_mask" in inputs else [shape[1]] * shape[0]
    tokens = torch.arange(count(config, shape[1]))
    return torch.stack([tokens < count(config, length) for length in lengths])


def inputs_for(name: str, family: str) -> dict[str, torch.Tensor]:
    """`batch` in the form that a head wants."""
    inputs = batch(family)
    if name.endswith("ForMultipleChoice") or "DoubleHeads" in name:
        inputs = {key: value.unsqueeze(1).repeat(1, 3, 1) for key, value in inputs.items()}
    if "DoubleHeads" in name:
        inputs["mc_token_ids"] = torch.tensor([[0, 2, 4]] * 2)
    return inputs


def labels_for(name: str, family: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a head wants beside its inputs to give a loss, as Trainer would pass it; nothing for a body."""
    return next((make(family, inputs) for ending, make in LABELS.items() if name.endswith(ending)), {})


def _token_labels(family, inputs):
    return {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def _token_classes(family, inputs):
    return {"labels": (inputs["input_ids"] % 2).masked_fill(inputs["attention_mask"] == 0, -100)}


def _row_labels(family, inputs):
    return {"labels": torch.tensor([1, 0])}


def _spans(family, inputs):
    return {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 1])}


def _masked_patches(family, inputs):
    patches = _patches(TESTED[family].tiny())
    return {"bool_masked_pos": torch.arange(2 * patches).reshape(2, patches) % 2 == 0}


def _characters(family, inputs):
    return {"labels": torch.tensor([[5, 6, 6, 7], [8, 9, -100, -100]])}


def _classes_of_frames(family, inputs):
    return {
        "labels": torch.nn.functional.one_hot(torch.arange(real_tokens(family, inputs).numel()) % 2).view(2, -1, 2)
    }


def _pretraining(family, inputs):
    if "input_ids" in inputs:
        return {**_token_labels(family, inputs), "next_sentence_label": torch.tensor([1, 0])}
    real = real_tokens(family, inputs)
    masked = real & (torch.arange(real.shape[1]) % 2 == 0)
    others = torch.arange(real.numel() * 3).view(*real.shape, 3) * 7 % real.sum(1).min()
    return {"mask_time_indices": masked, "sampled_negative_indices": others}


# End of a head's name -> what it wants; the first that fits.
LABELS = {
    "ForPreTraining": _pretraining,
    "ForCTC": _characters,
    "ForAudioFrameClassification": _classes_of_frames,
    "ForQuestionAnswering": lambda *a: {
        "start_positions": torch.tensor([1, 0]),
        "end_positions": torch.tensor([2, 1]),
    },
    "ForTokenClassification": _token_classes,
    "ForMaskedImageModeling": _masked_patches,
    **dict.fromkeys(["LMHeadModel", "ForMaskedLM", "ForCausalLM", "DoubleHeadsModel"], _token_labels),
    **dict.fromkeys(
        [
            "ForSequenceClassification",
            "ForNextSentencePrediction",
            "ForMultipleChoice",
            "ForImageClassification",
            "ForAudioClassification",
            "ForXVector",
        ],
        _row_labels,
    ),
}


def assert_equal(got, expected):
    """The same tensors, in tuples of tuples."""
    if isinstance(expected, tuple):
        for one, other in zip(got, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected)


@pytest.fixture
def hf_moe_command(monkeypatch, capsys):
    """Runs `hf-moe ARGUMENTS` in this process -> (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-moe", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
