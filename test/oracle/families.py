"""Makes test/golden/families/fly.json: what src/adapters/families must reproduce and shares no code with.

python 3, numpy 2; no randomness but the seeds below. Run: python test/oracle/families.py

- normals, sparse: the generator of seeded-random.ts (Philox4x32-10, polar method, series for the logarithm) and fly.ts's
  rows, written again in Python's integers and floats: equal bytes mean that nothing depends on the language's libm.
- signed: FlyLoRA's forward as its PEFT fork computes it (score y + d, top-k, (alpha/r)·B·(y*mask)), by the formula of
  algorithms.md section 28, in numpy f64.
"""

import hashlib
import json
import math
import pathlib
import struct

import numpy as np

MASK = 0xFFFFFFFF


def philox(counter, key):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def logarithm(x):
    m, e = x, 0
    while m < math.sqrt(0.5):
        m, e = m * 2, e - 1
    z = (m - 1) / (m + 1)
    square, total = z * z, 0.0
    for n in range(21, 0, -2):
        total = total * square + 1 / n
    return 2 * z * total + e * 0.6931471805599453


class Random:
    def __init__(self, seed, stream):
        self.key = (seed & MASK, seed >> 32)
        self.stream, self.block, self.words, self.spare = stream, 0, [], None

    def next(self):
        if not self.words:
            self.words = philox([self.block, 0, *self.stream], self.key)
            self.block += 1
        return self.words.pop(0)

    def uniform(self):
        high, low = self.next() >> 6, self.next() >> 6
        return (2 * (high * 2**26 + low) + 1) * 2.0**-53

    def below(self, limit):
        bound = 2**32 - 2**32 % limit
        while True:
            word = self.next()
            if word < bound:
                return word % limit

    def normal(self):
        if self.spare is not None:
            value, self.spare = self.spare, None
            return value
        while True:
            u = 2 * self.uniform() - 1
            v = 2 * self.uniform() - 1
            s = u * u + v * v
            if s < 1:
                factor = math.sqrt(-2 * logarithm(s) / s)
                self.spare = v * factor
                return u * factor


def sparse(seed, module, rank, width, k):
    rows = []
    for i in range(rank):
        random, count = Random(seed, (module, i)), max(1, width * k // rank)
        places, row = list(range(width)), [0.0] * width
        for n in range(count):
            other = n + random.below(width - n)
            places[n], places[other] = places[other], places[n]
        for n in range(count):
            row[places[n]] = random.normal() / rank
        rows.append(row)
    return rows


def digest(values):
    return hashlib.sha256(struct.pack(f"<{len(values)}d", *values)).hexdigest()


def signed(rng, rank=8, k=3, width=12, out=10, tokens=6, alpha=16):
    a = rng.normal(size=(rank, width))
    b, d, x = rng.normal(size=(rank, out)), np.zeros(rank), rng.normal(size=(tokens, width))
    y = x @ a.T
    keep = np.argsort(-(y + d), axis=1, kind="stable")[:, :k]
    mask = np.zeros_like(y)
    np.put_along_axis(mask, keep, 1, axis=1)
    delta = alpha / rank * (y * mask) @ b
    named = {"a": a, "b": b, "x": x, "delta": delta}
    return {"rank": rank, "topK": k, "alpha": alpha, **{n: v.ravel().tolist() for n, v in named.items()}}


random = Random(0x0123456789ABCDEF, (5, 9))
fixture = {
    "normals": digest([random.normal() for _ in range(4096)]),
    "sparse": digest([v for row in sparse(0xFEDCBA9876543210, 38, 32, 96, 8) for v in row]),
    "signed": signed(np.random.default_rng(28)),
}
target = pathlib.Path(__file__).parents[1] / "golden" / "families" / "fly.json"
target.write_text(json.dumps(fixture) + "\n")
