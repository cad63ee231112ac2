"""Makes test/golden/adapters/smollm2-r16.json: what PEFT says of a rank-16 adapter on the real SmolLM2-135M-Instruct.

The base is the GGUF file dequantised to f32 (gguf-py) in transformers; the adapter is the one that
test/support/make-peft-adapter.ts writes. Rank 4 is a dense f64 SVD of every module's delta. No rankgate arithmetic runs.

    npx tsx test/support/make-peft-adapter.ts /tmp/smol-r16
    venv/bin/python test/oracle/peft-smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf /tmp/smol-r16     (minutes)
"""

import hashlib
import json
import pathlib
import re
import sys

from gguf_llama import load_llama

import numpy as np
import peft
import torch
import transformers

MODEL, ADAPTER = sys.argv[1:3]
RANK = 4
TOP = 20
# Token ids, so that no tokenizer is part of this: arbitrary ones below 49152.
PROMPTS = [[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2], [338, 12, 9000, 41, 31000, 7, 5, 260]]


def truncate(model):
    """Every module's B and A replaced by the best rank-4 approximation of their product (scale unchanged)."""
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            u, s, vt = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
            a.zero_()
            b.zero_()
            b[:, :RANK] = (u[:, :RANK] * s[:RANK]).float()
            a[:RANK] = vt[:RANK].float()


def tops(model):
    rows = []
    for ids in PROMPTS:
        logits = model(torch.tensor([ids])).logits[0]
        top = logits.topk(TOP, dim=-1)
        rows.append([
            {"tokens": t.tolist(), "logits": [round(x, 5) for x in v.tolist()]} for t, v in zip(top.indices, top.values)
        ])
    return rows


torch.set_num_threads(1)
with torch.no_grad():
    base = load_llama(MODEL, "eager")
    answers = {"0": tops(base)}
    model = peft.PeftModel.from_pretrained(base, ADAPTER).eval()
    answers["16"] = tops(model)
    truncate(model)
    answers[str(RANK)] = tops(model)
out = {
    "versions": {p.__name__: p.__version__ for p in (torch, peft, transformers, np)} | {"gguf": "0.19.0"},
    "command": "venv/bin/python test/oracle/peft-smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf /tmp/smol-r16",
    "adapterSha256": hashlib.sha256((pathlib.Path(ADAPTER) / "adapter_model.safetensors").read_bytes()).hexdigest(),
    "prompts": PROMPTS,
    "answers": answers,
}
text = re.sub(r"\[[-\d\s.,e]+\]", lambda m: re.sub(r"\s+", " ", m[0]).replace("[ ", "[").replace(" ]", "]"), json.dumps(out, indent=1))
pathlib.Path("test/golden/adapters/smollm2-r16.json").write_text(text + "\n")
for rank, answer in answers.items():
    print(rank, [[row["tokens"][0] for row in rows] for rows in answer], answer[0][-1]["logits"][:3])
