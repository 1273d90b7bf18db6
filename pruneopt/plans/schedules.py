"""Schedules: how a cut is spread over stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pruneopt.constraints.base import Constraint
from pruneopt.plans.methods import Asked, row_of

Tree = Any


@dataclass(frozen=True)
class Stage:
    """Prune until the fraction `cut` of the plan's removals is made, by `method` (None: the plan's own)."""

    cut: float
    method: Asked | None = None


class Schedule(Protocol):
    """Stages for a plan that ends at `density`, the fraction of weights that live."""

    def stages(self, density: float) -> Sequence[Stage]:
        """The stages in order; the last has cut=1."""
        ...


@dataclass(frozen=True)
class OneShot:
    """Everything at once."""

    def stages(self, density: float) -> list[Stage]:
        """One stage."""
        return [Stage(1.0)]


@dataclass(frozen=True)
class Iterative:
    """Each of `steps` stages keeps the same fraction of what lives: density^(t/steps) after stage t.

    Source: Han et al. 2015, section 3.4; Frankle and Carbin 2019, section 1.
    """

    steps: int = 5

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def stages(self, density: float) -> list[Stage]:
        """Cuts in geometric progression of what lives."""
        return [Stage(c) for c in _geometric(density, self.steps)]


@dataclass(frozen=True)
class Cubic:
    """Sparsity s_t = s_final (1 - (1 - t/steps)^3) after stage t: fast at first, gentle at the end.

    Source: Zhu and Gupta 2017, equation 1, from initial sparsity 0.
    """

    steps: int = 10

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def stages(self, density: float) -> list[Stage]:
        """Cuts on the cubic."""
        return [Stage(1 - (1 - t / self.steps) ** 3) for t in range(1, self.steps)] + [Stage(1.0)]


@dataclass(frozen=True)
class CoarseThenFine:
    """One large cut by a cheap method, then `steps` small ones by the plan's own method.

    share: of the removals made by the coarse cut. coarse: its method.
    """

    share: float = 0.7
    steps: int = 4
    coarse: Asked = "magnitude"

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        row_of(self.coarse)
        if not 0 < self.share < 1:
            raise ValueError(
                f"share={self.share!r} is outside (0, 1); pass the fraction of the removals to make coarsely"
            )

    def stages(self, density: float) -> list[Stage]:
        """The coarse stage, then fine ones that each keep the same fraction of what lives."""
        left = 1 - self.share * (1 - density)
        fine = _geometric(density / left, self.steps)
        return [Stage(self.share, self.coarse)] + [Stage(self.share + (1 - self.share) * c) for c in fine]


def _geometric(density: float, steps: int) -> list[float]:
    if density in (0.0, 1.0):
        return [t / steps for t in range(1, steps + 1)]
    return [(1 - density ** (t / steps)) / (1 - density) for t in range(1, steps)] + [1.0]


def _check_steps(steps: int) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} is not a whole number >= 1; pass the number of stages")


def stages_of(schedule: Schedule, constraint: Constraint, chosen: Tree) -> list[Stage]:
    """The stages of a schedule down to the constraint, checked to end there."""
    if isinstance(schedule, type) or not hasattr(schedule, "stages"):
        raise TypeError(f"schedule is {schedule!r}; pass an instance such as Cubic(10)")
    stages = [Stage(1.0)] if isinstance(schedule, OneShot) else list(schedule.stages(constraint.density(chosen)))
    if not (stages and all(isinstance(stage, Stage) for stage in stages) and abs(stages[-1].cut - 1) < 1e-9):
        raise ValueError(f"schedule {schedule!r} gives {stages}; its stages must be Stage objects that end at cut=1")
    return stages
