"""What a grid's notebook runs need of a machine, from their settings and each model's size, before anything
starts.

No weight is read and neither torch nor transformers is loaded. How long a run takes, only a measurement says:
the time limit of a batch job is its profile's (profiles/slurm).
"""

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import psutil
from huggingface_hub import HfApi, get_local_safetensors_metadata, hf_hub_download, snapshot_download

from simdiff_utils import SimDiffError, assets, one_line
from simdiff_utils.files import check_disk, read_json
from simdiff_utils.models.names import hub_sentences, read_model_name
from simdiff_utils.registry import find
from simdiff_utils.settings import Settings
from workflow.plan import NotebookRun

_GIB = 2**30
_PROCESS_GIB = 4.0  # Python, libraries, Snakemake and papermill, activations and logits of small batches
# Models held at once: 03 and 05 the dense and the pruned one, 04 teacher and pupil.
_COPIES = {"01": 1, "02": 1, "03": 2, "04": 2, "05": 2, "06": 1}
_CHOOSE = {"02", "03", "06"}  # notebooks that choose layers
_WHOLE = {"04", "05"}  # notebooks that never stream a model from disk
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelSize:
    """What is known of a checkpoint without its weights.

    Attributes:
        n_parameters: of the whole model.
        n_layers: decoder layers.
        n_outside: parameters outside the decoder layers (embedding, head, norms).
        n_bytes: of its weight files, as stored.
        here: whether those are on this machine.
    """

    n_parameters: int
    n_layers: int
    n_outside: int
    n_bytes: int
    here: bool


@dataclass(frozen=True)
class Needs:
    """What one notebook run asks for.

    Attributes:
        memory_gib: with every model it holds whole in memory.
        least_gib: with models streamed from disk where the notebook can.
        n_gpus: 0 where none are asked for.
        disk_bytes: what it writes, at most.
    """

    memory_gib: float
    least_gib: float
    n_gpus: int
    disk_bytes: int


# ---- a model's size


@functools.cache  # the check and every job ask for the same models
def look_up(model: str) -> ModelSize:
    """Size of the model that a user's name means (see `names.read_model_name`).

    Raises:
        SimDiffError: there is no such model, or it cannot be reached.
    """
    match read_model_name(model):
        case "shape", name:
            from simdiff_utils.models.shapes import shape_size

            n_parameters, n_layers, n_outside = shape_size(name)
            return ModelSize(n_parameters, n_layers, n_outside, 2 * n_parameters, False)
        case "embedded", name:
            folder, gguf, n_bytes = assets.locate_model(name)
            if folder.exists():
                return _size_of_folder(folder, model)
            if gguf.exists():
                return _size_of_gguf(gguf)
            return ModelSize(2 * n_bytes, 1, n_bytes, n_bytes, False)  # still to be fetched
        case "folder", name:
            return _size_of_folder(Path(name), model)
        case "gguf", name:
            return _size_of_gguf(Path(name))
    return _size_on_hub(model)


def _size_on_hub(hub_id: str) -> ModelSize:
    with hub_sentences(hub_id):
        try:
            cached = snapshot_download(hub_id, local_files_only=True)
        except FileNotFoundError:
            cached = None
        if cached and any(Path(cached).glob("*.safetensors")):
            return _size_of_folder(Path(cached), hub_id)
        api = HfApi()
        # asked first, since it fails at once where the other two try for half a minute
        api.model_info(hub_id, timeout=10)
        config = read_json(Path(hf_hub_download(hub_id, "config.json")))
        return _size(api.get_safetensors_metadata(hub_id), config, here=False)


def _size_of_folder(folder: Path, model: str) -> ModelSize:
    try:
        return _size(get_local_safetensors_metadata(folder), read_json(folder / "config.json"), here=True)
    except Exception as error:  # no config, no weights, damaged ones: the client's kinds are many
        raise SimDiffError(
            f"{model} is no Hugging Face model folder with safetensors weights: {one_line(error)}"
        ) from error


def _size(metadata: object, config: Mapping, here: bool) -> ModelSize:
    tensors = {
        name: tensor for file in metadata.files_metadata.values() for name, tensor in file.tensors.items()
    }
    counts = {name: tensor.parameter_count for name, tensor in tensors.items()}
    outside = sum(count for name, count in counts.items() if not re.search(r"\.\d+\.", name))
    n_bytes = sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors.values())
    n_layers = (config.get("text_config") or config).get("num_hidden_layers") or config.get("n_layer") or 1
    if not isinstance(n_layers, int):
        raise SimDiffError(f"its config.json says num_hidden_layers = {n_layers!r}, which is no number")
    return ModelSize(sum(counts.values()), n_layers, outside, n_bytes, here)


