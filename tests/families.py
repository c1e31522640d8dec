"""Tiny configs of many more families than those of `tests.helpers`, and of models with a vision tower."""

from tests.helpers import GROUPED, MIXED, N_LAYERS, VOCAB_SIZE

HEADS = GROUPED | dict(head_dim=8)
EXPERTS = HEADS | dict(
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
)
GROUPS = dict(n_group=1, topk_group=1, n_shared_experts=1)
LATENT = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
LATENT |= GROUPS | dict(num_key_value_heads=4, moe_intermediate_size=16, first_k_dense_replace=0)
STATE = dict(mamba_n_heads=8, mamba_d_state=8, mamba_d_head=8, mamba_n_groups=1, mamba_chunk_size=8)
BARE = dict(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=N_LAYERS, bos_token_id=1, eos_token_id=2)
GPT = dict(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=N_LAYERS, n_head=4, n_positions=64)
LINEAR = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8
)
PAIRS = dict(layer_types=["conv", "full_attention"] * 3)
OTHERS = {
    "gemma": HEADS,
    "gptj": GPT | dict(rotary_dim=4),
    "bloom": dict(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=N_LAYERS, n_head=4),
    "mpt": dict(vocab_size=VOCAB_SIZE, d_model=32, n_heads=4, n_layers=N_LAYERS, max_seq_len=64),
    "gpt_bigcode": GPT,
    "phi": GROUPED,
    "olmo3": GROUPED | dict(sliding_window=8),
    "cohere": GROUPED,
    "glm4": HEADS,
    "nemotron": GROUPED,
    "exaone4": HEADS | dict(sliding_window=8, layer_types=MIXED),
    "ernie4_5": HEADS,
    "seed_oss": HEADS,
    "arcee": GROUPED,
    "persimmon": GROUPED,
    "biogpt": GROUPED,
    "helium": HEADS,
    "doge": HEADS,
    "openai-gpt": GPT,
    "deepseek_v2": GROUPED | LATENT | dict(topk_method="greedy", n_routed_experts=4, num_experts_per_tok=2),
    "deepseek_v3": GROUPED | LATENT | dict(n_routed_experts=4, num_experts_per_tok=2),
    "glm4_moe": EXPERTS | GROUPS | dict(first_k_dense_replace=1),
    "granitemoe": EXPERTS,
    "olmoe": EXPERTS,
    "phimoe": EXPERTS,
    "lfm2": GROUPED | PAIRS | dict(conv_L_cache=3),
    "recurrent_gemma": GROUPED | dict(lru_width=32, attention_window_size=16),  # goes in threes
    "qwen3_next": EXPERTS
    | LINEAR
    | dict(
        layer_types=(["linear_attention"] * 2 + ["full_attention"]) * 2,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[],
    ),
    "mamba": BARE | dict(state_size=8),
    "falcon_mamba": BARE | dict(state_size=8),
    "mamba2": BARE | dict(state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "falcon_h1": HEADS | STATE | dict(mamba_d_ssm=64),
    "granitemoehybrid": EXPERTS
    | STATE
    | dict(layer_types=["mamba", "mamba", "attention"] * 2, shared_intermediate_size=32),
    "bamba": GROUPED | STATE | dict(attn_layer_indices=[2, 5]),
    "nemotron_h": GROUPED
    | dict(mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=8)
    | dict(hybrid_override_pattern="M-M*-M", n_routed_experts=4, num_experts_per_tok=2),
}
TEXT = HEADS | dict(num_hidden_layers=N_LAYERS)
SEEN = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, image_size=28, patch_size=14)
TURNED = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]})
# of a vision tower's layers as many as the text has left, and as it has before
WRAPPERS = {
    "gemma3": dict(
        text_config=TEXT | dict(model_type="gemma3_text", sliding_window=8, layer_types=MIXED),
        vision_config=SEEN | dict(model_type="siglip_vision_model", num_hidden_layers=N_LAYERS - 2),
        mm_tokens_per_image=4,
        image_token_index=92,
    ),
    "llava": dict(
        text_config=TEXT | dict(model_type="llama"),
        vision_config=SEEN | dict(model_type="clip_vision_model", num_hidden_layers=N_LAYERS),
        image_token_index=92,
    ),
    "mistral3": dict(
        text_config=TEXT | dict(model_type="mistral"),
        vision_config=SEEN | dict(model_type="pixtral", num_hidden_layers=2),
        image_token_index=92,
    ),
    "qwen2_vl": dict(
        text_config=TEXT | dict(model_type="qwen2_vl_text") | TURNED,
        vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, patch_size=14),
    ),
    "qwen3_5": dict(
        text_config=TEXT
        | LINEAR
        | dict(model_type="qwen3_5_text", layer_types=(["linear_attention"] * 2 + ["full_attention"]) * 2),
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=14)
        | dict(out_hidden_size=32),
    ),
}
