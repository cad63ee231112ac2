"""Makes test/golden/training/block.json: loss and every gradient of a one-block decoder with low-rank deltas, by torch.

f64, torch's own rms_norm, scaled_dot_product_attention and cross_entropy, one sequence at a time (the rankgate side packs
them into windows). Rope on adjacent pairs, as GGUF's llama files want it. Seed 3.

    venv/bin/python test/oracle/torch-block.py
"""

import base64
import json
import pathlib

import torch
import torch.nn.functional as F

torch.manual_seed(3)
torch.set_default_dtype(torch.float64)
E, H, HKV, D, FF, V, R, EPS, BASE = 32, 4, 2, 8, 48, 40, 16, 1e-5, 10000.0
WINDOWS = [[3, 4], [7]]  # lengths of the sequences packed into each window of 7 rows
SHAPES = {
    "attn_q": (H * D, E), "attn_k": (HKV * D, E), "attn_v": (HKV * D, E), "attn_output": (E, H * D),
    "ffn_gate": (FF, E), "ffn_up": (FF, E), "ffn_down": (E, FF),
}
LENGTHS = [n for window in WINDOWS for n in window]
T = sum(LENGTHS)


def numbers(*shape, scale=1.0):
    """f32 numbers, so that both sides start from the same."""
    return (torch.randn(*shape) * scale).float().double()


weights = {name: numbers(*shape, scale=shape[1] ** -0.5) for name, shape in SHAPES.items()}
weights |= {"attn_norm": 1 + numbers(E, scale=0.1), "ffn_norm": 1 + numbers(E, scale=0.1)}
weights |= {"output_norm": 1 + numbers(E, scale=0.1), "token_embd": numbers(V, E), "output": numbers(V, E, scale=E**-0.5)}
weights = {name: w.float().double() for name, w in weights.items()}
factors = {}
for name, (n, k) in SHAPES.items():
    factors[name + ".a"] = numbers(R, k, scale=k**-0.5).requires_grad_()
    factors[name + ".b"] = numbers(R, n, scale=0.3).requires_grad_()
tokens = torch.randint(V, (T,))
ranks = torch.randint(R + 1, (T,))
gate = (0.5 * (torch.arange(R)[None] < ranks[:, None])).double()
targets = torch.randint(V, (T,))
learnt = torch.rand(T) < 0.7  # rows whose target counts


def project(name, x, g):
    return x @ weights[name].T + ((x @ factors[name + ".a"].T) * g) @ factors[name + ".b"]


def rope(x):  # [S, heads, D]
    angle = torch.arange(len(x))[:, None] * BASE ** (-torch.arange(0, D, 2) / D)
    rotated = torch.view_as_complex(x.reshape(*x.shape[:2], D // 2, 2)) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.view_as_real(rotated).reshape(x.shape)


def forward(ids, g):
    x = weights["token_embd"][ids]
    h = F.rms_norm(x, (E,), weights["attn_norm"], EPS)
    q, k, v = (project(n, h, g).reshape(len(ids), -1, D) for n in ("attn_q", "attn_k", "attn_v"))
    q, k, v = (t.transpose(0, 1)[None] for t in (rope(q), rope(k), v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    x = x + project("attn_output", y.reshape(len(ids), H * D), g)
    h = F.rms_norm(x, (E,), weights["ffn_norm"], EPS)
    x = x + project("ffn_down", F.silu(project("ffn_gate", h, g)) * project("ffn_up", h, g), g)
    return F.rms_norm(x, (E,), weights["output_norm"], EPS) @ weights["output"].T


logits = torch.cat([forward(t, g) for t, g in zip(tokens.split(LENGTHS), gate.split(LENGTHS))])
loss = F.cross_entropy(logits[learnt], targets[learnt])
loss.backward()


def pack(tensor):
    return base64.b64encode(tensor.detach().float().contiguous().numpy().tobytes()).decode()


out = {
    "torch": torch.__version__,
    "seed": 3,
    "command": "venv/bin/python test/oracle/torch-block.py",
    "sizes": {"E": E, "H": H, "Hkv": HKV, "D": D, "F": FF, "V": V, "R": R, "eps": EPS, "base": BASE},
    "windows": WINDOWS,
    "tokens": tokens.tolist(),
    "targets": targets.tolist(),
    "learnt": learnt.nonzero().flatten().tolist(),
    "gate": pack(gate),
    "weights": {name: pack(w) for name, w in weights.items()},
    "factors": {name: pack(f) for name, f in factors.items()},
    "loss": loss.item(),
    "gradients": {name: pack(f.grad) for name, f in factors.items()},
}
pathlib.Path("test/golden/training/block.json").write_text(json.dumps(out, indent=1) + "\n")
print(loss.item(), {name: f.grad.norm().item() for name, f in factors.items()})
