"""Trains a real LoRA with PEFT on the real SmolLM2-135M-Instruct and writes it as a PEFT directory, with the text it never saw.

Text: the docstrings of Python's own standard library (whatever Python runs this; 3.11.7 when the figures were made).
Every fifth module by name is held out. Rank 16 on all seven projections, AdamW, 160 steps of 2 x 128 tokens, seed 17,
one thread: about 10 CPU minutes. The adapter is 20 MB, so it is not committed; test/nightly/levels-real.test.ts says
where it looks for it.

    venv/bin/python test/oracle/peft-train.py SmolLM2-135M-Instruct.Q4_1.gguf OUT_DIRECTORY
"""

import importlib
import inspect
import json
import pathlib
import random
import sys
import warnings

warnings.simplefilter("ignore")

from gguf_llama import TARGETS, load_llama

import numpy as np
import peft
import torch
import transformers

MODEL, OUT = sys.argv[1], pathlib.Path(sys.argv[2])
STEPS, BATCH, LENGTH, RANK, ALPHA, RATE, SEED = 160, 2, 128, 16, 32, 1e-3, 17


def docstrings(module):
    """Every docstring of a module, in the order of its names, under a line that says whose it is."""
    found, texts = set(), []

    def take(name, thing):
        doc = inspect.getdoc(thing)
        if doc and len(doc) > 80 and doc not in found:
            found.add(doc)
            texts.append(f"{name}\n\n{doc}\n")

    take(module.__name__, module)
    for name, thing in sorted(vars(module).items()):
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        take(f"{module.__name__}.{name}", thing)
        if inspect.isclass(thing):
            for inner, member in sorted(vars(thing).items()):
                if not inner.startswith("_"):
                    take(f"{module.__name__}.{name}.{inner}", member)
    return "\n".join(texts)


def texts():
    skipped = {"antigravity", "this", "idlelib", "turtledemo", "test", "lib2to3", "tkinter", "turtle"}
    names = sorted(n for n in sys.stdlib_module_names if not n.startswith("_") and n not in skipped)
    train, held = [], []
    for index, name in enumerate(names):
        try:
            text = docstrings(importlib.import_module(name))
        except ImportError:
            continue
        (held if index % 5 == 0 else train).append(text)
    return "\n".join(train), "\n".join(held)


def windows(ids):
    return [ids[i : i + LENGTH + 1] for i in range(0, len(ids) - LENGTH, LENGTH)]


def loss_of(model, batch):
    batch = torch.tensor(batch)
    logits = model(batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


torch.set_num_threads(1)
torch.manual_seed(SEED)
train_text, held_text = texts()
path = pathlib.Path(MODEL).absolute()
tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
train, held = windows(encode(train_text)), windows(encode(held_text))[:24]
order = random.Random(SEED).sample(range(len(train)), STEPS * BATCH)
model = peft.get_peft_model(
    load_llama(MODEL, "sdpa"),
    peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"),
)
print(f"{len(train)} windows to train on, {len(held)} held out", flush=True)


def held_loss():
    with torch.no_grad():
        return sum(loss_of(model, [w]).item() for w in held) / len(held)


before = held_loss()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
for step in range(STEPS):
    for group in optimizer.param_groups:
        group["lr"] = RATE * min(1.0, (step + 1) / 10) * (1 - step / STEPS)
    loss = loss_of(model, [train[i] for i in order[step * BATCH : (step + 1) * BATCH]])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(step, round(loss.item(), 4), flush=True)
after = held_loss()

model.save_pretrained(OUT, safetensors=True)
config = json.loads((OUT / "adapter_config.json").read_text())
config["base_model_name_or_path"] = "SmolLM2-135M-Instruct"
(OUT / "adapter_config.json").write_text(json.dumps(config, indent=1))
(OUT / "held-out.txt").write_text(held_text)
(OUT / "train.txt").write_text(train_text)
(OUT / "made.json").write_text(json.dumps({
    "versions": {p.__name__: p.__version__ for p in (torch, peft, transformers, np)} | {"python": sys.version.split()[0]},
    "steps": STEPS, "batch": BATCH, "length": LENGTH, "rank": RANK, "alpha": ALPHA, "rate": RATE, "seed": SEED,
    "held_windows": len(held), "held_loss_before": before, "held_loss_after": after, "held_ids_head": held[0][:16],
}, indent=1))
print(before, after)
