"""What each JAX primitive does to a parameter on its way to a product."""

from __future__ import annotations

# A product: the primitives that multiply a matrix of parameters.
PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})

# What collectives do inside a shard_map over a single device: nothing (all_gather may add an axis, axis_index is 0).
SIZE_ONE_COLLECTIVES = frozenset(
    {"psum", "psum_invariant", "pmax", "pmin", "pvary", "pcast", "all_gather", "all_gather_invariant", "axis_index"}
)

# An array that only lies otherwise in memory: each entry of the result is one entry of the parameter.
LAYOUT = frozenset(
    {"transpose", "reshape", "broadcast_in_dim", "convert_element_type", "squeeze", "expand_dims", "rev", "copy"}
    | {"copy_p", "slice", "dynamic_slice", "concatenate", "reduce_precision", "device_put"}
    | {
        "stop_gradient",
        "sharding_constraint",
        "layout_constraint",
        "reshard",
        "split",
        "stack",
        "unstack",
        "pvary",
        "name",
    }
)

# One entry times one number: a mask or a scale.
SCALES = frozenset({"mul", "div", "select_n", "neg"})

# Rows picked by an index: embedding tables.
LOOKUPS = frozenset({"gather", "take", "dynamic_slice"})

# Bodies that are evaluated whole; what they multiply inside is named, not read.
BLOCKS = {
    "while": "a while loop, whose number of steps depends on the data",
    "cond": "a cond, whose branch depends on data or params",
    "scan": "a loop that was not unrolled",
    "shard_map": "a shard_map over several devices, or one with a collective that has no rule",
    "pallas_call": "a Pallas kernel",
    "custom_call": "a foreign call",
    "ffi_call": "a foreign call",
}
