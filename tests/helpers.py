"""What the tests share: tiny random models of many families, a tiny tokenizer, models built by hand. No
network."""

import copy
import gzip
import json
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from simdiff_utils.engine.load import decoder_layers

VOCAB_SIZE = 97
N_LAYERS = 6
SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
# without special tokens, for families that want few words
TINY = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
GROUPED = SIZES | dict(num_key_value_heads=2)
MIXED = ["sliding_attention", "sliding_attention", "full_attention"] * 2
EXPERTS = GROUPED | dict(
    head_dim=8, num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
)
# Each stands for something of its own; falcon's layers return a tuple, all others' a tensor (transformers
# 5.23).
FAMILIES = {
    "llama": GROUPED | dict(model_type="llama"),
    "llama-tied": GROUPED | dict(model_type="llama", tie_word_embeddings=True),
    "qwen2": GROUPED | dict(model_type="qwen2"),
    "gemma3": GROUPED | dict(model_type="gemma3_text", head_dim=8, sliding_window=8, layer_types=MIXED),
    "gpt2": dict(
        model_type="gpt2",
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=N_LAYERS,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mistral": GROUPED | dict(model_type="mistral", sliding_window=8),
    "gpt-neox": SIZES | dict(model_type="gpt_neox"),
    "phi3": GROUPED | dict(model_type="phi3"),
    "olmo2": GROUPED | dict(model_type="olmo2"),
    "falcon": SIZES | dict(model_type="falcon"),
    "qwen3": GROUPED | dict(model_type="qwen3", head_dim=8),
    "gemma2": GROUPED
    | dict(
        model_type="gemma2",
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
        final_logit_softcapping=30.0,
        layer_types=MIXED,
    ),
    "granite": GROUPED | dict(model_type="granite", residual_multiplier=0.7, logits_scaling=0.5),
    "cohere2": GROUPED | dict(model_type="cohere2", sliding_window=8, layer_types=MIXED, logit_scale=0.5),
    "smollm3": GROUPED | dict(model_type="smollm3", no_rope_layers=[1, 1, 0, 1, 0, 1]),
    "stablelm": GROUPED | dict(model_type="stablelm"),
    "starcoder2": GROUPED | dict(model_type="starcoder2", sliding_window=8),
    "opt": dict(
        model_type="opt",
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gpt-neo": dict(
        model_type="gpt_neo",
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_layers=N_LAYERS,
        num_heads=4,
        attention_types=[[["global", "local"], 3]],
        window_size=8,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "mixtral": EXPERTS | dict(model_type="mixtral"),
    "qwen3-moe": EXPERTS | dict(model_type="qwen3_moe", mlp_only_layers=[1, 4], decoder_sparse_step=1),
    "gpt-oss": EXPERTS
    | dict(model_type="gpt_oss", sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 3),
}


SETS = [frozenset(s) for s in ({0}, {5}, {0, 2, 5}, {2, 3, 4})]  # first, last, scattered, contiguous


@torch.inference_mode()
def logits_of(model, blocks):
    """Logits of the model's own forward, without a cache."""
    return model(input_ids=blocks, use_cache=False).logits.clone()


def build_by_hand(model, removed):
    """A new model of the same class with only the kept layers: config and weights cut here, not by our
    code."""
    kept = [i for i in range(N_LAYERS) if i not in removed]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    for name in ("layer_types", "no_rope_layers", "attention_layers"):
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[i] for i in kept])
    if getattr(config, "mlp_only_layers", None):
        config.mlp_only_layers = [kept.index(i) for i in config.mlp_only_layers if i in kept]
    weights = {}
    for name, tensor in model.state_dict().items():
        found = re.fullmatch(r"(.*\.(?:layers|h)\.)(\d+)(\..*)", name)
        if not found:
            weights[name] = tensor
        elif int(found[2]) in kept:
            weights[f"{found[1]}{kept.index(int(found[2]))}{found[3]}"] = tensor
    built = type(model)(config).eval()
    built.load_state_dict(weights)
    return built


def merge_by_hand(model, merges):
    """A copy merged as LaCo's released code does: to each matrix of a layer that stays it adds, one folded
    layer after another, that layer's matrix less what is there by then."""
    merged = copy.deepcopy(model)
    layers = decoder_layers(merged)
    with torch.no_grad():
        for stays, folded in merges:
            for name, theta in layers[stays].named_parameters():
                if theta.dim() == 1 or name.endswith("bias"):
                    continue
                merged_into = theta.double()
                for i in folded:
                    merged_into = merged_into + (layers[i].get_parameter(name).double() - merged_into)
                theta.copy_(merged_into)
    return merged


def build_tiny(name, seed=0, **changes):
    """A random model of a family (with changes to its config) in eval mode, the same on every call.

    Weights are large, norms and biases random too, so that every layer changes the logits by much: a
    neighbour removed instead, a bias forgotten or a norm too many does not pass unseen.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(FAMILIES[name] | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 0.2
            parameter.copy_(parameter + noise if parameter.dim() == 1 else noise)
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 97 words: `w3` is token 3."""
    special = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    core = Tokenizer(
        models.WordLevel(special | {f"w{i}": i for i in range(3, VOCAB_SIZE)}, unk_token="<pad>")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(f"w{rng.randrange(3, 97)}" for _ in range(rng.randint(low, high)))
