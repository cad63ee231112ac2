"""Makes test/golden/trainer/eva.json: what PEFT's EVA makes of the tiny model on one batch: A and the rank of every module.

PEFT's initialize_lora_eva_weights over transformers' Llama (f32) on the tiny GGUF: r = 4, rho = 2, tau = 0.99, label mask.
The batch has four windows of 128 tokens of skewed frequency, a third of which are not learnt.

    /path/to/venv/bin/python test/oracle/eva.py      (from the repository's root; seed 29; versions are in the file)
"""

import base64
import json
import warnings

warnings.simplefilter("ignore")

from gguf_llama import MODULES, NAMES, TARGETS, load_llama

import numpy as np
import peft
import torch
import transformers

SEED, WINDOWS, ROWS, RANK, RHO = 29, 4, 128, 4, 2.0

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
    r=RANK, lora_alpha=8, target_modules=TARGETS,
    init_lora_weights="eva", eva_config=peft.EvaConfig(rho=RHO, tau=0.99),
)
model = peft.get_peft_model(load_llama("test/golden/tiny/tiny-f32.gguf", "eager"), config)
peft.initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
modules = {}
for block in range(2):
    for ours in MODULES:
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
