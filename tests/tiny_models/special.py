"""Models whose block fits no common pattern: each needs code of its own in moe_lens.families."""

from __future__ import annotations

from tiny_models.sizes import (
    ACTIVE,
    DENSE,
    EXPERT_WIDTH,
    EXPERTS,
    EXPERTS_MIXTRAL,
    HIDDEN,
    LATENT_ATTENTION,
    SHAPE,
    VOCAB,
    Config,
    changed,
    without,
)

LONGCAT: Config = dict(
    LATENT_ATTENTION,
    model_type="longcat_flash",
    attention_method="MLA",
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    ffn_hidden_size=DENSE,
    expert_ffn_hidden_size=EXPERT_WIDTH,
    num_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    n_routed_experts=EXPERTS,
    moe_topk=ACTIVE,
    zero_expert_num=4,
    zero_expert_type="identity",
    routed_scaling_factor=6.0,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
    attention_bias=False,
)

SPECIAL: dict[str, Config] = {
    # The experts are a Python list, called token by token.
    "dbrx": dict(
        model_type="dbrx",
        vocab_size=VOCAB,
        d_model=HIDDEN,
        n_layers=2,
        n_heads=4,
        ffn_config=dict(ffn_hidden_size=EXPERT_WIDTH, moe_num_experts=EXPERTS, moe_top_k=ACTIVE),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
    ),
    # One expert per token, and its weight scales the input instead of the output.
    "llama4": dict(
        model_type="llama4",
        text_config=dict(
            SHAPE,
            model_type="llama4_text",
            num_hidden_layers=4,
            intermediate_size=EXPERT_WIDTH,
            intermediate_size_mlp=DENSE,
            head_dim=16,
            attention_bias=False,
            attention_chunk_size=32,
            interleave_moe_layer_step=1,
            num_local_experts=EXPERTS,
            num_experts_per_tok=1,
            rope_scaling=None,
            use_qk_norm=True,
        ),
    ),
    # Router columns beyond the experts stand for the identity.
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": changed(
        without(LONGCAT, "attention_method"),
        model_type="longcat_flash_ngram",
        ngram_vocab_size_ratio=1,
        emb_neighbor_num=3,
        emb_split_num=2,
    ),
    # Sparsemixer: one arg-max after another, each with its own softmax.
    "phimoe": dict(
        EXPERTS_MIXTRAL,
        model_type="phimoe",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        original_max_position_embeddings=128,
        router_jitter_noise=0.01,
        rope_scaling=dict(
            type="longrope",
            short_factor=[1.0] * 8,
            long_factor=[1.0] * 8,
            long_mscale=1.2,
            short_mscale=1.2,
            original_max_position_embeddings=128,
        ),
    ),
}
