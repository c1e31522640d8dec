"""How LoRA adapters are trained: recipes, the published one among them, and PEFT's settings for a model."""

from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from simdiff_utils import SimDiffError
from simdiff_utils.engine.load import decoder_layers, input_device

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """How the adapters are trained; lengths in tokens, batch sizes in sequences."""

    data: str  # "text": the train split of the run's own text, else see `training_rows.load_rows`
    learning_rate: float
    batch_size: int  # a step sees this many sequences ...
    micro_batch_size: int  # ... this many at a time, which is what memory has to hold
    dropout: float
    max_steps: int = 0  # 0: whole epochs
    epochs: float = 1.0
    max_length: int = 256
    rank: int = 8
    lora_alpha: int = 16
    target_modules: tuple[str, ...] = PROJECTIONS
    n_validation: int = 2000
    n_evaluations: int = 10  # during training, evenly spread; after each but the last a checkpoint is kept
    gradient_checkpointing: bool = False
    report_to: str = "none"


PRESETS = {
    # On a CPU micro-batches of 2 beat 4 and 8, and dropout's random masks alone cost a tenth of a step.
    "demo": Recipe(
        data="text", learning_rate=1e-3, batch_size=4, micro_batch_size=2, dropout=0.0, max_steps=8
    ),
    # SimDiff, Table 6. That table gives a learning rate of 0.003, the text beside it 3e-4: they disagree, and
    # 3e-4 is the usual value for LoRA on Alpaca with AdamW, so it is the one taken here.
    "published": Recipe(
        data="tatsu-lab/alpaca", learning_rate=3e-4, batch_size=32, micro_batch_size=4, dropout=0.05
    ),
}


def recipe_for(preset: str, **given) -> Recipe:
    """The preset's recipe with the values given in place of its own; 0 and empty ones keep the preset's.

    A short training is evaluated less often than `n_evaluations`: not before every fourth step.
    """
    if preset not in PRESETS:
        raise SimDiffError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}.")
    recipe = replace(PRESETS[preset], **{name: value for name, value in given.items() if value})
    most = max(recipe.max_steps // 4, 1) if recipe.max_steps else recipe.n_evaluations
    return replace(recipe, n_evaluations=min(recipe.n_evaluations, most))


def lora_config(model: PreTrainedModel, recipe: Recipe) -> LoraConfig:
    """PEFT's settings; every projection of the decoder layers where the model has other names than the
    published ones.

    Nothing else is touched, neither embedding nor head nor a tower, and no gradient is kept for it. Left out
    are routers, whose choice of experts is no projection, and what a family's own kernels multiply without
    asking the module (a Mamba mixer's out_proj), which PEFT refuses.

    Raises:
        SimDiffError: the recipe names modules of its own choice that the decoder layers do not have.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.dropout,
        # GPT-2 stores W transposed
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    found = {
        name: paths for name, paths in _projections(model).items() if _takes_adapters(config, model, name)
    }
    names = recipe.target_modules
    unknown = sorted(set(names) - set(found))
    if unknown and names != PROJECTIONS:
        raise SimDiffError(
            f"target_modules names {', '.join(unknown)}, and the layers of {type(model).__name__} have "
            f"{', '.join(sorted(found))}; leave it empty for all of them."
        )
    config.target_modules = {path for name in (found if unknown else names) for path in found[name]}
    return config


@torch.inference_mode()
def _projections(model: PreTrainedModel) -> dict[str, list[str]]:
    """Paths of the matrices in the decoder layers that the model itself asks for products, by the last part
    of their names.

    Tried on a short text. A router, a class below Linear in some families, returns its choice as well; and a
    mixer may read a matrix by itself, so that an adapter on it would never learn.
    """
    inside = set(decoder_layers(model).modules())
    found: dict[str, list[str]] = {}
    products: dict[str, bool] = {}
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if module in inside and isinstance(module, (nn.Linear, Conv1D)):
                name = path.rpartition(".")[2]
                found.setdefault(name, []).append(path)

                def note(_module: nn.Module, _args: tuple, output: object, name: str = name) -> None:
                    products[name] = products.get(name, True) and isinstance(output, Tensor)

                hooks.callback(module.register_forward_hook(note).remove)
        model(input_ids=torch.tensor([[1, 2, 3, 4]], device=input_device(model)), use_cache=False)
    return {name: paths for name, paths in found.items() if products.get(name)}


def _takes_adapters(config: LoraConfig, model: PreTrainedModel, name: str) -> bool:
    """Whether PEFT can put an adapter on the family's modules of this name."""
    try:
        _check_lora_target_modules_mamba(config, model, name)
    except ValueError:
        return False
    return True
