"""Makes test/golden/archive/ribs-sphere.json: how much of a grid MAP-Elites fills on the sphere benchmark, by pyribs.

    pip install ribs==0.12.0 numpy==2.4.6
    python test/oracle/ribs-sphere.py > test/golden/archive/ribs-sphere.json

pyribs' sphere (Fontaine et al. 2020): the objective falls with the distance from 2.048 in every coordinate, 1 at best and 0 at
the far corner of the box; the measures are the sums of the first and the second half of the coordinates, each clipped to the
box by 5.12/x outside. The first batch is uniform in the box; every other is IsoLineEmitter's with algorithms.md section 34's
sigmas. Each seed has the same budget.
"""

import json
import sys

import numpy as np
import ribs
from ribs.archives import GridArchive
from ribs.emitters import IsoLineEmitter

SEED = 20261125
SEEDS, DIM, BOX, SHIFT = 32, 10, 5.12, 2.048
CELLS, BATCH, BATCHES = 50, 30, 500
ISO, LINE = 0.01, 0.2


def sphere(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    worst = DIM * (BOX + SHIFT) ** 2
    objective = 1 - np.sum((x - SHIFT) ** 2, axis=1) / worst
    with np.errstate(divide="ignore"):
        clipped = np.where(np.abs(x) <= BOX, x, BOX / x)
    half = DIM // 2
    return objective, np.stack([clipped[:, :half].sum(1), clipped[:, half:].sum(1)], axis=1)


def run(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    bound = DIM / 2 * BOX
    archive = GridArchive(
        solution_dim=DIM, dims=[CELLS, CELLS], ranges=[(-bound, bound)] * 2, dtype=np.float64
    )
    emitter = IsoLineEmitter(
        archive,
        initial_solutions=rng.uniform(-BOX, BOX, (BATCH, DIM)),
        iso_sigma=ISO,
        line_sigma=LINE,
        batch_size=BATCH,
        seed=seed,
    )
    for _ in range(BATCHES):
        solutions = emitter.ask()
        objective, measures = sphere(solutions)
        emitter.tell(solutions, objective, measures, archive.add(solutions, objective, measures))
    return {"coverage": float(archive.stats.coverage), "qdScore": float(archive.stats.qd_score)}


sys.stdout.write(
    json.dumps(
        {
            "made": f"ribs {ribs.__version__}, numpy {np.__version__}, seeds from {SEED}",
            "dim": DIM,
            "box": BOX,
            "shift": SHIFT,
            "cells": CELLS,
            "batch": BATCH,
            "batches": BATCHES,
            "iso": ISO,
            "line": LINE,
            "runs": [run(SEED + i) for i in range(SEEDS)],
        }
    )
    + "\n"
)
