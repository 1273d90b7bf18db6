"""What an equation carries: the parameters of JAX's primitives, read in one place that knows JAX 0.10 to 0.12.

Equations are those of a jaxpr or of a `Program`. A parameter that no known version has is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

# Calls, read as if their body stood in their place, and the names that their body goes by. A custom derivative is lost
# that way, which is right for reading and evaluating and wrong for training; nothing here is differentiated twice.
CALLS: dict[str, tuple[str, ...]] = {
    "jit": ("jaxpr",),
    "closed_call": ("call_jaxpr",),
    "call": ("call_jaxpr",),
    "eval_jaxpr": ("call_jaxpr",),  # what JAX 0.12 calls the two above
    "remat2": ("jaxpr",),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr",),
    "custom_vmap_call": ("call",),
    "composite": ("jaxpr", "call_jaxpr"),  # JAX 0.12 the second
}

# Calls with a derivative of their own.
DERIVATIVES = frozenset({"custom_jvp_call", "custom_vjp_call"})

# What collectives do inside a shard_map over a single device: nothing (all_gather may add an axis, axis_index is 0).
SIZE_ONE_COLLECTIVES = frozenset(
    {"psum", "psum_invariant", "pmax", "pmin", "pvary", "all_gather", "all_gather_invariant", "axis_index"}
)


class Parameters(dict[str, Any]):
    """The parameters of a primitive. Raises ValueError for one that it does not have, named with its primitive."""

    def __init__(self, primitive: str, params: Mapping[str, Any]):
        super().__init__(params)
        self.primitive = primitive

    def __missing__(self, name: str) -> Any:
        raise _unknown(self.primitive, f"no parameter '{name}'", self)


def parameters(eqn: Any) -> Parameters:
    """Of an equation."""
    return Parameters(eqn.primitive.name, eqn.params)


def _unknown(primitive: str, what: str, params: Mapping[str, Any]) -> ValueError:
    return ValueError(
        f"fn goes through {primitive}, which has {what} here (it has {', '.join(sorted(params)) or 'none'}): pruneopt "
        f"reads JAX 0.10 to 0.12, this is JAX {jax.__version__}; install one of those"
    )


def plain(body: Any) -> Any:
    """The plain jaxpr of a closed one; JAX 0.11 and newer have one class for both."""
    return body.jaxpr if hasattr(body, "consts") else body


def constants(body: Any) -> tuple[Any, ...]:
    """The values of a jaxpr's `constvars`; an open one has none."""
    return tuple(getattr(body, "consts", ()))


def carried(eqn: Any) -> dict[str, list[Any]]:
    """{parameter: the jaxprs in it}, of the parameters that hold any, in tuples, lists and dictionaries too."""
    found = {name: list(_jaxprs(value)) for name, value in eqn.params.items()}
    return {name: jaxprs for name, jaxprs in found.items() if jaxprs}


def bodies(eqn: Any) -> list[Any]:
    """The jaxprs that an equation carries."""
    return [jaxpr for jaxprs in carried(eqn).values() for jaxpr in jaxprs]


def _jaxprs(value: Any) -> Iterator[Any]:
    if hasattr(plain(value), "eqns"):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _jaxprs(part)


def holds(jaxpr: Any, names: Iterable[str]) -> bool:
    """Whether any equation of a jaxpr, at any depth, is one of these primitives."""
    return any(e.primitive.name in names or any(holds(body, names) for body in bodies(e)) for e in plain(jaxpr).eqns)


def called(eqn: Any) -> Any:
    """The body of one of `CALLS`, which takes the equation's inputs and gives its outputs."""
    return _agreeing(eqn, body(eqn), f"a body in '{_held_in(eqn)}' that takes or gives other arrays than it")


def body(eqn: Any) -> Any:
    """The body of one of `CALLS`."""
    found = parameters(eqn)[_held_in(eqn)]
    if not hasattr(plain(found), "eqns"):
        raise _unknown(eqn.primitive.name, f"no body in its parameter '{_held_in(eqn)}'", eqn.params)
    return found


def _held_in(eqn: Any) -> str:
    """The parameter that holds the body of one of `CALLS`."""
    names = CALLS[eqn.primitive.name]
    return next((name for name in names if name in eqn.params), names[-1])


def _agreeing(eqn: Any, body: Any, otherwise: str) -> Any:
    """`body`, once its inputs and outputs have the equation's shapes."""
    shapes = lambda atoms: [tuple(getattr(a.aval, "shape", ())) for a in atoms]  # noqa: E731
    given, made = (shapes(getattr(eqn, side)) for side in ("invars", "outvars"))
    if (shapes(plain(body).invars), shapes(plain(body).outvars)) != (given, made):
        raise _unknown(eqn.primitive.name, otherwise, eqn.params)
    return body


