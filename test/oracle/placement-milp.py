"""Makes test/golden/placement/milp.json: placement problems and what HiGHS says of their optima.

    pip install scipy==1.18.1 numpy==2.4.6
    python test/oracle/placement-milp.py > test/golden/placement/milp.json

60 adapters on 6 replicas, 20 seeds. Loads by Zipf's law, the hottest adapters in two or three copies; three bases that
several adapters share; memory nearly full; what is running was right for yesterday's loads. HiGHS gets 30 s each and may
stop within 0.1 % of its bound; `optimum` is the best it found, `bound` what no placement can be below.
"""

import json
import sys

import numpy as np
import scipy
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

SEED = 20261125
ADAPTERS, REPLICAS, SHARED, INSTANCES = 60, 6, 3, 20


def greedy(adapters, replicas, shared, loads):
    """Largest pages first, each copy on the least loaded replica that has room; None when one finds none."""
    room = [r["pages"] for r in replicas]
    load = [0.0] * REPLICAS
    there = [set() for _ in range(REPLICAS)]
    on = [[] for _ in adapters]
    for a in sorted(range(ADAPTERS), key=lambda a: -adapters[a]["pages"] * adapters[a]["copies"]):
        one = adapters[a]
        for _ in range(one["copies"]):
            best = None
            for r in range(REPLICAS):
                pages = one["pages"]
                if one["shares"] is not None and one["shares"] not in there[r]:
                    pages += next(s["pages"] for s in shared if s["name"] == one["shares"])
                if r in on[a] or pages > room[r]:
                    continue
                busy = load[r] / replicas[r]["capacity"]
                if best is None or busy < best[0]:
                    best = (busy, r, pages)
            if best is None:
                return None
            _, r, pages = best
            room[r] -= pages
            load[r] += loads[a] / one["copies"]
            if one["shares"] is not None:
                there[r].add(one["shares"])
            on[a].append(r)
    return on


def instance(rng):
    while True:
        replicas = [
            {"name": f"r{i}", "pages": int(rng.integers(48, 81)), "capacity": round(float(rng.uniform(0.8, 1.5)), 3)}
            for i in range(REPLICAS)
        ]
        shared = [{"name": f"s{i}", "pages": int(rng.integers(4, 9))} for i in range(SHARED)]
        zipf = 1 / np.arange(1, ADAPTERS + 1) ** 0.9
        capacity = sum(r["capacity"] for r in replicas)
        loads = zipf / zipf.sum() * capacity * 0.6
        adapters = []
        for a in range(ADAPTERS):
            copies = 3 if a == 0 else 2 if a < 4 else 1
            shares = f"s{int(rng.integers(SHARED))}" if rng.random() < 0.3 else None
            adapters.append(
                {
                    "name": f"a{a}",
                    "pages": int(rng.choice([1, 2, 4, 8], p=[0.2, 0.3, 0.3, 0.2])),
                    "load": round(float(loads[a]), 5),
                    "copies": copies,
                    "shares": shares,
                }
            )
        room = sum(r["pages"] for r in replicas)
        needed = sum(a["pages"] * a["copies"] for a in adapters) + 4 * sum(s["pages"] for s in shared)
        if not 0.8 <= needed / room <= 0.92:
            continue
        yesterday = loads * np.exp(rng.normal(0, 0.6, ADAPTERS))
        on = greedy(adapters, replicas, shared, yesterday)
        if on is None:
            continue
        for a, where in enumerate(on):
            adapters[a]["on"] = [f"r{r}" for r in sorted(where)]
        return {"replicas": replicas, "adapters": adapters, "shared": shared, "moveCost": 0.0005}


def solve(problem):
    """Variables: x[a, r] a copy of a on r, y[s, r] shared pages s on r, and the peak."""
    adapters, replicas, shared = problem["adapters"], problem["replicas"], problem["shared"]
    x = lambda a, r: a * REPLICAS + r
    y = lambda s, r: (ADAPTERS + s) * REPLICAS + r
    peak = (ADAPTERS + SHARED) * REPLICAS
    cost = np.zeros(peak + 1)
    cost[peak] = 1
    rows, low, high = [], [], []

    def constrain(entries, lo, hi):
        rows.append(entries)
        low.append(lo)
        high.append(hi)

    for r, replica in enumerate(replicas):
        here = [a for a in adapters if replica["name"] in a["on"]]
        for a, one in enumerate(adapters):
            if replica["name"] not in one["on"]:
                cost[x(a, r)] = problem["moveCost"] * one["pages"]
        for s, one in enumerate(shared):
            if all(a["shares"] != one["name"] for a in here):
                cost[y(s, r)] = problem["moveCost"] * one["pages"]
        pages = [(x(a, r), one["pages"]) for a, one in enumerate(adapters)]
        pages += [(y(s, r), one["pages"]) for s, one in enumerate(shared)]
        constrain(pages, -np.inf, replica["pages"])
        load = [(x(a, r), one["load"] / one["copies"]) for a, one in enumerate(adapters)]
        constrain(load + [(peak, -replica["capacity"])], -np.inf, 0)
        for a, one in enumerate(adapters):
            for s, base in enumerate(shared):
                if one["shares"] == base["name"]:
                    constrain([(x(a, r), 1), (y(s, r), -1)], -np.inf, 0)
    for a, one in enumerate(adapters):
        constrain([(x(a, r), 1) for r in range(REPLICAS)], one["copies"], one["copies"])
    matrix = lil_matrix((len(rows), peak + 1))
    for i, entries in enumerate(rows):
        for j, value in entries:
            matrix[i, j] = value
    upper = np.ones(peak + 1)
    upper[peak] = np.inf
    found = milp(
        cost,
        constraints=LinearConstraint(matrix.tocsr(), low, high),
        integrality=np.r_[np.ones(peak), 0],
        bounds=Bounds(0, upper),
        options={"time_limit": 30, "mip_rel_gap": 0.001},
    )
    return float(found.fun), float(found.mip_dual_bound)


def main():
    instances = []
    for i in range(INSTANCES):
        problem = instance(np.random.default_rng(SEED + i))
        optimum, bound = solve(problem)
        print(i, optimum, bound, file=sys.stderr)
        instances.append({"problem": problem, "optimum": optimum, "bound": bound})
    made = f"scipy {scipy.__version__} (HiGHS), numpy {np.__version__}, seed {SEED}"
    json.dump({"made": made, "instances": instances}, sys.stdout)
    print()


main()
