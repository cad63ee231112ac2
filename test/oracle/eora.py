"""Makes test/golden/adapters/eora.json: what the inputs of the tiny model's projections are like, and EoRA as published.

Calibration: forward hooks on transformers' Llama over the tiny GGUF (f32), C = sum of x x^T / tokens in f64, given by its
trace and its products with four vectors of +-1. EoRA: C = Q L Q^T, S = Q sqrt(L), SVD of E S, keep r, and the pseudo-inverse
of S with eigenvalues below n * eps_f32 * max cut (arXiv 2410.21271, by the formulas).

    venv/bin/python test/oracle/eora.py      (from the repository's root; seed 22; gguf 0.19, see the file for the others)
"""

import base64
import json
import pathlib

from gguf_llama import MODULES, NAMES, load_llama

import numpy as np
import torch
import transformers

SEED, TOKENS = 22, 48
rng = np.random.default_rng(SEED)


def text(x):
    return base64.b64encode(np.ascontiguousarray(x, dtype="<f8").tobytes()).decode()


def calibration():
    model = load_llama("test/golden/tiny/tiny-f32.gguf", "eager").double()
    ids = rng.integers(3, 320, TOKENS)
    seen = {}
    for block, layer in enumerate(model.model.layers):
        for ours in MODULES:
            linear = layer.get_submodule(NAMES[ours])
            linear.register_forward_pre_hook(
                lambda _, x, key=f"{block}.{ours}": seen.__setitem__(key, x[0][0].numpy().copy())
            )
    with torch.no_grad():
        model(torch.tensor([ids.tolist()]))
    entries = {}
    for key, x in seen.items():
        c = x.T @ x / TOKENS
        probes = rng.choice([-1.0, 1.0], (4, c.shape[0]))
        entries[key] = {"trace": float(np.trace(c)), "probes": text(probes), "products": text(probes @ c)}
    return {"tokens": ids.tolist(), "modules": entries}


def eora(error, c, rank):
    values, q = np.linalg.eigh(c)
    keep = values >= len(values) * np.finfo(np.float32).eps * values.max()
    s = q[:, keep] * np.sqrt(values[keep])
    u, sigma, vt = np.linalg.svd(error @ s, full_matrices=False)
    b = u[:, :rank] * np.sqrt(sigma[:rank])
    a = np.sqrt(sigma[:rank])[:, None] * vt[:rank] @ (q[:, keep] / np.sqrt(values[keep])).T
    return b @ a, sigma


def case(name, out, width, inputs):
    x = rng.standard_normal((inputs, width)) * 0.85 ** np.arange(width) @ np.linalg.qr(rng.standard_normal((width, width)))[0]
    error = rng.uniform(-0.5, 0.5, (out, width))
    c = x.T @ x / inputs
    results = []
    for rank in (1, 4, 8):
        delta, sigma = eora(error, c, rank)
        u, s, vt = np.linalg.svd(error, full_matrices=False)
        plain = (u[:, :rank] * s[:rank]) @ vt[:rank]
        norm = lambda d: float(np.linalg.norm((error - d) @ x.T) / np.linalg.norm(error @ x.T))
        results.append({"rank": rank, "outputs": text(delta @ x.T), "ratio": norm(delta), "plainRatio": norm(plain),
                        "theory": float(np.sqrt((sigma[rank:] ** 2).sum() / (sigma ** 2).sum()))})
    return {"name": name, "out": out, "in": width, "inputs": text(x), "error": text(error), "results": results}


out = {
    "versions": {p.__name__: p.__version__ for p in (torch, transformers, np)} | {"gguf": "0.19.0"},
    "command": "venv/bin/python test/oracle/eora.py",
    "seed": SEED,
    "calibration": calibration(),
    "cases": [case("many inputs", 24, 20, 120), case("fewer inputs than numbers", 20, 24, 10)],
}
pathlib.Path("test/golden/adapters/eora.json").write_text(json.dumps(out, indent=1) + "\n")
for c in out["cases"]:
    print(c["name"], [(r["rank"], round(r["ratio"], 4), round(r["plainRatio"], 4), round(r["theory"], 4)) for r in c["results"]])
