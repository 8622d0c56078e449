"""Which of a source's files belong to a model: weights, configuration, tokenizer, templates, and nothing else.

Pure. Owns the rule, for every source alike. Does not look into files.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

_BESIDE = ("*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt", "spiece.model")
_TEMPLATES = "additional_chat_templates/*.jinja"
_PICKLES = ("pytorch_model*.bin",)


def wanted(names: Iterable[str], *, allow_pickle: bool) -> list[str]:
    """The names of a model's files, in order; names are paths below the model's root, divided by "/".

    Weights are safetensors. Where a repository holds them twice, as `model*.safetensors` and under another name, only
    the first are taken. Pickled weights are taken where they are allowed and there is nothing better.
    """
    top = sorted(name for name in names if "/" not in name or (name.count("/") == 1 and fnmatchcase(name, _TEMPLATES)))
    top = [name for name in top if ".." not in name.split("/")]  # a bucket's key may say anything
    weights = [name for name in top if name.endswith(".safetensors")]
    weights = [name for name in weights if name.startswith("model")] or weights
    if not weights and allow_pickle:
        weights = [name for name in top if any(fnmatchcase(name, pattern) for pattern in _PICKLES)]
    beside = [
        name
        for name in top
        if any(fnmatchcase(name, pattern) for pattern in (*_BESIDE, _TEMPLATES))
        and (allow_pickle or not name.endswith(".bin.index.json"))
    ]
    return sorted(weights + beside)
