"""Golden stationary distributions of alpha-Rank for test/unit/jobs/tournament.test.ts.

open-spiel 2.0.2, seed 7: python3 test/oracle/alpha-rank.py > test/golden/tournament/alpha-rank.json
(with open-spiel, numpy, scipy, matplotlib and networkx installed)
"""

import json
from importlib.metadata import version

import numpy as np
from open_spiel.python.egt import alpharank

rng = np.random.default_rng(7)
tables = []
for _ in range(50):
    n = int(rng.integers(2, 7))
    alpha = float(rng.choice([0.01, 0.1, 0.3]))
    payoffs = rng.random((n, n))
    shares = alpharank.compute([payoffs], m=50, alpha=alpha)[2]
    tables.append({"alpha": alpha, "payoffs": payoffs.tolist(), "shares": shares.tolist()})
about = f"open-spiel {version('open_spiel')}, m = 50, seed 7, test/oracle/alpha-rank.py"
print(json.dumps({"madeBy": about, "tables": tables}))
