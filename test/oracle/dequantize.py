"""Makes test/golden/dequantize.json: random blocks of every weight type that rankgate reads, with gguf-py's f32 values.

Scales are finite and of ordinary size; the quantised bits are uniform, so every nibble, high bit and sub-block scale
occurs. No rankgate code runs.

    python3 -m venv venv && venv/bin/pip install numpy==2.4.6 && venv/bin/pip install --no-deps gguf==0.19.0
    venv/bin/python test/oracle/dequantize.py        (from the repository's root; seed 11, under a second)
"""

import base64
import importlib.metadata
import json
import pathlib

import gguf
import numpy as np

SEED = 11
BLOCKS = 6
# Where the f16 scales of a block are; all other bytes are uniform.
SCALES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def main() -> None:
    rng = np.random.default_rng(SEED)
    cases = []
    for name in ["F32", "F16", "BF16", *SCALES]:
        kind = gguf.GGMLQuantizationType[name]
        if name in SCALES:
            size = gguf.GGML_QUANT_SIZES[kind][1]
            data = rng.integers(0, 256, (BLOCKS, size), dtype=np.uint8)
            for at in SCALES[name]:
                scale = rng.normal(0, 0.05, BLOCKS).astype("<f2")
                data[:, at : at + 2] = scale.view(np.uint8).reshape(BLOCKS, 2)
            data[0, SCALES[name][0] : SCALES[name][0] + 2] = [0x01, 0x00]  # the smallest subnormal
        else:
            values = (rng.normal(0, 1, 64) * 10.0 ** rng.integers(-6, 4, 64)).astype("<f4")
            data = gguf.quantize(values, kind).view(np.uint8) if name != "F32" else values.view(np.uint8)
        values = gguf.dequantize(data, kind).astype("<f4").ravel() if name != "F32" else values
        cases.append({"type": name, "data": text(data), "values": text(values)})
    golden = {
        "made": {
            "command": "venv/bin/python test/oracle/dequantize.py",
            "seed": SEED,
            "versions": {p: importlib.metadata.version(p) for p in ("gguf", "numpy")},
            "note": "base64; data: the blocks as in a file; values: f32, little endian",
        },
        "cases": cases,
    }
    path = pathlib.Path("test/golden/dequantize.json")
    path.write_text(json.dumps(golden, indent=1) + "\n")


main()
