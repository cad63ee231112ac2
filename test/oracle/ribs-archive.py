"""Makes test/golden/archive/ribs.json: streams of candidates and what pyribs' GridArchive keeps of each.

    pip install ribs==0.12.0 numpy==2.4.6
    python test/oracle/ribs-archive.py > test/golden/archive/ribs.json

A domain is a row of the grid (its measure is row + 0.5), latency an axis in log2 ms from 2^4 to 2^14. The streams have
ties, candidates outside the range and candidates exactly on cell edges. Added one by one, as a gateway gets them.
"""

import json
import sys

import numpy as np
import ribs
from ribs.archives import GridArchive

SEED = 20261125
DOMAINS, COUNT = 4, 2000


def stream(cells: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    archive = GridArchive(
        solution_dim=1,
        dims=[DOMAINS, cells],
        ranges=[(0, DOMAINS), (4, 14)],
        dtype=np.float64,
    )
    edges = 4 + 10 * np.arange(cells + 1) / cells
    candidates = []
    for i in range(COUNT):
        domain = int(rng.integers(DOMAINS))
        on_edge = rng.random() < 0.1
        log2 = float(rng.choice(edges)) if on_edge else float(rng.uniform(3, 15))
        ms = float(2.0**log2)
        objective = round(float(rng.random()), 2 if i % 3 == 0 else 12)
        archive.add_single([i], objective, [domain + 0.5, np.log2(ms)])
        candidates.append([domain, ms, objective])
    elites = archive.data(["solution", "objective", "index"], return_type="dict")
    kept = {
        int(cell): [int(solution[0]), float(objective)]
        for cell, solution, objective in zip(
            elites["index"], elites["solution"], elites["objective"]
        )
    }
    return {
        "cells": cells,
        "candidates": candidates,
        "elites": {str(cell): kept[cell] for cell in sorted(kept)},
        "coverage": float(archive.stats.coverage),
        "qdScore": float(archive.stats.qd_score),
    }


sys.stdout.write(
    json.dumps(
        {
            "made": f"ribs {ribs.__version__}, numpy {np.__version__}, seed {SEED}",
            "domains": DOMAINS,
            "streams": [stream(cells, SEED + i) for i, cells in enumerate([6, 10])],
        }
    )
    + "\n"
)
