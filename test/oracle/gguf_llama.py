"""A Llama GGUF file as a transformers model: the base of the oracle scripts. No rankgate arithmetic runs.

Weights are dequantised to f32 by gguf-py (0.19.0), sizes are what the file says. Import it before transformers and peft.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import numpy as np
import torch
import transformers

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
MODULES = list(NAMES)[:7]
TARGETS = [NAMES[name].split(".")[1] for name in MODULES]


def hf_rows(name, x, config):
    """GGUF's row order of q and k (adjacent pairs) -> transformers' (halves)."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if name not in heads:
        return x
    return x.reshape(heads[name], config.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)


def load_llama(path, attention):
    """f32, in evaluation mode. `attention`: transformers' implementation, `eager` or `sdpa`."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    field = lambda name: reader.fields["llama." + name].contents()
    vocabulary, width = tensors["token_embd.weight"].shape
    heads = field("attention.head_count")
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"), num_attention_heads=heads,
        num_key_value_heads=field("attention.head_count_kv"), head_dim=width // heads,
        max_position_embeddings=field("context_length"),
        rms_norm_eps=round(field("attention.layer_norm_rms_epsilon"), 12),  # as it was before it was stored in f32
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors, attn_implementation=attention,
    )
    state = {}
    for name, x in tensors.items():
        parts = name.split(".")
        if parts[0] == "blk":
            state[f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"] = hf_rows(parts[2], x, config)
        else:
            theirs = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[parts[0]]
            state[theirs + ".weight"] = x
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = transformers.LlamaForCausalLM(config).float().eval()
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in state.items()})
    return model
