"""Makes test/golden/adapters/squeeze.json: LoRA factors and what numpy's dense SVD says of scale.B.A.

    venv/bin/python test/oracle/peft-squeeze.py      (numpy only; from the repository's root; seed 17)
"""

import base64
import json
import pathlib

import numpy as np

rng = np.random.default_rng(17)


def text(x):
    return base64.b64encode(np.ascontiguousarray(x, dtype="<f8").tobytes()).decode()


def case(name, b, a, scale):
    s = np.linalg.svd(scale * (b @ a), compute_uv=False)
    tails = [float(np.sqrt((s[k:] ** 2).sum())) for k in range(1, len(s) + 1)]
    return {
        "name": name, "out": b.shape[0], "in": a.shape[1], "rank": a.shape[0], "scale": scale,
        "a": text(a), "b": text(b), "sigma": [float(x) for x in s], "optimalError": tails,
    }


def random(out, width, r, decay=1.0):
    return rng.standard_normal((out, r)) * decay ** np.arange(r), rng.standard_normal((r, width))


def cases():
    yield case("random", *random(40, 24, 8), 2.0)
    yield case("wide", *random(12, 64, 8, 0.7), 0.5)
    yield case("rank above out", *random(6, 30, 10), 1.0)
    yield case("rank above in", *random(30, 6, 10), 1.0)
    yield case("rank above both", *random(5, 7, 12), 1.0)
    yield case("steep", *random(24, 24, 8, 0.05), 1.0)
    b, a = random(24, 20, 8)
    b[:, 4:] = b[:, :4] @ rng.standard_normal((4, 4))
    yield case("B of rank 4", b, a, 1.0)
    b, a = random(24, 20, 6)
    a[1] = a[0]
    b[:, 3] = 0
    yield case("equal rows and a zero column", b, a, 1.0)
    yield case("zero B", np.zeros((10, 4)), random(10, 9, 4)[1], 1.0)
    b = np.linalg.qr(rng.standard_normal((16, 4)))[0]
    a = np.linalg.qr(rng.standard_normal((12, 4)))[0].T
    yield case("equal singular values", b, a, 3.0)
    yield case("rank 1", *random(9, 11, 1), -1.5)
    yield case("tiny", *(x * 1e-20 for x in random(16, 16, 4)), 1.0)


out = {"numpy": np.__version__, "command": "python test/oracle/peft-squeeze.py", "seed": 17, "cases": list(cases())}
pathlib.Path("test/golden/adapters/squeeze.json").write_text(json.dumps(out, indent=1) + "\n")
