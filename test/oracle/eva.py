"""Makes test/golden/trainer/eva.json: what PEFT's EVA makes of the tiny model on one batch: A and the rank of every module.

PEFT's initialize_lora_eva_weights over transformers' Llama (f32) on the tiny GGUF: r = 4, rho = 2, tau = 0.99, label mask.
The batch has four windows of 128 tokens of skewed frequency, a third of which are not learnt.

    /path/to/venv/bin/python test/oracle/eva.py      (from the repository's root; seed 29; versions are in the file)
"""

import base64
import json
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")

import gguf
import numpy as np
import peft
import torch
import transformers

SEED, WINDOWS, ROWS, RANK, RHO = 29, 4, 128, 4, 2.0
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


def load_tiny():
    heads = {"attn_q": 4, "attn_k": 2}
    state = {}
    for t in gguf.GGUFReader("test/golden/tiny/tiny-f32.gguf").tensors:
        x = gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
        parts = t.name.split(".")
        if parts[0] == "blk":
            if parts[2] in heads:  # GGUF row order (adjacent pairs) -> HF row order (halves)
                h = heads[parts[2]]
                x = x.reshape(h, 8, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
            state[f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"] = torch.from_numpy(x.copy())
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[parts[0]]
            state[name + ".weight"] = torch.from_numpy(x.copy())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


rng = np.random.default_rng(SEED)
# Skewed, as words are: directions then differ in how much they explain.
tokens = np.minimum(3 + (rng.pareto(0.7, (WINDOWS, ROWS)) * 4).astype(np.int64), 319)
learnt = rng.random((WINDOWS, ROWS)) > 1 / 3
batch = {
    "input_ids": torch.from_numpy(tokens),
    "attention_mask": torch.ones(WINDOWS, ROWS, dtype=torch.long),
    "labels": torch.from_numpy(np.where(learnt, tokens, -100)),
}
config = peft.LoraConfig(
    r=RANK, lora_alpha=8, target_modules=[name.split(".")[1] for name in list(NAMES.values())[:7]],
    init_lora_weights="eva", eva_config=peft.EvaConfig(rho=RHO, tau=0.99),
)
model = peft.get_peft_model(load_tiny(), config)
peft.initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
modules = {}
for block in range(2):
    for ours in list(NAMES)[:7]:
        layer = model.base_model.model.model.layers[block].get_submodule(NAMES[ours])
        if not hasattr(layer, "lora_A"):  # no rank was left for it
            modules[f"{block}.{ours}"] = {"rank": 0, "a": "", "scale": None}
            continue
        a = layer.lora_A["default"].weight.detach().numpy()
        modules[f"{block}.{ours}"] = {
            "rank": int(a.shape[0]),
            "a": base64.b64encode(np.ascontiguousarray(a, dtype="<f4").tobytes()).decode(),
            "scale": float(layer.scaling["default"]),
        }
out = {
    "versions": {p.__name__: p.__version__ for p in (torch, transformers, peft, np)} | {"gguf": "0.19.0"},
    "command": "/path/to/venv/bin/python test/oracle/eva.py",
    "seed": SEED,
    "rank": RANK,
    "rho": RHO,
    "windowRows": ROWS,
    "tokens": tokens.flatten().tolist(),
    "learnt": learnt.flatten().astype(int).tolist(),
    "modules": modules,
}
with open("test/golden/trainer/eva.json", "w") as file:
    json.dump(out, file)
    file.write("\n")
print({name: module["rank"] for name, module in modules.items()})
