"""What a network costs: FLOPs of its products, charged to the parameter leaf that they multiply."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax

from pruneopt import _tree
from pruneopt.structure.leaves import combine, is_floating, partition

Tree = Any

# Primitives through which an array is still the same parameter, only laid out otherwise.
_LAYOUT = frozenset(
    {"transpose", "reshape", "broadcast_in_dim", "convert_element_type", "squeeze", "expand_dims", "rev", "copy"}
    | {"copy_p", "slice", "concatenate", "stop_gradient", "sharding_constraint"}
)


def flops(fn: Callable[[Tree, Any], Any], params: Tree, batch: Any) -> dict[str, int]:
    """{path: FLOPs of fn(params, batch) in products with that leaf}; "" collects products of two activations.

    FLOPs = 2 x multiply-adds of dot_general and conv_general_dilated, padding taps included, a scan's body times its
    length, a while's body once, the dearest branch of a cond. Elementwise work is not counted.
    """
    chosen, rest = partition(params, is_floating)
    jaxpr = jax.make_jaxpr(lambda c: fn(combine(c, rest), batch))(chosen).jaxpr
    paths = [path for path, _ in _tree.named_leaves(chosen)]
    total: dict[str, int] = defaultdict(int)
    _walk(jaxpr, paths, 1, total)
    return dict(total)


def _walk(jaxpr: Any, owners: list[str], times: int, total: dict[str, int]) -> list[str]:
    """Add the FLOPs of `jaxpr` to `total`; `owners` are the paths that its inputs stand for. Returns its outputs'."""
    owner = dict(zip(jaxpr.invars, owners, strict=True))

    def of(atom: Any) -> str:
        return "" if hasattr(atom, "val") else owner.get(atom, "")

    for eqn in jaxpr.eqns:
        name, sources = eqn.primitive.name, [of(atom) for atom in eqn.invars]
        if name in ("dot_general", "conv_general_dilated"):
            # A product of two leaves is charged to the second: (adapter @ weight) belongs to the weight.
            total[sources[1] or sources[0]] += times * _product(eqn)
        elif name in _LAYOUT and sources:
            owner[eqn.outvars[0]] = sources[0]
        elif name == "mul":  # a mask or a scale on a leaf
            owner[eqn.outvars[0]] = next(
                (s for s, a in zip(sources, eqn.invars, strict=True) if s and a.aval.size > 1), ""
            )
        else:
            outputs = _inside(eqn, name, sources, times, total)
            owner.update(zip(eqn.outvars, outputs, strict=False))
    return [of(atom) for atom in jaxpr.outvars]


def _inside(eqn: Any, name: str, sources: list[str], times: int, total: dict[str, int]) -> list[str]:
    """Count what stands in the bodies of a call, scan, while or cond; owners of the outputs of a plain call."""
    if name == "while":
        for key in ("cond_jaxpr", "body_jaxpr"):
            body = eqn.params[key].jaxpr
            _walk(body, [""] * len(body.invars), times, total)
        return []
    if name == "cond":
        counts = []
        for branch in eqn.params["branches"]:
            counts.append(defaultdict(int))
            _walk(branch.jaxpr, sources[1:], times, counts[-1])
        for path, n in max(counts, key=lambda c: sum(c.values())).items():
            total[path] += n
        return []
    outputs: list[str] = []
    for value in eqn.params.values():
        body = getattr(value, "jaxpr", value)
        if hasattr(body, "eqns"):
            aligned = len(body.invars) == len(sources)
            inner = sources if aligned else [""] * len(body.invars)
            outputs = _walk(body, inner, times * eqn.params.get("length", 1), total)
    return outputs if name != "scan" else []


def _product(eqn: Any) -> int:
    out = math.prod(eqn.outvars[0].aval.shape)
    left, right = (atom.aval.shape for atom in eqn.invars[:2])
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * out * math.prod(left[i] for i in contracted)
    spec = eqn.params["dimension_numbers"].rhs_spec  # (out, in / groups, *window)
    return 2 * out * math.prod(right[i] for i in spec[1:])
