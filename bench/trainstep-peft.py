"""The PEFT side of `bench trainstep`: one LoRA training step (forward, backward, AdamW) per line read from stdin.

Base: the GGUF file dequantised to f32 (gguf-py) in transformers; adapter: the factors of the parent's file on all seven
projections. Everything that makes torch fast on a CPU is on: sdpa attention, fused AdamW, no cache.

    python trainstep-peft.py SPEC.json
"""

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import numpy as np
import peft
import torch
import transformers

spec = json.load(open(sys.argv[1]))
config = spec["config"]
torch.set_num_threads(spec["threads"])
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
HEADS = {"attn_q": config["heads"], "attn_k": config["kvHeads"]}


def hf_rows(name, x):
    """GGUF's row order of q and k (adjacent pairs) -> transformers' (halves)."""
    if name not in HEADS:
        return x
    half = config["headSize"] // 2
    return x.reshape(HEADS[name], half, 2, -1).swapaxes(1, 2).reshape(x.shape)


def load_base():
    state = {}
    for t in gguf.GGUFReader(spec["modelPath"]).tensors:
        x = gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
        parts = t.name.split(".")
        if parts[0] == "blk":
            state[f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"] = hf_rows(parts[2], x)
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[parts[0]]
            state[name + ".weight"] = x
    if config["tiedEmbeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config["vocabSize"], hidden_size=config["width"], intermediate_size=config["ffnWidth"],
            num_hidden_layers=config["blocks"], num_attention_heads=config["heads"],
            num_key_value_heads=config["kvHeads"], head_dim=config["headSize"],
            max_position_embeddings=config["contextLength"], rms_norm_eps=config["normEps"],
            rope_parameters={"rope_type": "default", "rope_theta": config["ropeBase"]},
            tie_word_embeddings=config["tiedEmbeddings"], attn_implementation="sdpa",
        )
    ).float()
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in state.items()})
    return model


base = load_base()
targets = [name.split(".")[1] for key, name in NAMES.items() if "norm" not in key]
model = peft.get_peft_model(
    base, peft.LoraConfig(r=spec["rank"], lora_alpha=spec["rank"], lora_dropout=0.0, target_modules=targets, bias="none")
).train()
factors = np.fromfile(spec["factorsPath"], dtype=np.float32)
at = 0
with torch.no_grad():
    for layer in base.model.layers:
        for name in list(NAMES)[:7]:
            module = layer.get_submodule(NAMES[name])
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight  # [R, in], [out, R]
            a.copy_(torch.from_numpy(factors[at : at + a.numel()].reshape(a.shape)))
            at += a.numel()
            rows = factors[at : at + b.numel()].reshape(b.shape[::-1]).T  # [R, out] in the file
            b.copy_(torch.from_numpy(np.ascontiguousarray(hf_rows(name, np.ascontiguousarray(rows)))))
            at += b.numel()
assert at == len(factors)
tokens = torch.tensor(spec["tokens"]).reshape(spec["windows"], spec["windowRows"])
adam = spec["adam"]
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(
    trained, lr=adam["rate"], betas=(adam["beta1"], adam["beta2"]), eps=adam["eps"],
    weight_decay=adam["decay"], fused=True,
)
about = f"PEFT {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"
print(json.dumps({"description": about, "trained": sum(p.numel() for p in trained)}), flush=True)
for _ in sys.stdin:
    start, cpu = time.perf_counter(), time.process_time()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    value = loss.item()
    ms, cpu_ms = (time.perf_counter() - start) * 1e3, (time.process_time() - cpu) * 1e3
    print(json.dumps({"ms": ms, "cpuMs": cpu_ms, "loss": value}), flush=True)
