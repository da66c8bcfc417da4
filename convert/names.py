"""Each tensor of a source checkpoint gets the name that the dense class has for it, or a reason why not."""

import re
from collections.abc import Iterable
from contextlib import suppress

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_moe.errors import HfMoeError, SourceError

from .checkpoint import Checkpoint
from .classes import dense_class_of, moe_classes, name_of_body
from .families import Family
from .headers import FLOATS, TensorInfo
from .quiet import quiet


def match_names(checkpoint: Checkpoint, family: Family, dense_class, dense_config, expected, tied):
    """Each tensor of the source gets the name that the dense class has for it.

    Returns:
        names: dense class's name -> source's name; dropped: source's name -> why; problems.
    """
    names: dict[str, str] = {}
    dropped: dict[str, str] = {}
    problems: list[HfMoeError] = []
    left_over: list[str] = []
    body = name_of_body(family, dense_class)
    for source in checkpoint.tensors:
        name = _current_name(source, family, body, expected)
        if name in names:
            problems.append(SourceError(f"{checkpoint.path}: {names[name]!r} and {source!r} are the same tensor."))
        elif name in expected:
            names[name] = source
        else:
            left_over.append(source)

    for source in left_over:
        if reason := _why_dropped(source, family):
            dropped[source] = reason
    left_over = [source for source in left_over if source not in dropped]
    elsewhere = _tensors_of_other_heads(family, dense_config) if left_over else {}
    for source in left_over:
        name = _current_name(source, family, body, elsewhere)
        if name in elsewhere:
            names[name] = source  # another head's: carried along, as the dense checkpoint carries it
            expected[name] = elsewhere[name]
        else:
            problems.append(
                SourceError(f"{checkpoint.path}: tensor {source!r} is left over: no {family.model_type} class has it.")
            )
    missing = [name for name in expected if name not in names and name not in tied and not _is_optional(name, family)]
    problems += [SourceError(f"{checkpoint.path}: tensor {name!r} is missing.") for name in missing]
    for name, source in names.items():
        problems += _check_tensor(checkpoint, checkpoint.tensors[source], expected[name])
    return names, dropped, problems


def lacks_head(checkpoint: Checkpoint, family: Family, dense_class, expected, tied: set[str]) -> bool:
    """Whether the folder holds a body only, though its configuration names a head: as sentence encoders often do."""
    prefix = name_of_body(family, dense_class)
    own = {name for name in expected if name not in tied and not name.startswith(f"{prefix}.")}
    if not own or len(own) == len(expected):  # a head that is tied to the body; a body
        return False
    return not any(_current_name(source, family, prefix, expected) in own for source in checkpoint.tensors)


def _why_dropped(source: str, family: Family) -> str | None:
    return next((why for pattern, why in family.dropped.items() if re.search(pattern, source)), None)


def _is_optional(name: str, family: Family) -> bool:
    return any(re.search(pattern, name) for pattern in family.optional)


def _renamed(source: str, family: Family) -> str:
    for old, new in family.renamed.items():
        source = re.sub(old, new, source)
    return source


def _current_name(source: str, family: Family, prefix: str, expected: Iterable[str]) -> str:
    """`source` by today's name: old parts renamed, the body's prefix added or taken away as the class has it."""
    source = _renamed(source, family)
    candidates = (source, f"{prefix}.{source}", source.removeprefix(f"{prefix}."))
    return next((name for name in candidates if name in expected), source)


def _tensors_of_other_heads(family: Family, dense_config: PretrainedConfig) -> dict[str, torch.Tensor]:
    shapes: dict[str, torch.Tensor] = {}
    for moe_class in moe_classes(family).values():
        with suppress(SourceError):  # a head that this configuration excludes
            shapes |= tensors_of(dense_class_of(moe_class), dense_config)[0]
    return shapes


def _check_tensor(checkpoint: Checkpoint, info: TensorInfo, meta: torch.Tensor) -> list[HfMoeError]:
    where = f"{checkpoint.path}: tensor {info.name!r}"
    if info.shape != tuple(meta.shape):
        return [SourceError(f"{where} has shape {list(info.shape)}, but config.json makes it {list(meta.shape)}.")]
    if meta.is_floating_point() and info.dtype not in FLOATS:
        return [SourceError(f"{where} has dtype {info.dtype}, but should be a floating-point tensor.")]
    return []


def check_layer_count(checkpoint: Checkpoint, family: Family, num_hidden_layers: int) -> None:
    """Before anything is built from the configuration: it may promise layers by the billion."""
    kept = [_renamed(name, family) for name in checkpoint.tensors if not _why_dropped(name, family)]
    check_layers(checkpoint, kept, family.layer, num_hidden_layers)


def layer_pattern(layer: str) -> str:
    """A regular expression for names of `layer` ("h.{layer}", say), whose only group is the number."""
    return re.escape(layer).replace(re.escape("{layer}"), r"(\d+)")


def check_layers(checkpoint: Checkpoint, names: Iterable[str], layer: str, num_hidden_layers: int) -> None:
    """Raises SourceError where `names` are not of so many layers, counted from 0."""
    pattern = re.compile(rf"(?:^|\.){layer_pattern(layer)}\.")
    held = {int(match[1]) for name in names if (match := pattern.search(name))}
    if held != set(range(len(held))) or len(held) != num_hidden_layers:
        raise SourceError(
            f"{checkpoint.path}: config.json says {num_hidden_layers} layers, but the weights hold {len(held)}."
        )


def tensors_of(
    model_class: type[PreTrainedModel], config: PretrainedConfig
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The tensors of a model on the meta device, and the names among them that are tied to others."""
    with quiet(), torch.device("meta"):
        try:
            model = model_class(config)
        except Exception as error:  # a configuration can be wrong in every way
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise SourceError(
                f"config.json describes no {model_class.__name__} that can be built: {reason}"
            ) from error
    return model.state_dict(), set(model.all_tied_weights_keys)
