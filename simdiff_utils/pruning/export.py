"""The exporter: a pruned checkpoint beside its final place, tensor by tensor, with all that makes it
usable."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from simdiff_utils import SimDiffError, one_line
from simdiff_utils.criterion.cuts import Cuts
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.headers import StoredTensor
from simdiff_utils.engine.load import RUN_OPTIONS, decoder_layers, load_model, read_config
from simdiff_utils.engine.stored import StoredWeights
from simdiff_utils.engine.surgery import keep, layer_kinds, plan_cut
from simdiff_utils.engine.weights import skeleton
from simdiff_utils.files import check_disk, read_json, write_json, write_whole
from simdiff_utils.models.record import extend_record
from simdiff_utils.pruning.card import write_companions
from simdiff_utils.pruning.other_tools import write_other_tools

_SHARD_BYTES = 5 * 10**9


def export_pruned(source: Path, removed: frozenset[int], target: Path, facts: dict) -> None:
    """Copy a checkpoint without some of its layers, byte for byte, into a folder that plain `transformers`
    loads.

    The tensors go from file to file: the model is never in memory, and keeps the dtype it is stored in.

    Args:
        source: the dense checkpoint, in safetensors.
        removed: 0-based indices in it.
        target: the new folder; it appears whole or not at all.
        facts: for `pruning.json` and the model card, see `card._write_card`.

    Raises:
        SimDiffError: `target` exists, the disk cannot hold it, or the family cannot lose these layers.
    """
    refuse_existing(target, overwrite=False)
    model = skeleton(read_config(source))
    n_layers = len(decoder_layers(model))
    kept = keep(removed, n_layers)
    config = plan_cut(model, removed)[0]
    stored = StoredWeights(source, model)
    if stored.behind:
        _forget_extra_layers(config)
    tensors = _pick_tensors(stored, kept, _tied_copies(model, stored))
    check_disk(target, sum(t.n_bytes for t in tensors.values()), f"the checkpoint {target.name}")
    with write_whole(target) as partial:
        partial.mkdir()
        _write_config(source, model.config, config, partial)
        _write_shards(tensors, partial)
        cut = {"n_layers": n_layers, "removed": sorted(removed), "kept": kept}
        cut["keeps_pattern"] = Cuts(layer_kinds(model.config)).allows(removed)
        facts = extend_record(source, facts | cut)
        write_companions(source, partial, facts)
        write_other_tools(partial, facts, str(config.dtype or "float32").removeprefix("torch."))


@torch.inference_mode()
def export_recovered(
    model: PreTrainedModel, pruned: Path, target: Path, measured: dict, tokens: Tensor
) -> None:
    """Write a pruned model whose weights were changed since, and open it again.

    What goes with it comes from the checkpoint it was.

    Args:
        measured: {words: value} for `pruning.json` and the model card, after those of an earlier recovery.
        tokens: ids [1, seq_len] to run both on.

    Raises:
        SimDiffError: what was written is not whole, or gives other logits than the model.
    """
    facts = read_json(pruned / "pruning.json")
    model.eval().save_pretrained(target)
    _write_config(pruned, read_config(pruned), model.config, target)
    write_companions(pruned, target, facts | {"recovery": facts.get("recovery", {}) | measured})
    again = load_model(target, str(model.dtype).removeprefix("torch."))
    expected, logits = (m(input_ids=tokens.to(m.device), use_cache=False).logits for m in (model, again))
    _compare(expected, logits, f"{type(model).__name__} is written otherwise than it is run")


def restate_recovery(source: Path, target: Path, measured: dict) -> None:
    """A healed checkpoint once more, with more in its card; both share the weights on disk where they can.

    Args:
        measured: as of `export_recovered`.
    """
    target.mkdir()
    for file in (source / "config.json", *source.glob("*.safetensors*")):
        try:
            (target / file.name).hardlink_to(file)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, target / file.name)
    facts = read_json(source / "pruning.json")
    write_companions(source, target, facts | {"recovery": facts["recovery"] | measured})


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Refuse to write where something is, unless asked to."""
    if target.exists() and not overwrite:
        place = target.parent.name or target.parent
        raise SimDiffError(
            f"{target.name} exists already in {place}: name another folder, or set overwrite to true."
        )