def _size_of_gguf(path: Path) -> ModelSize:
    from gguf import GGUFReader

    try:
        counts = {tensor.name: int(tensor.n_elements) for tensor in GGUFReader(path).tensors}
    except Exception as error:  # what a damaged file makes the reader stumble over has no common kind
        raise SimDiffError(f"{path.name} is no GGUF file that can be read: {one_line(error)}") from error
    layers = {found[1] for name in counts if (found := re.match(r"blk\.(\d+)\.", name))}
    outside = sum(count for name, count in counts.items() if not name.startswith("blk."))
    total = sum(counts.values())
    return ModelSize(total, len(layers) or 1, outside, 4 * total, True)  # unpacked, as float32 at most


# ---- a run's needs


def estimate_needs(run: NotebookRun, size: ModelSize, gpu_gib: float = 0.0) -> Needs:
    """What a notebook run asks for, on a machine whose GPUs hold `gpu_gib` GiB each (0: without GPUs)."""
    number, settings = run.notebook[:2], Settings(**run.settings)
    dtype = settings.speed_dtype if number == "05" else settings.dtype
    item = _ITEM_BYTES.get(dtype, 2 if gpu_gib else 4)  # "auto": bfloat16 is not sure without a GPU
    weights = size.n_parameters * item
    layer = (size.n_parameters - size.n_outside) / size.n_layers * item

    # gradients lie beside the weights, of all layers at once
    criteria = {settings.criterion, *settings.criteria, *settings.task_criteria}
    gradients = (
        weights if number in _CHOOSE and any("gradients" in find(name).sees for name in criteria) else 0
    )
    whole = _COPIES[number] * weights + gradients
    streams = number not in _WHOLE and not gradients
    least = size.n_outside * item + 2 * layer if streams else whole  # one layer runs, the next is read

    n_gpus = ceil(whole / (0.8 * gpu_gib * _GIB)) if gpu_gib else 0
    n_remove = 0 if settings.target else settings.n_remove  # what a target comes to is not known yet
    written = size.n_bytes * (1 - n_remove / size.n_layers) if number in ("03", "04") else 0
    return Needs(_PROCESS_GIB + whole / _GIB, 1 + least / _GIB, n_gpus, max(0, int(written)))


# ---- what would stop a grid


def check_grid(
    runs: Mapping[str, NotebookRun], there: set[str], folder: Path, here: bool, gpu_gib: float
) -> list[str]:
    """What would stop a grid, found before it starts: one sentence each, nothing where all is well.

    Args:
        runs: see `plan.plan_runs`.
        there: result files that need not be made again.
        folder: of the results.
        here: whether the notebooks run on this machine; else its memory says nothing.
        gpu_gib: memory of one GPU in GiB; 0: without.
    """
    todo = [run for name, run in runs.items() if name not in there]
    sizes, problems = {}, []
    for model in dict.fromkeys(run.settings["model"] for run in todo):
        try:
            sizes[model] = look_up(model)
        except SimDiffError as error:
            problems.append(str(error))
    known = [run for run in todo if run.settings["model"] in sizes]
    needs = [estimate_needs(run, sizes[run.settings["model"]], gpu_gib) for run in known]
    if here and not gpu_gib:
        problems += _too_large(known, needs)

    cache = Path(os.environ.get("HF_HOME") or assets.cache_dir())
    fetched = sum(size.n_bytes for size in sizes.values() if not size.here)
    for where, n_bytes, what in (
        (folder, sum(need.disk_bytes for need in needs), "what this grid writes"),
        (cache, fetched, "fetching this grid's models"),
    ):
        try:
            check_disk(where, n_bytes, what)
        except SimDiffError as error:
            problems.append(str(error))
    return problems


def _too_large(runs: list[NotebookRun], needs: list[Needs]) -> list[str]:
    """A sentence for each notebook and model that does not fit into this machine's memory, or its budget."""
    total, sentences = psutil.virtual_memory().total / _GIB, {}
    for run, need in zip(runs, needs, strict=True):
        model, budget = run.settings["model"], run.settings.get("memory_gib") or total
        if need.least_gib > budget:
            sentences[run.notebook, model] = (
                f"{run.notebook} of {model} needs about {need.least_gib:.0f} GiB of memory and has "
                f"{budget:.0f}: take a machine with more, or leave it out."
            )
    return list(sentences.values())
