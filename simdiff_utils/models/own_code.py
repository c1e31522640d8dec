"""Code that comes with a checkpoint: run only where the user trusts the model, and then known like any
family's.

transformers calls it remote code. Each of its `from_pretrained` would ask for `trust_remote_code` anew; here
the classes are registered once instead, so that whoever loads the checkpoint, or one made of it, finds them.
"""

import os
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from simdiff_utils import SimDiffError
from simdiff_utils.files import read_json

_TRUSTED = "SIMDIFF_TRUSTED_CODE"  # the folder whose code the fresh processes that a run starts may run, too


def needs_own_code(folder: Path) -> bool:
    """Whether a checkpoint names classes of its own for its model or its tokenizer, in the place of
    transformers'."""
    return brings_model_code(folder) or brings_tokenizer_code(folder)


def brings_model_code(folder: Path) -> bool:
    """Whether a checkpoint is of no family that transformers knows and names classes of its own instead."""
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    known = model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type].__module__.startswith("transformers.")
    return "auto_map" in config and not known


def brings_tokenizer_code(folder: Path) -> bool:
    """Whether a checkpoint's tokenizer is of a class that comes with it."""
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    return "AutoTokenizer" in config.get("auto_map", {}) and not hasattr(
        transformers, str(config.get("tokenizer_class"))
    )


def trust_code(folder: Path) -> None:
    """Run the code in a checkpoint's folder and make its config, model and tokenizer known to transformers.

    Raises:
        SimDiffError: the code lies in another repository, which nobody was asked about, or gives no causal
            model.
    """
    if not brings_model_code(folder):
        return
    auto_map = read_json(folder / "config.json")["auto_map"]
    if elsewhere := [reference for reference in auto_map.values() if "--" in str(reference)]:
        raise SimDiffError(
            f"{folder.name} names {elsewhere[0]}, which is code of another repository: copy it into the "
            "folder."
        )
    if "AutoModelForCausalLM" not in auto_map:
        raise SimDiffError(
            f"{folder.name} comes with code for {', '.join(auto_map)}, and with none for a causal language "
            "model (AutoModelForCausalLM)."
        )
    here = dict(trust_remote_code=True, local_files_only=True)
    config = AutoConfig.from_pretrained(folder, **here)
    AutoConfig.register(config.model_type, type(config), exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    AutoModelForCausalLM.register(type(config), type(model), exist_ok=True)
    if type(config) not in TOKENIZER_MAPPING:
        tokenizer = AutoTokenizer.from_pretrained(folder, **here)
        AutoTokenizer.register(type(config), type(tokenizer), exist_ok=True)
    os.environ[_TRUSTED] = str(folder.resolve())


def trust_as_parent() -> None:
    """In a fresh process: trust what the process that started it trusts."""
    if folder := os.environ.get(_TRUSTED):
        trust_code(Path(folder))
