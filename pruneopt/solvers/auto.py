"""Presets for a layer's reconstruction, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax

from pruneopt.problem import Problem
from pruneopt.solvers.admm import ADMM
from pruneopt.solvers.base import Outcome, Solver, Start, layer_only

# On n <= 4 m inputs and m outputs, in products of n^2 m and inverses of 0.7 n^3: 9 and 1, 17 and 4, 50 and 6.
# BALANCED is what 27 layers of six networks choose, whichever network is left out; BEST and FAST were chosen on all of
# them, BEST for its worst layer: paper_reproductions/head_to_head/presets.py and the README beside it.
FAST = ADMM(
    rho=(1.0, 1.0), levels=1, iterations=5, relaxation=1.3, metric_block=400, damping=0.003, refit=3, refit_damping=0.01
)
BALANCED = ADMM(refine="hard")
BEST = ADMM(rho=(0.3, 1.6), levels=5, iterations=8, floor=0.05, refit=9, refit_damping=3e-4, refine="always")
PRESETS = {"fast": FAST, "balanced": BALANCED, "best": BEST}

# Multiply-adds a second that `Auto` reckons with: one core of a CPU, or an accelerator.
RATE = {"cpu": 5e10}
ACCELERATED = 1e13


@dataclass(frozen=True)
class Auto(Solver):
    """The best of the presets `FAST`, `BALANCED`, `BEST` that should end within `seconds`, and FAST if none does.

    Reckoned from the layer's shape and the device, one core of a CPU, without compilation; None: `BEST` for layers that
    it solves in about a tenth of a second, `BALANCED` else.
    stats: preset, expected_seconds, and what the preset has to say.
    """

    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds={self.seconds!r} is not a positive number; pass the time for one layer, or None")

    @property
    def never_worse_than(self) -> frozenset[str]:
        """A feasible init."""
        return frozenset({"init"})

    def refuses(self, problem: Problem) -> str | None:
        """What ADMM refuses."""
        return layer_only(problem, self)

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Choose, then solve."""
        n, m = problem.objective.center.shape
        expected = {name: _seconds(preset, n, m) for name, preset in PRESETS.items()}
        limit = 0.1 if self.seconds is None else self.seconds
        within = [name for name in PRESETS if expected[name] <= limit]
        name = within[-1] if within else "fast"
        if self.seconds is None and name != "best":
            name = "balanced"
        outcome = PRESETS[name].run(problem, init, key)
        return replace(outcome, stats={"preset": name, "expected_seconds": expected[name], **outcome.stats})


def _seconds(preset: ADMM, n: int, m: int) -> float:
    products = preset.levels * preset.iterations_at(n, m) + preset.refit + 1
    rate = RATE.get(jax.default_backend(), ACCELERATED)
    whole = 1 if preset.metric_block is None else min(1, preset.metric_block / n) ** 2  # of the metric's inverse
    return (products * n * n * m + (preset.levels + whole) * 0.7 * n**3) / rate
