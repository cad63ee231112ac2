"""The PEFT side of `bench trainstep`: one LoRA training step (forward, backward, AdamW) per line read from stdin.

Base: the GGUF file dequantised to f32 (gguf-py) in transformers; adapter: the factors of the parent's file on all seven
projections. Everything that makes torch fast on a CPU is on: sdpa attention, fused AdamW, no cache.

    python trainstep-peft.py SPEC.json
"""

import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "test/oracle"))
from gguf_llama import MODULES, NAMES, TARGETS, hf_rows, load_llama

import numpy as np
import peft
import torch
import transformers

spec = json.load(open(sys.argv[1]))
torch.set_num_threads(spec["threads"])
base = load_llama(spec["modelPath"], "sdpa")
model = peft.get_peft_model(
    base, peft.LoraConfig(r=spec["rank"], lora_alpha=spec["rank"], lora_dropout=0.0, target_modules=TARGETS, bias="none")
).train()
factors = np.fromfile(spec["factorsPath"], dtype=np.float32)
at = 0
with torch.no_grad():
    for layer in base.model.layers:
        for name in MODULES:
            module = layer.get_submodule(NAMES[name])
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight  # [R, in], [out, R]
            a.copy_(torch.from_numpy(factors[at : at + a.numel()].reshape(a.shape)))
            at += a.numel()
            rows = factors[at : at + b.numel()].reshape(b.shape[::-1]).T  # [R, out] in the file
            b.copy_(torch.from_numpy(np.ascontiguousarray(hf_rows(name, np.ascontiguousarray(rows), base.config))))
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
