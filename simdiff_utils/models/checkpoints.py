"""Checkpoints: from the name that a user gives to a folder that plain `transformers` loads."""

import hashlib
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, snapshot_download
from tqdm.auto import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from simdiff_utils import SimDiffError, assets
from simdiff_utils.engine.load import auto_class, load_folder
from simdiff_utils.engine.whole import (
    DEQUANTISED,
    check_folder,
    quantisation,
    refuse_adapters,
    told_in_a_sentence,
)
from simdiff_utils.files import hash_file, read_json, write_json, write_whole
from simdiff_utils.models import shapes
from simdiff_utils.models.gguf_files import convert_gguf
from simdiff_utils.models.names import (
    CHECKPOINT_FILES,
    CODE_FILES,
    LEGAL_FILES,
    SECOND_COPIES,
    hub_sentences,
    read_model_name,
)
from simdiff_utils.models.own_code import brings_model_code, needs_own_code, trust_code
from simdiff_utils.models.record import read_record, title

_CAUSAL = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*.jinja", *LEGAL_FILES)
_NOT_COPIED = {
    "README.md",
    "config.json",
    "pruning.json",
    "llama_quantize.txt",
}  # of the weights; written anew
_TERMS = ("license", "license_name", "license_link", "language", "datasets")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that plain `transformers` loads, with what to call it.

    Attributes:
        folder: config, safetensors and tokenizer files.
        label: the name for tables.
        sha256: of config and weights (and of the code that comes with them, if any), so that results of other
            weights are never taken for these.
        hub_id: where it is on the hub; None for a local, embedded or made one.
        card: of its model card, what a card of anything made from it has to say: license, language, datasets,
            and, of an embedded one, base_model.
    """

    folder: Path
    label: str
    sha256: str
    hub_id: str | None = None
    card: dict = field(default_factory=dict)


def resolve_checkpoint(model: str, trust_remote_code: bool = False) -> Checkpoint:
    """Find the checkpoint that a user's name means.

    Args:
        model: `embedded:NAME` (see `assets.ASSETS`), `shape:NAME` (see `shapes.SHAPES`), a local Hugging Face
            folder, a local `.gguf` file, or a hub id.
        trust_remote_code: run the code that comes with the model, if it does.

    Raises:
        SimDiffError: it cannot be found or reached, is no decoder-only model, has no safetensors, or needs
            code of its own and is not trusted.
    """
    files = CHECKPOINT_FILES + CODE_FILES if trust_remote_code else CHECKPOINT_FILES
    folder, label, hub_id = _locate(model, files)
    _refuse_unsuitable(folder, model, trust_remote_code)
    kind, name = read_model_name(model)
    card = dict(assets.ASSETS[name].card) if kind == "embedded" else _read_card(folder)
    if method := quantisation(folder):
        folder = _dequantise(folder, method)
    return Checkpoint(folder, label, hash_checkpoint(folder), hub_id, card)


def _read_card(folder: Path) -> dict:
    """What the head of a README.md says of the terms; nothing where there is none that can be read."""
    try:
        head = ModelCard.load(folder / "README.md").data.to_dict()
    except Exception:  # whatever somebody wrote there
        return {}
    return {name: head[name] for name in _TERMS if head.get(name)}


def checkpoint_folder(model: str) -> Path:
    """Folder of the checkpoint named; what has to be converted or made is, once, into the user's cache."""
    return _locate(model, CHECKPOINT_FILES)[0]


def _locate(model: str, files: list[str]) -> tuple[Path, str, str | None]:
    """Folder, label and hub id of the checkpoint named; from the hub come files of these patterns."""
    match read_model_name(model):
        case "shape", name:
            return shapes.shape_folder(name), f"{name} shape (random weights)", None
        case "embedded", name:
            target = assets.locate_model(name)[0]
            folder = target if target.exists() else convert_gguf(assets.fetch(name), target)
            return folder, assets.ASSETS[name].label, None
        case "folder", name:
            return Path(name), _label_folder(Path(name)), None
        case "gguf", name:
            target = assets.cache_dir() / "checkpoints" / f"gguf-{_hash_files([Path(name)])[:16]}"
            folder = target if target.exists() else convert_gguf(Path(name), target)
            return folder, Path(name).resolve().name, None
    with hub_sentences(model):
        folder = snapshot_download(model, allow_patterns=files, ignore_patterns=SECOND_COPIES)
    return Path(folder), model, model


