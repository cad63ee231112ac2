"""What peft.utils.merge_utils makes of a few small tensors: the fixture of test/unit/adapters/blend.test.ts.

    python test/oracle/peft-merges.py > test/golden/adapters/merges.json

Made with peft 0.21 and torch 2.15, seed 20. dare_* draws its masks with torch.bernoulli; here they are drawn beforehand, given to it,
and written to the fixture, so that the formula is compared and not a random generator.
"""

import json

import peft
import torch
from peft.utils import merge_utils

torch.manual_seed(20)
torch.set_num_threads(1)


def case(method, count, shape, density, weights):
    tensors = [torch.randn(shape, dtype=torch.float64) for _ in range(count)]
    masks = [(torch.rand(shape) < density).to(torch.float64) for _ in range(count)]
    waiting = list(masks)
    drawn = torch.bernoulli
    torch.bernoulli = lambda input: waiting.pop(0)
    try:
        merged = getattr(merge_utils, method)(tensors, torch.tensor(weights, dtype=torch.float64), density)
    finally:
        torch.bernoulli = drawn
    # ties prunes by size and draws nothing; at density 1 nothing is pruned.
    assert len(waiting) == (count if method == "ties" or density >= 1 else 0)
    flat = lambda tensor: tensor.reshape(-1).tolist()
    return {
        "method": method,
        "density": density,
        "weights": weights,
        "tensors": [flat(tensor) for tensor in tensors],
        "masks": [flat(mask) for mask in masks],
        "merged": flat(merged),
    }


cases = [
    case(method, len(weights), shape, density, weights)
    for method in ("ties", "dare_linear", "dare_ties")
    for weights in ([1.0, 1.0], [0.7, -0.4, 1.3], [2.0])
    for shape, density in (((4, 6), 0.5), ((3, 5), 0.2), ((2, 2), 0.9), ((4, 6), 1.0))
]
print(json.dumps({"peft": peft.__version__, "torch": torch.__version__, "seed": 20, "cases": cases}))
