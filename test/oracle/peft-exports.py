"""Makes test/golden/adapters/exports.json: what PEFT computes with the directories that rankgate exports.

The base is test/golden/tiny/tiny-f32.gguf in transformers, f32. Each directory is loaded by PeftModel.from_pretrained as it
is; the hashes say which bytes those were. torch 2.15, peft 0.21.2, transformers 5.24; no randomness; seconds.

    npx tsx test/oracle/exported-prefixes.ts /tmp/exports
    venv/bin/python test/oracle/peft-exports.py /tmp/exports
"""

import base64
import hashlib
import json
import pathlib
import sys

from gguf_llama import load_llama

import peft
import torch
import transformers

IDS = [294, 71, 293, 275, 72, 261, 223, 25]

torch.set_num_threads(1)
cases = []
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    base = load_llama("test/golden/tiny/tiny-f32.gguf", "eager")
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(base, folder).eval()
        logits = model(torch.tensor([IDS])).logits[0, -1]
    sha256 = lambda name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
    cases.append({
        "name": folder.name,
        "config": sha256("adapter_config.json"),
        "weights": sha256("adapter_model.safetensors"),
        "logits": base64.b64encode(logits.numpy().astype("<f4").tobytes()).decode(),
    })
versions = {p.__name__: p.__version__ for p in (torch, peft, transformers)}
command = "npx tsx test/oracle/exported-prefixes.ts DIR && venv/bin/python test/oracle/peft-exports.py DIR"
path = pathlib.Path("test/golden/adapters/exports.json")
path.write_text(json.dumps({"versions": versions, "command": command, "ids": IDS, "cases": cases}, indent=1) + "\n")
print(len(cases), "cases")
