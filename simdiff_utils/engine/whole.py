"""A checkpoint is loaded whole or refused in one sentence: what every way of loading asks, before and after.

transformers fills the weights that a file lacks with random numbers and only warns, and passes over those
that it does not know: numbers would come out, of another model.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch.nn import ModuleList
from transformers import FineGrainedFP8Config, Mxfp4Config, PreTrainedModel

from simdiff_utils import SimDiffError, one_line
from simdiff_utils.engine.headers import read_header, weight_files
from simdiff_utils.files import read_json

# Methods whose weights transformers turns into plain ones: how they are stored, the config that asks for it
DEQUANTISED = {"fp8": ("F8_E4M3", FineGrainedFP8Config), "mxfp4": ("U8", Mxfp4Config)}


@contextmanager
def told_in_a_sentence(what: str) -> Iterator[None]:
    """Whatever transformers and what is below it raise in a `with` block, as "WHAT: its words"."""
    try:
        yield
    except SimDiffError:
        raise
    except Exception as error:  # a family's own checks, safetensors, the operating system: no common kind
        raise SimDiffError(f"{what}: {one_line(error)}") from error


def quantisation(folder: Path) -> str | None:
    """By which method a checkpoint's config says that its weights are quantised; None: by none."""
    config = read_json(folder / "config.json")
    found = [
        part[key]
        for part in (config, config.get("text_config"))
        if isinstance(part, dict)
        for key in ("quantization_config", "compression_config")
        if part.get(key)
    ]
    return str(found[0].get("quant_method") or "an unnamed method") if found else None


def check_folder(folder: Path, dequantise: bool = False) -> None:
    """Refuse what config and headers show without any weight being read.

    Args:
        dequantise: for a loader that turns quantised weights into plain ones.

    Raises:
        SimDiffError: an adapter lies there, a file is lost, damaged or a git-lfs pointer, or the weights are
            quantised in a way that nothing here can undo.
    """
    refuse_adapters(folder)
    dtypes = {
        tensor.dtype: name for file in weight_files(folder) for name, tensor in read_header(file).items()
    }
    method = quantisation(folder)
    if method and not (dequantise and method in DEQUANTISED):
        raise SimDiffError(
            f"{folder.name} is quantised ({method}), and layers are measured and cut in full precision: name "
            "the unquantised checkpoint it was made from, or a GGUF file of it."
        )
    if method and DEQUANTISED[method][0] not in dtypes:
        raise SimDiffError(
            f"config.json of {folder.name} says that its weights are quantised ({method}), and none is: take "
            "quantization_config out of it if they are plain ones."
        )
    packed = next((name for dtype, name in dtypes.items() if dtype.startswith(("F8", "F4", "F6"))), None)
    if packed and not method:
        raise SimDiffError(
            f"{packed} in {folder.name} is stored in 8 bits or fewer, and config.json has no "
            "quantization_config that says how to read it: fetch the config again, or name the unquantised "
            "checkpoint."
        )


def refuse_adapters(folder: Path) -> None:
    """Refuse a PEFT adapter in the place of a model's weights, or beside them.

    transformers would load the adapter's base model.
    """
    files = [*folder.glob("adapter_*.json"), *folder.glob("adapter_*.safetensors")]
    names = sorted(file.name for file in files)
    if not names:
        return
    if {*folder.glob("*.safetensors")} - {*files}:
        raise SimDiffError(
            f"{folder.name} holds {names[0]} beside whole weights, and transformers would load the adapter's "
            "base model in their place: move the adapter's files elsewhere, or merge it first."
        )
    raise SimDiffError(
        f"{folder.name} holds an adapter ({names[0]}) and no whole model: merge it into its base model with "
        "PEFT (merge_and_unload, save_pretrained) and name that folder."
    )


def check_whole(model: PreTrainedModel, info: Mapping[str, Iterable], label: str) -> None:
    """Refuse a model that has not every weight from its file, or whose file holds weights that it should run.

    Weights that a family is known to leave unread (its own ignore lists) are none of `info` any more. Of the
    others, those of whole parts that the model has not are let pass: layers behind the last one, a head
    beside its own.

    Args:
        info: missing_keys, mismatched_keys and unexpected_keys, as transformers tells after loading.
        label: what was loaded, for the sentence.
    """
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    foreign = sorted(name for name in info["unexpected_keys"] if _belongs_to_a_part(model, name))
    for names, words in (
        (missing, "holds no {} of {}"),
        (mismatched, "holds a {} of another shape than {} has"),
        (foreign, "holds a {} that {} does not have"),
    ):
        if names:
            more = f" (and {len(names) - 1} others)" if len(names) > 1 and names is missing else ""
            said = words.format(names[0], type(model).__name__)
            raise SimDiffError(f"{label} {said}{more}; fetch or save it again.")


def _belongs_to_a_part(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight lies in something that the model runs: not at its root, nor in a layer it has not."""
    owner = model
    for part in name.split(".")[:-1]:
        if part not in owner._modules:
            break
        owner = owner._modules[part]
    return owner is not model and not isinstance(owner, ModuleList)
