"""Makes test/golden/trainer/numbers.json: what the trainer's optimisers and other pure maths are held to.

Optimisers run in f64 from f32 numbers on one noisy quadratic of 50 numbers, gradient = curvature * (x - target) + noise[t]:
torch.optim.AdamW and SGD, adabelief-pytorch's AdaBelief. LoRA-Pro by its formulas with scipy's solve_sylvester and numpy's
inverses (damping 0), one step in f64 and 6 steps of the Adam variant. DCT by scipy.fft. Per-sample variance and the norm
test by numpy, energy rule by numpy's cumsum, gradient of the nuclear norm by torch's autograd through its SVD.

    venv/bin/python test/oracle/trainer-numbers.py   (from the repository's root; seed 8; versions are in the file)
"""

import base64
import importlib.metadata
import json
import pathlib

import numpy as np
import scipy
import torch
from adabelief_pytorch import AdaBelief
from scipy.fft import dct
from scipy.linalg import solve_sylvester

rng = np.random.default_rng(8)
COUNT, STEPS = 50, 100


def f32(*shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def text(x, kind="<f8"):
    return base64.b64encode(np.ascontiguousarray(x, dtype=kind).tobytes()).decode()


start, target, noise = f32(COUNT), f32(COUNT), f32(STEPS, COUNT, scale=0.3)
curvature = np.exp(f32(COUNT)).astype(np.float32)


def run(optimizer_of, steps):
    x = torch.tensor(start.astype(np.float64), requires_grad=True)
    optimizer = optimizer_of([x])
    for t in range(steps):
        x.grad = torch.tensor(curvature.astype(np.float64)) * (x.detach() - torch.tensor(target.astype(np.float64)))
        x.grad += torch.tensor(noise[t].astype(np.float64))
        optimizer.step()
    return text(x.detach().numpy())


def belief(rectify, decouple, steps=STEPS):
    options = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, print_change_log=False)
    return run(lambda p: AdaBelief(p, rectify=rectify, weight_decouple=decouple, **options), steps)


def adjusted(a, b, ga, gb, s):
    """a [R, in], b [out, R]; what to take from each."""
    k, l = np.linalg.inv(b.T @ b), np.linalg.inv(a @ a.T)
    x = solve_sylvester(b.T @ b, a @ a.T, -(k @ ga @ a.T) / s**2)
    residual = np.linalg.norm(b.T @ b @ x + x @ a @ a.T + k @ ga @ a.T / s**2)
    assert residual < 1e-12, residual
    outside = np.eye(len(b)) - b @ k @ b.T
    return k @ ga / s**2 + x @ a, outside @ gb @ l / s**2 - b @ x


def lora_pro(steps=6, s=1.75, lr=0.02, decay=0.1, b1=0.9, b2=0.999, eps=1e-8):
    a, b = f32(4, 12, scale=0.5).astype(float), f32(9, 4, scale=0.5).astype(float)
    goal = f32(9, 12).astype(float)
    out = {"scale": s, "learningRate": lr, "weightDecay": decay, "steps": steps, "a": text(a), "b": text(b), "goal": text(goal)}
    full = s * b @ a - goal
    ga, gb = adjusted(a, b, s * b.T @ full, s * full @ a.T, s)
    out["once"] = {"a": text(ga), "b": text(gb)}
    m, v = np.zeros((9, 12)), np.zeros((9, 12))
    for t in range(1, steps + 1):
        full = s * b @ a - goal  # gradient of |s B A - goal|^2 / 2
        ga, gb = adjusted(a, b, s * b.T @ full, s * full @ a.T, s)
        g = s * b @ ga + s * gb @ a
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        d = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        ga, gb = adjusted(a, b, s * b.T @ d, s * d @ a.T, s)
        a, b = a * (1 - lr * decay) - lr * ga, b * (1 - lr * decay) - lr * gb
    return out | {"finalA": text(a), "finalB": text(b)}


def growth():
    cases = []
    for samples, count, shift in ((2, 5, 1.0), (8, 20, 0.3), (64, 20, 0.3), (64, 3, 2.0)):
        g = f32(samples, count).astype(float) + shift
        variance, mean = np.abs(g.var(axis=0, ddof=1)).sum(), (g.mean(axis=0) ** 2).sum()
        wanted = {eta: int(np.ceil(variance / (eta**2 * mean))) for eta in (0.1, 0.2, 0.5)}
        cases.append({"samples": samples, "gradients": text(g), "variance": variance, "mean": mean, "wanted": wanted})
    return cases


def spectra():
    cases = []
    for length in (1, 4, 32, 32):
        sigma = np.sort(np.abs(rng.standard_normal(length)) * rng.choice([1e-3, 1, 30], length))[::-1]
        share = np.cumsum(sigma**2) / (sigma**2).sum()
        cases.append({"sigma": text(sigma), "ranks": {e: int(np.searchsorted(share, e) + 1) for e in (0.5, 0.85, 0.9, 0.99)}})
    return cases


def nuclear(s=-1.5):
    a, b = torch.tensor(f32(3, 9), dtype=torch.float64), torch.tensor(f32(3, 7), dtype=torch.float64)
    out = {"scale": s, "a": text(a), "b": text(b)}
    a.requires_grad_(), b.requires_grad_()
    torch.linalg.matrix_norm(s * b.T @ a, ord="nuc").backward()
    return out | {"gradientA": text(a.grad), "gradientB": text(b.grad)}


def cosines(rows, n):
    x = f32(rows, n)
    return {"n": n, "x": text(x, "<f4"), "dct": text(dct(x.astype(float), type=2, norm="ortho", axis=1))}


out = {
    "torch": torch.__version__,
    "numpy": np.__version__,
    "scipy": scipy.__version__,
    "adabelief": importlib.metadata.version("adabelief-pytorch"),
    "seed": 8,
    "problem": {name: text(x, "<f4") for name, x in [("start", start), ("target", target), ("noise", noise), ("curvature", curvature)]},
    "adamw": run(lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05), 50),
    "sgd": run(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.05), 50),
    "sgdPlain": run(lambda p: torch.optim.SGD(p, lr=1e-2), 50),
    "adabelief_runs": [
        {"rectify": r, "decay": "decoupled" if d else "gradient", "values": belief(r, d)} for r in (True, False) for d in (True, False)
    ],
    "loraPro": lora_pro(),
    "growth": growth(),
    "spectra": spectra(),
    "nuclear": nuclear(),
    "cosines": [cosines(3, 12), cosines(2, 33), cosines(1, 576)],
}
pathlib.Path("test/golden/trainer/numbers.json").write_text(json.dumps(out, indent=1) + "\n")