class Scan(NamedTuple):
    """(carry, ys) = body(*shared, *carry, *a step of each stacked input), `length` times. shared, carry: how many."""

    body: Any
    shared: int
    carry: int
    length: int
    reverse: bool
    unroll: int


def scan(eqn: Any) -> Scan:
    """The loop of a `scan`."""
    p = parameters(eqn)
    body = p["jaxpr"]
    if "num_consts" in p:
        shared, carry = p["num_consts"], p["num_carry"]
    else:  # JAX 0.11: trees of the constants, of the carry and of what is stacked
        parts = tuple(map(len, p["ft_in"].unpack()))
        if len(parts) != 3 or sum(parts) != len(plain(body).invars):
            raise _unknown("scan", f"{len(parts)} parts in its parameter 'ft_in'", p)
        shared, carry, _ = parts
    return Scan(body, shared, carry, p["length"], p["reverse"], p["unroll"])


class While(NamedTuple):
    """carry = body(*constants, *carry) while cond(*constants, *carry); the inputs are those of cond, then of body."""

    cond: Any
    cond_shared: int
    body: Any
    body_shared: int


def while_loop(eqn: Any) -> While:
    """The loop of a `while`."""
    p = parameters(eqn)
    return While(p["cond_jaxpr"], p["cond_nconsts"], p["body_jaxpr"], p["body_nconsts"])


def branches(eqn: Any) -> tuple[Any, ...]:
    """The bodies of a `cond`, chosen by its first input, which they do not take."""
    return tuple(parameters(eqn)["branches"])


class Sharded(NamedTuple):
    """A body that runs on each device. mesh: {axis: size}. manual: axes of the mesh along which arrays are cut."""

    body: Any
    mesh: dict[str, int]
    manual: tuple[str, ...]


def shard_map(eqn: Any) -> Sharded:
    """The body of a `shard_map`."""
    p = parameters(eqn)
    mesh = dict(p["mesh"].shape)
    manual = p["manual_axes"] if "manual_axes" in p else p["newly_manual_axes"]  # JAX 0.10.0 the first
    return Sharded(p["jaxpr"], mesh, tuple(sorted(manual)))


def forward_rule(eqn: Any) -> tuple[Any, Sequence[Any], list[bool]]:
    """(jaxpr of primals and tangents, its constants, whether a tangent that it gives is zero and left out) of a
    `custom_jvp_call` whose inputs all have tangents.
    """
    p = parameters(eqn)
    jaxpr, held, zeros = p["jvp_jaxpr_fun"].call_wrapped(*[False] * (len(eqn.inputs) - p["num_consts"]))
    return plain(jaxpr), held, list(zeros)


class Backward(NamedTuple):
    """The rule of a `custom_vjp_call` whose inputs all have cotangents: a jaxpr that gives residuals and then outputs,
    its constants, and the function of the user that turns (residuals, cotangents) into cotangents of the inputs.

    outputs, residuals: their trees. forwarded: for each residual the input that it is, None where the jaxpr gives it.
    """

    jaxpr: Any
    held: Sequence[Any]
    function: Any
    outputs: Any
    residuals: Any
    forwarded: Sequence[int | None]


def backward_rule(eqn: Any) -> Backward | None:
    """The rule of a `custom_vjp_call`; None where JAX no longer tells the user's function, or it takes more than those
    two.
    """
    p = parameters(eqn)
    bwd, count = p["bwd"], len(eqn.inputs) - p["num_consts"]
    if p["num_consts"] or p["symbolic_zeros"] or len(getattr(bwd, "transforms", ())) != 1:
        return None
    jaxpr, held = p["fwd_jaxpr_thunk"].call_wrapped(*[True] * count)
    return Backward(plain(jaxpr), held, bwd.f, *p["out_trees"]())


def alone(eqn: Any) -> Any:
    """The body of a `shard_map` over one device, which takes and gives whole arrays."""
    return _agreeing(eqn, shard_map(eqn).body, "a body in 'jaxpr' that takes or gives other arrays than it")


def mesh_axes(eqn: Any) -> tuple[Any, ...]:
    """Names of the axes that a collective runs over; those of a reduction are numbers."""
    axes = eqn.params.get("axes", eqn.params.get("axis_name"))
    return tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)


def solved(eqn: Any) -> Any:
    """What a `custom_linear_solve` evaluates, the others of its bodies being for derivatives."""
    return parameters(eqn)["jaxprs"].solve


def grid(eqn: Any) -> tuple[int, ...]:
    """How often a Pallas kernel runs along each axis of its grid, those known."""
    return tuple(n for n in parameters(eqn)["grid_mapping"].grid if isinstance(n, int))
