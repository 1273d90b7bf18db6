"""Units deleted from a network, and the same units zeroed in its leaves: what the two should agree on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def free(found):
    """The groups of which units can be cut."""
    return [group for group in found.groups if not group.blocked and group.size > 1]


def share(found):
    """The part of the parameters that stand in leaves with an axis of which units can be cut."""
    cut = {path for group in free(found) for path, _ in group.members}
    sizes = {path: int(np.prod(found.type_of(path).shape)) for path in found.paths}
    floats = {path: n for path, n in sizes.items() if jnp.issubdtype(found.type_of(path).dtype, jnp.floating)}
    return sum(n for path, n in floats.items() if path in cut) / sum(floats.values())


class Cut(NamedTuple):
    """Groups that are cut in one smaller network. kept: what `shrink_units` takes. gone: {path: {axis: booleans}}."""

    groups: list[Any]
    kept: dict[tuple[str, int], np.ndarray]
    gone: dict[str, dict[int, np.ndarray]]


def rounds(found, seed=0):
    """All free groups a third at a time, the first and the last unit among them; several groups in one network.

    Groups that share an axis of a leaf are named by another of their members, or come in a later round.
    """
    random, left = np.random.default_rng(seed), free(found)
    while left:
        cut, later = Cut([], {}, {}), []
        for group in left:
            name = next((member for member in group.members if member not in cut.kept), None)
            if name is None:
                later.append(group)
                continue
            units = _third(group.size, random)
            cut.groups.append(group)
            for path, axis in group.members:
                n = found.type_of(path).shape[axis]
                lost = cut.gone.setdefault(path, {}).setdefault(axis, np.zeros(n, bool))
                lost[found.places(group, path, axis)[units].ravel()] = True
            n = found.type_of(name[0]).shape[name[1]]
            own = np.ones(n, bool)
            own[found.places(group, *name)[units].ravel()] = False
            cut.kept[name] = own
        yield cut
        left = later


def _third(size, random):
    """Numbers of about a third of the units, with the first and the last where that is two or more."""
    count = max(1, round(size / 3))
    if count == 1:
        return np.array([random.choice([0, size - 1])])
    return np.sort([0, size - 1, *(1 + random.permutation(size - 2)[: count - 2])]).astype(int)


def zeroed(params, gone):
    """Zeros in the entries of the units that are gone."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for axis, lost in gone.get(name, {}).items():
            place = [-1 if k == axis else 1 for k in range(leaf.ndim)]
            leaf = jnp.asarray(np.where(lost.reshape(place), np.zeros((), leaf.dtype), np.asarray(leaf)))
        return leaf

    return jax.tree_util.tree_map_with_path(one, params)


def difference(before, after):
    """The largest |after - before| over the largest |before|, of two trees of outputs."""
    pairs = list(zip(map(np.asarray, jax.tree.leaves(before)), map(np.asarray, jax.tree.leaves(after)), strict=True))
    largest = max(np.max(np.abs(a)) for a, _ in pairs)
    return float(max(np.max(np.abs(a - b), initial=0.0) for a, b in pairs) / largest)
