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
import pathlib
import sys

from gguf_llama import MODULES, NAMES, TARGETS, hf_rows, load_llama

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
base = load_llama(path, "sdpa")
vocab = base.config.vocab_size
rank = spec["rank"]
model = peft.get_peft_model(
    base, peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=TARGETS, bias="none")
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
            b.copy_(torch.from_numpy(np.ascontiguousarray(hf_rows(name, np.ascontiguousarray(rows), base.config))))
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
