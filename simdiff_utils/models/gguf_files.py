"""GGUF files become plain checkpoints: dequantised tensor by tensor into shards, never whole in memory."""

import re
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
    read_field,
)

from simdiff_utils import require
from simdiff_utils.engine.headers import refuse_pointer
from simdiff_utils.engine.weights import skeleton
from simdiff_utils.engine.whole import check_whole, told_in_a_sentence
from simdiff_utils.files import check_disk, write_json, write_whole

_FLOAT32_BYTES = 2**30  # a model of more bytes in float32 is kept in bfloat16, see docs/architecture.md
_SHARD_BYTES = 2**29  # of a model in bfloat16; one in float32 is a single file


def convert_gguf(gguf: Path, target: Path) -> Path:
    """Dequantise a GGUF file into a checkpoint folder that appears whole or not at all.

    float32 where the model then takes at most 1 GiB, else bfloat16. transformers reads the config and the
    tokenizer, and says what becomes of each tensor; a shard and a tensor or two are in memory at once (of
    mixtures, also all experts).

    Raises:
        SimDiffError: it is no whole GGUF file that transformers can read, or the disk cannot hold it.
    """
    refuse_pointer(gguf)
    if part := re.search(r"-(\d{5})-of-(\d{5})\.gguf$", gguf.name):
        require(
            part[2] == "00001",
            f"{gguf.name} is one of {int(part[2])} parts: join them with `llama-gguf-split --merge` and name "
            "the file that it writes.",
        )
    with told_in_a_sentence(f"transformers cannot load the GGUF file {gguf.name}"):
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        n_bytes = 4 * sum(parameter.numel() for parameter in skeleton(config).parameters())
        dtype = torch.float32 if n_bytes <= _FLOAT32_BYTES else torch.bfloat16
        model = skeleton(config, dtype)
    check_disk(target, n_bytes * dtype.itemsize // 4, f"the checkpoint of {gguf.name}")
    with write_whole(target, replace=False) as partial:
        partial.mkdir()
        with told_in_a_sentence(f"transformers cannot load the GGUF file {gguf.name}"):
            found = _write_tensors(gguf, model, dtype, partial)
        wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
        info = {
            "missing_keys": wanted.keys() - found.keys(),
            "mismatched_keys": [name for name in wanted.keys() & found.keys() if wanted[name] != found[name]],
            "unexpected_keys": found.keys() - model.state_dict().keys(),
        }
        check_whole(model, info, f"the GGUF file {gguf.name}")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(partial)
        model.generation_config.save_pretrained(partial)
        with told_in_a_sentence(f"transformers cannot read the tokenizer in {gguf.name}"):
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    return target


def _write_tensors(
    gguf: Path, model: torch.nn.Module, dtype: torch.dtype, folder: Path
) -> dict[str, torch.Size]:
    """Write all tensors of a GGUF file by the names that the model has for them; their shapes."""
    parsed = load_gguf_checkpoint(str(gguf)) | {"tensors": {}}
    reader = GGUFReader(gguf)
    kind = TENSOR_PROCESSORS.get(read_field(reader, "general.architecture")[0], TensorProcessor)
    processor = kind(config=parsed["config"])
    names = get_gguf_hf_weights_map(model, processor)
    shards = _Shards(folder, _SHARD_BYTES if dtype == torch.bfloat16 else _FLOAT32_BYTES)
    for tensor in tqdm(reader.tensors, desc=f"dequantise {gguf.name}", unit="tensor", leave=False):
        n_gathered = len(parsed["tensors"])
        made = processor.process(
            weights=dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters=parsed,
        )
        if made.name in names:
            shards.add(
                names[made.name], torch.from_numpy(np.require(made.weights, requirements="CW")).to(dtype)
            )
        else:  # an expert's part, which is gathered with others; else nothing that the model would run
            require(
                len(parsed["tensors"]) > n_gathered or "_exps" in tensor.name,
                f"the GGUF file {gguf.name} holds {tensor.name}, which transformers does not read: name a "
                "Hugging Face folder of the model.",
            )
        del made  # or a large one would stand beside the next
    for name, gathered in parsed["tensors"].items():
        shards.add(name, gathered.to(dtype))
    shards.close()
    return shards.shapes


class _Shards:
    """Safetensors files of a checkpoint, each written as soon as it is full."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.shapes: dict[str, torch.Size] = {}
        self._folder, self._limit, self._files, self._open = folder, limit, [], {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor, in memory until its shard is full."""
        if sum(t.nbytes for t in self._open.values()) + tensor.nbytes > self._limit:
            self._write()
        self._open[name], self.shapes[name] = tensor.contiguous(), tensor.shape

    def close(self) -> None:
        """Write what is left, and the index where there are several files."""
        self._write()
        if len(self._files) == 1:
            (self._folder / self._files[0][0]).rename(self._folder / "model.safetensors")
            return
        index, total = {}, 0
        for n, (file, names, n_bytes) in enumerate(self._files, start=1):
            final = f"model-{n:05}-of-{len(self._files):05}.safetensors"
            (self._folder / file).rename(self._folder / final)
            index |= dict.fromkeys(names, final)
            total += n_bytes
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        write_json(self._folder / "model.safetensors.index.json", content)

    def _write(self) -> None:
        if self._open:
            file = f"shard-{len(self._files)}"
            save_file(self._open, self._folder / file, metadata={"format": "pt"})
            self._files.append((file, list(self._open), sum(t.nbytes for t in self._open.values())))
            self._open = {}
