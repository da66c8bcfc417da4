"""Makes Transformers' Auto classes, pipelines and Trainer know our models."""

import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from hf_moe.modeling import CONFIGS, model_class
from hf_moe.modeling.configuration_moe import MoeConfigMixin


def register_all() -> None:
    """Registers every family; calling it again changes nothing."""
    for dense_type, config_class in CONFIGS.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        _register_tokenizer(dense_type, config_class)
        for auto_name, class_name in config_class.auto_classes.items():
            auto_class = getattr(transformers, auto_name)
            auto_class.register(config_class, model_class(config_class, class_name), exist_ok=True)
            # Pipelines and Trainer's label smoothing look classes up by name, in the table behind the Auto class.
            auto_class._model_mapping._model_mapping[config_class.model_type] = class_name


def _register_tokenizer(dense_type: str, config_class: type[MoeConfigMixin]) -> None:
    tokenizer = TOKENIZER_MAPPING.get(transformers.CONFIG_MAPPING[dense_type], None)
    if tokenizer is None:
        return
    slow, fast = tokenizer if isinstance(tokenizer, tuple) else (tokenizer, None)
    AutoTokenizer.register(config_class, slow_tokenizer_class=slow, fast_tokenizer_class=fast, exist_ok=True)
