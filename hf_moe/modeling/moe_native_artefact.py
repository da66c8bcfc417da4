"""Opens experts made for one of Transformers' own mixtures: `MixtralForCausalLM` of this module is the class of that
name whose `from_pretrained` fetches the base; what comes out is Transformers' own."""

from typing import Any

import transformers

from .moe_artefact import from_artefact


def __getattr__(name: str) -> Any:
    native: Any = None if name.startswith("_") else getattr(transformers, name, None)
    if not (isinstance(native, type) and issubclass(native, transformers.PreTrainedModel)):
        raise AttributeError(name)
    config_class: Any = native.config_class

    def from_pretrained(cls, path, *args, **kwargs):
        if kwargs.get("config") is None:
            config, kwargs = config_class.from_pretrained(path, return_unused_kwargs=True, **kwargs)
            kwargs["config"] = config
        return from_artefact(native.from_pretrained, path, args, kwargs)

    return type(name, (native,), {"from_pretrained": classmethod(from_pretrained), "__module__": __name__})
