"""How LoRA adapters are trained: recipes, the published one among them, and PEFT's settings for a model."""

from dataclasses import dataclass, replace

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from simdiff_utils import SimDiffError
from simdiff_utils.engine.load import decoder_layers

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
    """PEFT's settings; every linear layer of the decoder where the model has other names than the published
    ones.

    Neither way touches the embedding or the head: they stay as they are, and no gradient is kept for them.

    Raises:
        SimDiffError: the recipe names modules of its own choice that the decoder layers do not have.
    """
    named = decoder_layers(model).named_modules()
    linear = {name.rpartition(".")[2] for name, module in named if isinstance(module, (nn.Linear, Conv1D))}
    unknown = sorted(set(recipe.target_modules) - linear)
    if unknown and recipe.target_modules != PROJECTIONS:
        raise SimDiffError(
            f"target_modules names {', '.join(unknown)}, and the layers of {type(model).__name__} have "
            f"{', '.join(sorted(linear))}; leave it empty for all of them."
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.dropout,
        target_modules="all-linear" if unknown else list(recipe.target_modules),
        # GPT-2 stores W transposed
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
