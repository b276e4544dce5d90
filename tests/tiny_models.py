"""Tiny random models of every supported family, in fp32 and evaluation mode.

Two blocks of width 32 and a vocabulary of 64; every parameter is random (biases and norms too, so
that a bias that gets lost is noticed). Between them the families cover tied and untied embeddings,
grouped queries, parallel attention, sliding-window and full attention in one model, projections
outside the blocks (OPT), dense and sparse blocks in one model (Qwen3-MoE) and shared experts.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.granitemoe import modeling_granitemoe

from pyprune.calibration.batches import as_token_set
from pyprune.calibration.tokens import TokenSet

VOCAB, HIDDEN, BLOCKS = 64, 32, 2

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **_IDS,
}
_GATED = {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 2}
_GEMMA = {
    **_GATED,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
}
_QWEN_MOE = {
    **_GATED,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_GATED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {**_GATED, "sliding_window": 8, "tie_word_embeddings": False},
    "qwen2": {**_GATED, "tie_word_embeddings": True},
    "qwen3": {**_GATED, "head_dim": 8, "tie_word_embeddings": True},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi": {**_COMMON, "intermediate_size": 64, "tie_word_embeddings": False},
    "opt": {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 16, "tie_word_embeddings": True},
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": HIDDEN,
        "n_layer": BLOCKS,
        "n_head": 4,
        "n_inner": 64,
        "n_positions": 128,
        "tie_word_embeddings": True,
        **_IDS,
    },
    "gpt_neox": {**_COMMON, "intermediate_size": 64, "tie_word_embeddings": False},
    "bloom": {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "n_layer": BLOCKS,
        "n_head": 4,
        "tie_word_embeddings": True,
        **_IDS,
    },
    "falcon": {
        **_COMMON,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "alibi": False,
        "bias": True,
        "tie_word_embeddings": True,
    },
    "mixtral": {
        **_GATED,
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "qwen2_moe": {
        **_QWEN_MOE,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 1,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        **_QWEN_MOE,
        "head_dim": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "tie_word_embeddings": True,
    },
}
FAMILIES = tuple(CONFIGS)
# Families that the generic code takes, for tests of what is special about their norms and heads.
_GPTJ = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": BLOCKS,
    "n_head": 4,
    "rotary_dim": 4,
    "n_positions": 128,
    **_IDS,
}
MORE: dict[str, dict[str, Any]] = {
    "gemma": {**_GATED, "head_dim": 16, "tie_word_embeddings": True},
    "granite": {
        **_GATED,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    },
    "glm": {**_GATED, "head_dim": 8, "tie_word_embeddings": False},
    "phi3": {**_GATED, "tie_word_embeddings": False},
    "smollm3": {**_GATED, "no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "cohere": {**_GATED, "use_qk_norm": True, "tie_word_embeddings": True},
    "cohere2": {
        **_GATED,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "starcoder2": {**_GATED, "tie_word_embeddings": True},
    "nemotron": {**_GATED, "head_dim": 8, "tie_word_embeddings": False},
    "olmo": {**_GATED, "tie_word_embeddings": False},
    "olmo2": {**_GATED, "tie_word_embeddings": False},
    "stablelm": {**_GATED, "use_qkv_bias": True, "tie_word_embeddings": False},
    "gptj": _GPTJ,
    "codegen": _GPTJ,
}
MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
_MOE = {
    **_GATED,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
_DEEPSEEK = {
    **_GATED,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "tie_word_embeddings": False,
}
# Every way in which transformers stores and runs fused experts, and what else is special about
# them: one tensor for each expert in the checkpoint or one for all; transposed, with biases and
# interleaved gates (GPT-OSS); without a gate (Nemotron-H); given all tokens (Llama 4); renamed
# routers (PhiMoE); attentions with a small latent (DeepSeek) and with an indexer; a hybrid.
MIXTURES: dict[str, dict[str, Any]] = {
    "olmoe": _MOE,
    "phimoe": _MOE,
    "granitemoe": _MOE,
    "gpt_oss": {**_MOE, "head_dim": 8, "sliding_window": 8},
    "llama4_text": {**_MOE, "head_dim": 8, "intermediate_size_mlp": 32},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v32": {**_DEEPSEEK, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "qwen3_next": {
        **_MOE,
        "head_dim": 8,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "nemotron_h": {
        **_COMMON,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layers_block_type": ["attention", "moe"],
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
}
# transformers 5.6 has no DeepSeek-V3.2, and stores GraniteMoE's experts in a way of its own.
if "deepseek_v32" not in CONFIG_MAPPING:
    del MIXTURES["deepseek_v32"]
if not hasattr(modeling_granitemoe, "GraniteMoeExperts"):
    del MIXTURES["granitemoe"]
MORE |= MIXTURES
# Hybrids: state space or convolution, and attention.
MORE["jamba"] = {
    **_MOE,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
MORE["lfm2_moe"] = {**_MOE, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}
# Of its four experts two give back what they get; one layer has two attentions and two MLPs.
MORE["longcat_flash"] = {
    **_DEEPSEEK,
    "num_layers": 1,
    "head_dim": 8,
    "ffn_hidden_size": 32,
    "expert_ffn_hidden_size": 16,
    "zero_expert_num": 2,
    "moe_topk": 2,
}
# A matrix of its attention runs twice: on all tokens, and on a zero before the first of them.
if "zaya" in CONFIG_MAPPING:  # not in transformers 5.6
    MORE["zaya"] = {**_MOE, "head_dim": 8, "num_experts_per_tok": 1}


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random causal language model of `family` (a key of CONFIGS or MORE); `overrides` go to its
    configuration, e.g. `num_hidden_layers=3` or `tie_word_embeddings=True`."""
    own = CONFIGS[family] if family in CONFIGS else MORE[family]
    config = AutoConfig.for_model(family, **{**own, **overrides})
    model = AutoModelForCausalLM.from_config(config)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0.0, 0.2, generator=gen)
            else:
                # A norm's scale is near one, except where the model adds one itself (Gemma).
                centre = 1.0 if name.endswith("weight") and "gemma" not in family else 0.0
                p.normal_(centre, 0.1, generator=gen)
    return model.float().eval()


def tiny_tokens(rows: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token ids `[rows, length]`, without the padding token."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def tokens_of(rows: int = 4, length: int = 12) -> TokenSet:
    """Such tokens, two sequences a batch."""
    return as_token_set(list(tiny_tokens(rows, length).split(2)), vocabulary=VOCAB, positions=128)


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids, use_cache=False).logits
    return found
