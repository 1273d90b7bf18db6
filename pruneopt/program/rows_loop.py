"""Primitives that carry a body: calls, read as their body, and loops, branches and kernels that stay whole."""

from __future__ import annotations

from pruneopt.program.row import Row
from pruneopt.program.versions import CALLS, DERIVATIVES

_OWN = "a function with a derivative of its own"

ROWS: dict[str, Row] = {
    **{name: Row(inlined=True, whole=_OWN if name in DERIVATIVES else "") for name in CALLS},
    "while": Row(whole="a while loop, whose number of steps depends on the data"),
    "cond": Row(whole="a cond, whose branch depends on data or params"),
    "scan": Row(whole="a loop that was not unrolled"),
    "shard_map": Row(whole="a shard_map over several devices, or one with a collective that has no rule"),
    "pallas_call": Row(whole="a Pallas kernel"),
    "custom_linear_solve": Row(whole="a linear solve"),
    "ffi_call": Row(whole="a foreign call"),
}
