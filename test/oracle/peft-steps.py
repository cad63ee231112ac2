"""Makes test/golden/trainer/peft-steps-*.json: losses, gradient norms and factors of 20 LoRA training steps by PEFT and torch.

Base: a GGUF file dequantised to f32 (gguf-py) in transformers, q and k rows put in transformers' order. One sequence at a
time, no packing, no padding; the loss is the mean over all learnt tokens of the step. AdamW and clip_grad_norm_ are torch's.
Factors, tokens and what is learnt come from a linear congruential generator that the test repeats; seed 11.

    venv/bin/python test/oracle/peft-steps.py tiny test/golden/tiny/tiny-f32.gguf
    venv/bin/python test/oracle/peft-steps.py smollm2 SmolLM2-135M-Instruct.Q4_1.gguf
        (venv: torch==2.15.0 peft==0.21.2 transformers==5.24.0 gguf==0.19.0)
"""

import json
import math
import os
import pathlib
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers

case, path = sys.argv[1:]
CASES = {
    "tiny": {"rank": 4, "lengths": [5, 31, 12, 8, 40, 17, 23, 9, 28, 6, 35, 14], "learningRate": 5e-3},
    "smollm2": {"rank": 8, "lengths": [129, 90, 129, 37, 64], "learningRate": 1e-3},
}
STEPS, WARMING, DECAY, CLIP, SEED = 20, 2, 0.01, 1.0, 11
spec = CASES[case]
torch.set_num_threads(1)
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
reader = gguf.GGUFReader(path)


def field(name):
    return reader.fields["llama." + name].contents()


heads, kv_heads, width = field("attention.head_count"), field("attention.head_count_kv"), field("embedding_length")
HEADS = {"attn_q": heads, "attn_k": kv_heads}
state = {}


def hf_rows(name, x):
    """GGUF's row order of q and k (adjacent pairs) -> transformers' (halves)."""
    if name not in HEADS:
        return x
    return x.reshape(HEADS[name], width // heads // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)


for t in reader.tensors:
    x = gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
    parts = t.name.split(".")
    if parts[0] == "blk":
        state[f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"] = hf_rows(parts[2], x)
    else:
        name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[parts[0]]
        state[name + ".weight"] = x
tied = "lm_head.weight" not in state
if tied:
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
vocab = state["lm_head.weight"].shape[0]
base = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"), num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=width // heads, rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=tied, attn_implementation="sdpa",
    )
).float()
base.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in state.items()})
rank = spec["rank"]
targets = [NAMES[name].split(".")[1] for name in MODULES]
model = peft.get_peft_model(
    base, peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets, bias="none")
).train()

current = SEED


def uniform():
    global current
    current = (current * 1664525 + 1013904223) % 2**32
    return current / 2**32


def numbers(count, scale):
    return np.array([(uniform() - 0.5) * 2 * scale for _ in range(count)]).astype(np.float32)


factors = []
with torch.no_grad():
    for layer in base.model.layers:
        for name in MODULES:
            module = layer.get_submodule(NAMES[name])
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight  # [R, in], [out, R]
            a.copy_(torch.from_numpy(numbers(a.numel(), a.shape[1] ** -0.5).reshape(a.shape)))
            rows = numbers(b.numel(), 0.01).reshape(rank, -1).T  # [R, out] as rankgate has it
            b.copy_(torch.from_numpy(np.ascontiguousarray(hf_rows(name, np.ascontiguousarray(rows)))))
            factors += [a, b]
examples = []
for length in spec["lengths"]:
    tokens = [math.floor(uniform() * vocab) for _ in range(length)]
    examples.append((torch.tensor(tokens), torch.tensor([0 < i and uniform() < 0.6 for i in range(length)])))
answers = sum(int(learnt.sum()) for _, learnt in examples)
optimizer = torch.optim.AdamW(factors, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)


def rate(step):
    if step < WARMING:
        return spec["learningRate"] * (step + 1) / WARMING
    return spec["learningRate"] * (1 + math.cos(math.pi * (step - WARMING) / (STEPS - WARMING))) / 2


losses, norms = [], []
for step in range(STEPS):
    optimizer.param_groups[0]["lr"] = rate(step)
    optimizer.zero_grad()
    total = 0.0
    for tokens, learnt in examples:
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits[learnt[1:]], tokens[1:][learnt[1:]], reduction="sum") / answers
        loss.backward()
        total += loss.item()
    norms.append(torch.nn.utils.clip_grad_norm_(factors, CLIP).item())
    losses.append(total)
    optimizer.step()
out = {
    "made": {
        "command": f"venv/bin/python test/oracle/peft-steps.py {case} {pathlib.Path(path).name}",
        "seed": SEED, "torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__,
        "gguf": "0.19.0", "threads": 1,
    },
    **spec,
    "steps": STEPS, "warmupShare": WARMING / STEPS, "weightDecay": DECAY, "clipNorm": CLIP, "seed": SEED,
    "losses": losses, "norms": norms,
    "finalNorms": [f.detach().double().norm().item() for f in factors[:14]],
}
target = pathlib.Path(f"test/golden/trainer/peft-steps-{case}.json")
target.parent.mkdir(parents=True, exist_ok=True)
target.write_text(json.dumps(out) + "\n")
print(losses, norms)