def _label_folder(folder: Path) -> str:
    """A folder's name; of a checkpoint of ours, which model it is without how many layers."""
    record = read_record(folder)
    if record is None:
        return folder.resolve().name
    return title(record) + (", recovered" if "recovery" in record else "")


def _dequantise(folder: Path, method: str) -> Path:
    """A checkpoint in plain weights of a quantised one, in the dtype that its config states; made once."""
    target = assets.cache_dir() / "checkpoints" / f"{method}-{hash_checkpoint(folder)[:16]}"
    if target.exists():
        return target
    plain = DEQUANTISED[method][1](dequantize=True)
    model = load_folder(folder, dtype="auto", quantization_config=plain)
    return _write_plain(model, target, lambda partial: copy_companions(folder, partial))


def _write_plain(model: PreTrainedModel, target: Path, add_others: Callable[[Path], object]) -> Path:
    # Loaded so, it is marked as quantised and refuses to be saved, though its weights are plain.
    # Nor may what was undone while it was read be done again.
    model.hf_quantizer = model._weight_conversions = None
    vars(model.config).pop("quantization_config", None)
    with write_whole(target, replace=False) as partial:
        model.save_pretrained(partial)
        add_others(partial)
    return target


def _refuse_unsuitable(folder: Path, model: str, trust_remote_code: bool) -> None:
    refuse_adapters(folder)
    if not (folder / "config.json").is_file():
        raise SimDiffError(f"{model} holds no config.json, so it is no Hugging Face model folder.")
    with told_in_a_sentence(f"transformers cannot read the config of {model}"):
        own_code = needs_own_code(folder)
        if own_code and not trust_remote_code:
            raise SimDiffError(
                f"{model} needs code that comes with it: read that code, then set trust_remote_code = True, "
                "or name a model of a family that transformers knows."
            )
        if own_code:
            trust_code(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = config.architectures or []
    if names or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        wraps_one = auto_class(config) is not AutoModelForCausalLM
        causal = wraps_one or brings_model_code(folder) or set(names) & _CAUSAL
    else:
        causal = True  # older tools leave the architecture out
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder or not causal:
        raise SimDiffError(
            f"{model} is no decoder-only language model (its architecture is "
            f"{', '.join(names) or config.model_type}); name a causal language model."
        )
    check_folder(folder, dequantise=True)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what a checkpoint has beside its weights and config: tokenizer, chat template, generation config,
    code of its own."""
    for pattern in (*_COMPANIONS, *(CODE_FILES if needs_own_code(source) else ())):
        for file in source.glob(pattern):
            if file.name not in _NOT_COPIED and not file.name.endswith(".index.json"):
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    generation = folder / "generation_config.json"
    if generation.is_file():  # what one run wanted back, and not how the model generates
        write_json(
            generation, {k: v for k, v in read_json(generation).items() if k != "return_dict_in_generate"}
        )


def hash_checkpoint(folder: Path) -> str:
    code = sorted(folder.glob("*.py")) if needs_own_code(folder) else []
    return _hash_files([folder / "config.json", *sorted(folder.glob("*.safetensors")), *code])


def _hash_files(paths: list[Path]) -> str:
    with ThreadPoolExecutor() as pool:
        bar = dict(total=len(paths), desc="hashing weights", unit="file", delay=2, leave=False)
        digests = list(tqdm(pool.map(hash_once, paths), **bar))
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def hash_once(path: Path) -> str:
    """sha256 of a file. A large one takes long: the hub's cache names it, and what was found once is kept."""
    stored = path.resolve()
    if stored.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", stored.name):
        return stored.name
    state = stored.stat()
    if state.st_size < 2**26:
        return hash_file(path)
    name = hashlib.sha256(f"{stored} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    remembered = assets.cache_dir() / "hashes" / f"{name}.json"
    if not remembered.exists():
        write_json(remembered, {"sha256": hash_file(path)})
    return read_json(remembered)["sha256"]
