"""Makes Transformers' Auto classes, pipelines and Trainer know our models."""

from typing import Any

import transformers
from transformers import AutoConfig, AutoFeatureExtractor, AutoProcessor, AutoTokenizer
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from hf_moe.modeling import CONFIGS, model_class
from hf_moe.modeling.configuration_moe import MoeConfigMixin


def register_all() -> None:
    """Registers every family; calling it again changes nothing."""
    for dense_type, config_class in CONFIGS.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        _register_processors(dense_type, config_class)
        for auto_name, class_name in config_class.auto_classes.items():
            auto_class = getattr(transformers, auto_name)
            auto_class.register(config_class, model_class(config_class, class_name), exist_ok=True)
            # Pipelines and Trainer's label smoothing look classes up by name, in the table behind the Auto class.
            auto_class._model_mapping._model_mapping[config_class.model_type] = class_name


def _register_processors(dense_type: str, config_class: type[MoeConfigMixin]) -> None:
    """A mixture's tokenizer and processors are its dense model's."""
    dense_config: Any = transformers.CONFIG_MAPPING[dense_type]
    tokenizer = TOKENIZER_MAPPING.get(dense_config, None)
    if tokenizer is not None:
        slow, fast = tokenizer if isinstance(tokenizer, tuple) else (tokenizer, None)
        AutoTokenizer.register(config_class, slow_tokenizer_class=slow, fast_tokenizer_class=fast, exist_ok=True)
    for auto_class, mapping in ((AutoFeatureExtractor, FEATURE_EXTRACTOR_MAPPING), (AutoProcessor, PROCESSOR_MAPPING)):
        processor = mapping.get(dense_config, None)
        if processor is not None:
            auto_class.register(config_class, processor, exist_ok=True)
    if dense_type in IMAGE_PROCESSOR_MAPPING_NAMES:
        # by names, as Transformers keeps them: importing the classes looks for torchvision, and warns
        names: Any = IMAGE_PROCESSOR_MAPPING_NAMES[dense_type]
        IMAGE_PROCESSOR_MAPPING.register(config_class, names, exist_ok=True)
