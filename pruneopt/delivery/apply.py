"""Put a support on parameters."""

from __future__ import annotations

from typing import Any

import jax

from pruneopt import _tree
from pruneopt.constraints.support import Support
from pruneopt.solution import Pruned, Solution

Tree = Any


def apply(params: Tree, pruned: Pruned | Solution | Tree) -> Tree:
    """`params` with exact zeros off the support; other leaves are the very objects given.

    pruned: what `prune` or `solve` returned (its support is used, not its values), or a tree of boolean masks, with
        None or no entry at all where nothing is pruned. Use it to hold a support through your own training.
    Raises ValueError for a mask whose path or shape `params` does not have, TypeError for one that is not boolean.
    """
    for name, tree in (("params", params), ("pruned", pruned)):
        _tree.check_here(tree, name, may_be_traced=True)
    support = pruned.support if isinstance(pruned, (Pruned, Solution)) else pruned
    masks = dict(_tree.named_leaves(support))
    arrays = {path: leaf for path, leaf in _tree.named_leaves(params) if path in masks or _tree.is_array(leaf)}
    Support(masks).check(arrays)

    def one(path: str, leaf: Any) -> Any:
        return _tree.placed(_tree.masked(leaf, masks[path]), leaf) if path in masks else leaf

    return _tree.map_named(one, params)


@_tree.on_host
def from_masks(params: Tree, masks: Tree) -> Pruned:
    """A Pruned from the masks of any tool: booleans, or numbers of which zero means pruned.

    masks: a tree like `params`, or {path: mask}; None or no entry where nothing is pruned.
    Raises as `apply`; also ValueError where no mask is given.
    """
    for path, mask in _tree.named_leaves(masks):
        if not hasattr(mask, "dtype"):
            raise TypeError(f"masks: '{path}' is a {type(mask).__name__}; pass an array")
    bad = _tree.first_nonfinite(masks)
    if bad is not None:
        raise ValueError(
            f"masks: '{bad}' holds a NaN or an infinity; pass booleans, or numbers of which zero means pruned"
        )
    named = {path: mask != 0 if mask.dtype != bool else mask for path, mask in _tree.named_leaves(masks)}
    if not named:
        raise ValueError("masks holds no mask; pass {path: boolean array}")
    arrays = {path: jax.numpy.asarray(mask) for path, mask in named.items()}
    support = _tree.map_named(lambda path, leaf: _tree.placed(arrays.get(path), leaf), params)
    return Pruned(apply(params, named), support, scope="a given support")
