"""What a Hub checks in a card before it takes it."""

import re

import yaml

FRONT = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
RELATIONS = ("adapter", "finetune", "merge", "quantized")
LICENCES = ("apache-2.0", "mit", "other", "unknown", "cc-by-4.0", "cc-by-sa-4.0", "bsd-3-clause", "openrail", "llama3")
TYPES = {"tags": list, "pipeline_tag": str, "library_name": str, "model-index": list, "license_link": str}


def problems(card: str) -> tuple[list[str], list[str]]:
    """Errors, which are refused, and warnings."""
    found = FRONT.match(card)
    if not found:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"invalid yaml: {str(error).splitlines()[0]}"], []
    if not isinstance(data, dict):
        return ["metadata must be a mapping"], []
    errors = []
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str) or not REPO.fullmatch(base):
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    if "base_model_relation" in data and data["base_model_relation"] not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    if "license" in data and data["license"] not in LICENCES:
        errors.append(f'"license" must be one of {", ".join(LICENCES)}')
    for name, kind in TYPES.items():
        if name in data and not isinstance(data[name], kind):
            errors.append(f'"{name}" must be a {kind.__name__}')
    languages = data.get("language", [])
    for language in [languages] if isinstance(languages, str) else languages:
        if not isinstance(language, str) or not re.fullmatch(r"[a-z]{2,3}(-\w+)*|multilingual|code", language):
            errors.append(f'"language" with value "{language}" is not an ISO 639 code')
    return errors, []
