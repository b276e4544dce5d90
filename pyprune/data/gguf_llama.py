"""Writes a Llama model stored as GGUF as a Hugging Face directory (float32 safetensors)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from pyprune.data.gguf import FloatArray, GgufFile
from pyprune.errors import UserError

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of special tokens


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in BLOCK_NAMES:
        raise UserError(f"GGUF: tensor {name} does not belong to a Llama model")
    return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.{parts[3]}"


def unpermute_rotary(w: FloatArray, heads: int) -> FloatArray:
    """Rows of q and k [heads * head_dim, in], from llama.cpp's order (the two components that
    rotate together are neighbours) to transformers' (they lie head_dim / 2 apart)."""
    rows, columns = w.shape
    pairs = w.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def llama_tensors(gguf: GgufFile) -> dict[str, FloatArray]:
    """All weights in float32 under the names that `LlamaForCausalLM` gives them."""
    meta = gguf.metadata
    heads = {
        "attn_q": int(meta["llama.attention.head_count"]),
        "attn_k": int(meta["llama.attention.head_count_kv"]),
    }
    tensors = {}
    for name in gguf.tensors:
        w = gguf.read(name)
        kind = name.split(".")[-2]
        tensors[hugging_face_name(name)] = unpermute_rotary(w, heads[kind]) if kind in heads else w
    return tensors


def llama_config(gguf: GgufFile) -> Any:
    """The `LlamaConfig` that the metadata describes."""
    from transformers import LlamaConfig

    meta = gguf.metadata
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=_shortest(meta["llama.attention.layer_norm_rms_epsilon"]),
        rope_theta=_shortest(meta["llama.rope.freq_base"]),
        tie_word_embeddings="output.weight" not in gguf.tensors,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
        dtype="float32",
    )


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32 (1e-5, not 9.999999747378752e-06)."""
    return float(str(np.float32(value)))


def smollm_tokenizer(gguf: GgufFile) -> Any:
    """The fast tokenizer: byte-level BPE whose pre-tokenizer first isolates every digit
    (GGUF says so only by the name `tokenizer.ggml.pre = smollm`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    meta = gguf.metadata
    if (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise UserError(
            f"GGUF: expected the tokenizer gpt2/smollm, got "
            f"{meta['tokenizer.ggml.model']}/{meta['tokenizer.ggml.pre']}"
        )
    tokens = meta["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        additional_special_tokens=special,
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = meta.get("tokenizer.chat_template")
    return fast


def write_hugging_face(gguf: GgufFile, directory: Path) -> None:
    """Fills `directory` with config, generation config, tokenizer and model.safetensors."""
    from transformers import GenerationConfig

    architecture = gguf.metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"GGUF: expected the architecture llama, got {architecture}")
    config = llama_config(gguf)
    config.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(directory)
    smollm_tokenizer(gguf).save_pretrained(directory)
    save_file(llama_tensors(gguf), directory / "model.safetensors", metadata={"format": "pt"})
