"""pruneopt: neural-network pruning as constrained optimization, in JAX.

    minimise f(w) + penalty(w) subject to w in C

The verbs are `prune` (a whole network), `solve` and `certify` (one problem), `apply`, `shrink`, `report`, `save` and
`load`; the nouns live in the rooms `objectives`, `curvature`, `constraints`, `penalties`, `bounds`, `solvers`,
`training` (the user's own optax loop), `plans` and `structure`.
"""

from pruneopt import structure  # first: it names `capture`, which stands on it

# isort: split
from pruneopt import allocation, bounds, constraints, curvature, objectives, penalties, plans, solvers, training
from pruneopt.certify import certify
from pruneopt.delivery.apply import apply, from_masks
from pruneopt.delivery.export import Exported, export, load_export
from pruneopt.delivery.files import load, load_masks, load_smaller, save
from pruneopt.delivery.handover import load_weights, save_weights, torch_axes
from pruneopt.delivery.packed import PackedNM, from_csr, pack_nm, to_csr, unpack_nm
from pruneopt.delivery.report import Report, report
from pruneopt.delivery.shrink import SmallerNetwork, shrink, shrink_units
from pruneopt.network.batches import Batches
from pruneopt.plans.prune import prune
from pruneopt.plans.redundancy import Redundancy, redundancy
from pruneopt.problem import Problem
from pruneopt.solution import Pruned, Solution, Status
from pruneopt.solve import SolveError, solve

__version__ = "0.1.0"

__all__ = [
    "Batches",
    "Exported",
    "PackedNM",
    "Problem",
    "Pruned",
    "Redundancy",
    "Report",
    "SmallerNetwork",
    "Solution",
    "SolveError",
    "Status",
    "allocation",
    "apply",
    "bounds",
    "certify",
    "constraints",
    "curvature",
    "export",
    "from_csr",
    "from_masks",
    "load",
    "load_export",
    "load_masks",
    "load_smaller",
    "load_weights",
    "objectives",
    "pack_nm",
    "penalties",
    "plans",
    "prune",
    "redundancy",
    "report",
    "save",
    "save_weights",
    "shrink",
    "shrink_units",
    "solve",
    "solvers",
    "structure",
    "to_csr",
    "torch_axes",
    "training",
    "unpack_nm",
]