@torch.inference_mode()
def verify_export(dense: Decoder, removed: frozenset[int], exported: Decoder, tokens: Tensor) -> float:
    """Largest difference between the logits of an exported checkpoint and of the dense model without these
    layers.

    Args:
        exported: the checkpoint, opened again; where it fits in memory its own plain forward is asked.
        tokens: ids [1, seq_len] to run both on.

    Raises:
        SimDiffError: the logits differ, or transformers cannot run what is left.
    """
    expected = next(dense.logits(states) for _, _, states in dense.run(tokens, 1, (removed,)))
    try:
        if exported.streamed:
            logits = next(exported.logits(states) for _, _, states in exported.run(tokens, 1))
        else:
            tokens = tokens.to(exported.model.device)
            logits = exported.model(input_ids=tokens, use_cache=True).logits
            short = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=2, do_sample=False)
            exported.model.generate(tokens, pad_token_id=0, **short)  # with the cache
    except (ValueError, RuntimeError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise SimDiffError(
            f"{type(dense.model).__name__} does not run without layers {sorted(removed)}: {one_line(error)}"
        ) from error
    return _compare(expected, logits, f"{type(dense.model).__name__} cannot lose layers {sorted(removed)}")


def _compare(expected: Tensor, logits: Tensor, why: str) -> float:
    difference = (logits - expected.to(logits.device)).abs().max().item()
    if not difference <= 1e-4 * expected.abs().max().item():  # neither where it is no number
        raise SimDiffError(
            "the exported checkpoint gives other logits than the model it comes from (largest difference "
            f"{difference:.2g}): {why}."
        )
    return difference


def _tied_copies(model: PreTrainedModel, stored: StoredWeights) -> set[str]:
    """Tensors that a file holds a second time although the config ties them: the same bytes under both
    names."""
    copies = set()
    for target, origin in getattr(model, "all_tied_weights_keys", {}).items():
        if target in stored.rest and origin in stored.rest:
            pieces = zip(_pieces(stored.tensors[target]), _pieces(stored.tensors[origin]), strict=False)
            if all(one == other for one, other in pieces):  # else transformers does not tie them either
                copies.add(target)
    return copies


def _write_config(source: Path, before: PretrainedConfig, after: PretrainedConfig, folder: Path) -> None:
    """The source's own config.json with what has changed since, so that whatever reads the one reads the
    other: transformers 4 for one, which passes over keys of transformers 5 and takes its own defaults."""
    old, new = map(_values, (before, after))
    content = read_json(source / "config.json")
    _transfer(content, old, new)
    content |= {name: value for name, value in RUN_OPTIONS.items() if name in content}
    write_json(folder / "config.json", content)
    if _values(read_config(folder)) != new:  # its keys cannot say so
        after.save_pretrained(folder)


def _values(config: PretrainedConfig) -> dict:
    """All that a config says, in JSON's types; not where it was read."""
    values = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if name != "_name_or_path"}


def _transfer(content: dict, old: dict, new: dict) -> None:
    """Make in a config.json the changes between two readings of it."""
    for name, value in new.items():
        parts = content.get(name), old.get(name), value
        if all(isinstance(part, dict) for part in parts):
            _transfer(*parts)
        elif name not in old or old[name] != value:
            content["torch_dtype" if name == "dtype" and "torch_dtype" in content else name] = value


def _forget_extra_layers(config: PretrainedConfig) -> None:
    """Let a config count no layers of multi-token prediction, which stand behind the last and are not copied:
    no causal language model of transformers runs them."""
    for part in (config, config.get_text_config()):
        for name in part.to_dict():
            if re.search("nextn|mtp", name) and isinstance(getattr(part, name, None), int):
                setattr(part, name, 0)


def _pick_tensors(stored: StoredWeights, kept: list[int], left_out: set[str]) -> dict[str, StoredTensor]:
    """What the new checkpoint holds, by new name, in the order of the old files."""
    new_idx = {old: new for new, old in enumerate(kept)}
    wanted = {*stored.rest, *(name for layer_idx in kept for name in stored.layers[layer_idx])} - left_out
    return {stored.rename(name, new_idx): t for name, t in stored.tensors.items() if name in wanted}


def _write_shards(tensors: dict[str, StoredTensor], folder: Path) -> None:
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.n_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_SHARD_BYTES,
    )
    for file, names in plan.filename_to_tensors.items():
        _copy_tensors({name: tensors[name] for name in names}, folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _copy_tensors(shard: dict[str, StoredTensor], file: Path) -> None:
    """A safetensors file of tensors that lie in others: a header (length, JSON padded to 8 bytes), then their
    bytes."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in shard.items():
        end = offset + tensor.n_bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in shard.values():
            for piece in _pieces(tensor):
                out.write(piece)


def _pieces(tensor: StoredTensor) -> Iterator[bytes]:
    """A tensor's bytes, 16 MB at a time."""
    with tensor.file.open("rb") as source:
        source.seek(tensor.start)
        left = tensor.n_bytes
        while left:
            piece = source.read(min(left, 1 << 24))
            if not piece:
                raise SimDiffError(f"{tensor.file.name} ended while it was copied; fetch it again.")
            yield piece
            left -= len(piece)
