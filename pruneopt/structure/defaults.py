"""Which leaves are decided where the user does not say: those that the network multiplies as weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from pruneopt import _tree
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice, Default, is_floating, is_prunable
from pruneopt.network.network import Network
from pruneopt.program.weights import multiplied

Tree = Any


def default_leaves(fn: Callable[[Tree, Any], Any] | None, params: Tree, batch: Any = None) -> Choice:
    """The default choice of every call that is given fn, as a predicate for leaves=.

    Floating arrays of two or more axes that fn multiplies as weights, whatever their names: kernels, and not a class
    token, position embeddings, a scale of layers or the exponents of a state space (`program.weights`). Tables of which
    data pick rows are chosen by `is_prunable`, by shape and name, tied ones too; so are leaves that fn does not use,
    and all where fn or batch are None or fn multiplies no leaf. Raises as `trace`.
    """
    if fn is None or batch is None:
        return is_prunable
    found = multiplied(fn, params, batch)
    if not found.matrices:
        return is_prunable
    chosen, left_out = set(), {}
    for path, leaf in _tree.named_leaves(params):
        by_name = is_prunable(path, leaf)
        is_weight = path in found.matrices and _is_wide(leaf)
        if by_name if path in found.looked_up | found.unused else is_weight:
            chosen.add(path)
        elif by_name:
            left_out[path] = "it is in no product of weights and activations"
    return Default(frozenset(chosen), left_out)


def settled(leaves: Choice, fn: Any, params: Tree, batches: Batches | None) -> Choice:
    """The choice as given, or by the first batch where the user does not say. Raises as `default_leaves`."""
    if leaves is not None or batches is None or not callable(fn) or not any(map(_is_wide, jax.tree.leaves(params))):
        return leaves
    return default_leaves(fn, params, batches.first)


def network_of(fn: Any, params: Tree, batches: Source | Batches | None, leaves: Choice = None) -> Network:
    """What the user hands in, its choice of leaves settled. Raises what `Network.of` and `default_leaves` raise."""
    source = None if batches is None else Batches(batches)
    return Network.of(fn, params, source, settled(leaves, fn, params, source))


def loss_network(fn: Any, params: Tree, batches: Source | Batches, leaves: Choice = None) -> Network:
    """The same of a loss that sees every chosen leaf. Raises what `Network.check_loss` raises too."""
    network = network_of(fn, params, batches, leaves)
    network.check_loss()
    return network


def _is_wide(leaf: Any) -> bool:
    return is_floating("", leaf) and leaf.ndim >= 2
