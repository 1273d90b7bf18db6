"""What the transformations share: an optax optimiser that ends in a `Pruned`, and steps on a support."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pruneopt import _tree
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.laid import laid
from pruneopt.network.leaves import Choice, check_like, partition
from pruneopt.solution import Pruned
from pruneopt.structure.layout import Layout

Tree = Any


class SparseOptimizer(optax.GradientTransformationExtraArgs):
    """An optax optimiser, `init(params)` and `update(gradient, state, params)`, that also knows how to end.

    `finish(params, state)` returns the Pruned network: what the method promises holds in it exactly. It may be called
    at any step, of `gradual` after its `end`, and changes nothing. `state` is this optimiser's, or what holds it: that
    of `optax.chain`, `multi_transform`, `masked` or `MultiSteps` around it, a train state, a restored checkpoint.
    Raises ValueError where training diverged (weights that are not finite have no largest ones to keep), where what is
    chained after this one moved weights that it had set (it must be the last of a chain), and where a leaf lost all its
    weights although the constraint does not allow it.
    """

    finish: Callable[[Tree, Any], Pruned]

    def __new__(
        cls, init: Callable, update: Callable, finish: Callable[[Tree, Any], Pruned], scope: str = ""
    ) -> SparseOptimizer:
        """From the three functions; scope: what shares one budget, in words."""

        def finished(params: Tree, state: Any) -> Pruned:
            _tree.check_here(params, "params")
            _tree.check_here(state, "state")
            _check_converged(params)
            done = replace(finish(params, state), scope=scope)
            _check_converged(done.params)
            return done

        self = super().__new__(cls, init, update)  # type: ignore[call-arg]
        self.finish = finished
        return self


def _check_converged(params: Tree) -> None:
    path = _tree.first_nonfinite(params)
    if path is not None:
        raise ValueError(
            f"params holds a NaN or an infinity in leaf '{path}': training diverged; pass a smaller learning rate"
        )


class MaskedState(NamedTuple):
    """step: updates made. masks: True where a weight lives, None where nothing is pruned. inner: its optimiser."""

    step: jax.Array
    masks: Tree
    inner: Any


def is_hole(x: Any) -> bool:
    """Whether a leaf is a hole."""
    return x is None


def on_masks(fn: Callable[..., Any], masks: Tree, *trees: Tree) -> Tree:
    """fn(mask, *leaves) at the leaves that are pruned, None at the others; `trees` are like the parameters."""
    return jax.tree.map(lambda m, *xs: None if m is None else fn(m, *xs), masks, *trees, is_leaf=is_hole)


def filled(tree: Tree, params: Tree) -> Tree:
    """`tree` with the leaves of `params` where it has holes."""
    return jax.tree.map(lambda x, p: p if x is None else x, tree, params, is_leaf=is_hole)


def chosen(params: Tree, leaves: Choice, constraint: Constraint | None = None) -> Tree:
    """The leaves to prune, None at the others, checked against the constraint."""
    if _tree.is_array(params) and params.ndim == 1:
        raise ValueError(
            "params is one vector, in which no leaf is told from another; optax.flatten goes inside this "
            "transformation, gradual(optax.flatten(optax.adam(1e-3)), ...), not around it"
        )
    picked, _ = partition(params, leaves)
    if constraint is not None:
        constraint.check(picked)
    return picked


def everywhere(picked: Tree) -> Tree:
    """True at every weight."""
    return jax.tree.map(lambda x: jnp.ones(x.shape, bool), picked)


def settled(masks: Tree, params: Tree, updates: Tree) -> Tree:
    """`updates`, but -w off the support, so that w + update is exactly zero there."""

    def one(m: Any, w: Any, u: Any) -> Any:
        return u if m is None else jnp.where(m, u, -w.astype(u.dtype))

    return jax.tree.map(one, masks, params, updates, is_leaf=is_hole)


def towards(target: Tree, params: Tree, updates: Tree) -> Tree:
    """The updates that take `params` to `target`; where that has holes, `updates`."""

    def one(t: Any, w: Any, u: Any) -> Any:
        return u if t is None else t.astype(u.dtype) - w.astype(u.dtype)

    return jax.tree.map(one, target, params, updates, is_leaf=is_hole)


def forgotten(state: Any, masks: Tree) -> Any:
    """An optimiser's state with zeros off the support.

    A leaf of the state belongs to the parameter whose path its own path ends with, if their shapes agree: momentum
    and second moments of any optax optimiser, masked and per-group ones too.
    """
    owners = dict(jax.tree_util.tree_flatten_with_path(masks)[0])

    def one(path: tuple, leaf: Any) -> Any:
        for i in range(len(path) + 1):
            mask = owners.get(path[i:])
            if mask is not None and mask.shape == leaf.shape:
                return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))
        return leaf

    return jax.tree_util.tree_map_with_path(one, state)


def step_on(
    optimizer: optax.GradientTransformationExtraArgs,
    gradient: Tree,
    inner: Any,
    params: Tree,
    masks: Tree,
    extra: dict[str, Any],
) -> tuple[Tree, Any]:
    """One step of the optimiser that sees, moves and remembers nothing off the support.

    Masks on what an optimiser reads cost nothing, they fuse with its arithmetic; on what it writes they cost a copy of
    its state. So the state is masked after the step only where zeros do not lead to zeros (AdaBelief's eps).
    """
    updates, new = optimizer.update(_tree.masked(gradient, masks), forgotten(inner, masks), params, **extra)
    if extra or not keeps_zeros(optimizer, params):
        new = forgotten(new, masks)
    return settled(masks, params, updates), new


def keeps_zeros(optimizer: optax.GradientTransformation, params: Tree) -> bool:
    """Whether a state that is zero stays zero where weight and gradient are; a step on one weight a leaf tells."""
    leaves, structure = jax.tree.flatten(params)
    return _keeps_zeros(optimizer, structure, tuple((jnp.ndim(x), jnp.result_type(x)) for x in leaves))


@lru_cache(maxsize=64)
def _keeps_zeros(optimizer: optax.GradientTransformation, structure: Any, leaves: tuple[tuple[int, Any], ...]) -> bool:
    @jax.jit
    def moved() -> list[jax.Array]:
        tiny = jax.tree.unflatten(structure, [jnp.zeros((1,) * ndim, dtype) for ndim, dtype in leaves])
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), tiny)
        _, state = optimizer.update(tiny, forgotten(optimizer.init(tiny), nothing), tiny)
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(forgotten(state, nothing)), strict=True)
        return [jnp.any(x != zero) for x, zero in pairs]

    with jax.ensure_compile_time_eval():
        return not any(map(bool, moved()))


def magnitudes(masks: Tree, params: Tree) -> Tree:
    """|w| where the mask is True, -inf elsewhere: scores for `Constraint.select` that never bring a weight back."""
    return on_masks(lambda m, w: jnp.where(m, jnp.abs(w), jnp.asarray(-jnp.inf, w.dtype)), masks, params)


def as_optimizer(optimizer: Any, name: str) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, checked. Raises TypeError for anything that is not an optax transformation."""
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer is {optimizer!r}; pass an optax optimiser: {name}(optax.adam(1e-3), ...)")
    return optax.with_extra_args_support(optimizer)


def checked_constraint(constraint: Any, layout: Layout | None) -> Constraint:
    """The constraint on the matrices of `layout`, where that is given.

    Raises TypeError for what is no constraint or layout, ValueError for a constraint that bounds values: no step
    projects.
    """
    if not isinstance(constraint, Constraint):
        raise TypeError(f"constraint is {constraint!r}; pass a constraint such as Cardinality(sparsity=0.9)")
    if constraint.bounds_values:
        raise ValueError(
            f"constraint={constraint!r} bounds values, which no step here projects; pass a constraint on supports "
            "alone such as Cardinality(sparsity=0.9), or a penalty such as L1(1e-4) to `proximal`"
        )
    return laid(constraint, layout)


def checked(params: Tree | None, gradient: Tree, held: Tree) -> Tree:
    """`params`, or ValueError where there are none, or the gradient or `held`, a tree of the state with holes, are not
    like them.
    """
    if params is None:
        raise ValueError("params is None; call update(gradient, state, params): the zeros are where the weights are")
    given, first = (jax.tree.structure(tree, is_leaf=is_hole) for tree in (params, held))
    if given != first:
        raise ValueError(f"params has structure {given}, at `init` it had {first}; pass those, or a new state")
    check_like(gradient, params, "gradient")
    return params


def own_state(state: Any, kind: type, params: Tree) -> Any:
    """The only state of that kind in `state`, its trees laid out like `params` by the paths of their leaves.

    So it is found in what wraps it: chains, `optax.multi_transform` and `masked`, a train state, the variables of NNX,
    and a checkpoint restored as plain dictionaries. Raises ValueError where there is none or more than one, or where
    its leaves are not those of `params`.
    """
    names = set(kind._fields)  # type: ignore[attr-defined]

    def is_one(s: Any) -> bool:
        return isinstance(s, kind) or (isinstance(s, Mapping) and set(s) == names)

    found = [s for s in jax.tree.leaves(state, is_leaf=is_one) if is_one(s)]
    if not found:
        raise ValueError(
            "state holds 0 states of this transformation; pass the state that its own update returned, and restore a "
            "checkpoint into the structure of init(params)"
        )
    if len(found) > 1:
        raise ValueError(
            f"state holds {len(found)} states of this transformation; pass the one of its own group, such as "
            "state.inner_states['group'] of optax.multi_transform"
        )
    fields = dict(found[0]) if isinstance(found[0], Mapping) else found[0]._asdict()
    return kind(**{name: x if name.endswith("inner") else _laid(name, x, params) for name, x in fields.items()})


def _laid(name: str, tree: Any, params: Tree) -> Any:
    """A field of a state like `params`, None where it has no leaf there; a number as an array."""
    leaves = {_plain(path): jnp.asarray(leaf) for path, leaf in _tree.named_leaves(tree)}
    shapes = {_plain(path): np.shape(leaf) for path, leaf in _tree.named_leaves(params)}
    if leaves.keys() == {""} and "" not in shapes:
        return leaves[""]
    for path, leaf in leaves.items():
        if path not in shapes or (name == "masks" and leaf.shape != shapes[path]):
            there = f"'{path}' of shape {shapes[path]}" if path in shapes else f"no leaf '{path}'"
            raise ValueError(
                f"state has {name} for '{path}' of shape {leaf.shape}, params has {there}; pass the params that this "
                "state was trained with"
            )
    return _tree.map_named(lambda path, _: leaves.get(_plain(path)), params)


def _plain(path: str) -> str:
    """A path without the name of a variable's only leaf, as NNX has it."""
    return "" if path == "value" else path.removesuffix("/value")


def on_support(params: Tree, masks: Tree, step: Any, name: str) -> Pruned:
    """The Pruned with these masks. Raises ValueError where a weight off the support is not zero.

    At step 0, before the first update, weights off the support are still what they were; there they are cut.
    """
    if int(step) == 0:
        return Pruned(_tree.masked(params, masks), masks)
    moved = _tree.outside(on_masks(lambda m, w: w, masks, params), masks)
    if moved:
        raise ValueError(f"params holds {moved} nonzero weights off the support: {moved_by(name)}")
    return Pruned(params, masks)


def check_trained(params: Tree, sparse: Tree, dense: Tree, step: Any, name: str) -> None:
    """Raise ValueError unless `params` are the weights `sparse` that the last update led to.

    Exactly so at zeros; elsewhere to the root of a unit roundoff of the largest of `dense`, since adding an update
    rounds. Both have None where nothing is pruned. Before the first update, at step 0, nothing is known.
    """
    if int(step) == 0:
        return
    held = jax.tree.map(lambda t, w: None if t is None else w, sparse, params, is_leaf=is_hole)
    for (path, w), t, d in zip(_tree.named_leaves(held), *map(jax.tree.leaves, (sparse, dense)), strict=True):
        near = jnp.max(jnp.abs(d)) * jnp.sqrt(jnp.finfo(d.dtype).eps).astype(d.dtype)
        moved = int(jnp.sum(jnp.where(t == 0, w != 0, jnp.abs(w - t) > near)))
        if moved:
            raise ValueError(
                f"params holds {moved} weights in leaf '{path}' that are not those of this state: {moved_by(name)}"
            )


def moved_by(name: str) -> str:
    """Why the params are not what a transformation made of them, and what to do."""
    return (
        f"a transformation after this one moved them; put it inside, {name}(optax.chain(...), ...), so that the "
        "support has the last word; averaged (EMA) weights take the support by po.apply(ema, pruned)"
    )


def check_alive(done: Pruned, constraint: Constraint) -> Pruned:
    """`done`; ValueError where a leaf lost all its weights and the constraint does not allow it, as in `solve`."""
    if not constraint.allows_empty:
        for (path, _), kept in zip(_tree.named_leaves(done.support), _tree.kept_by_leaf(done.support), strict=True):
            if kept == 0:
                raise ValueError(
                    f"constraint={constraint!r} keeps no weight of leaf '{path}': the layer has collapsed; lower the "
                    "sparsity, pass floor=1 (or more) to keep some, or floor=0 to allow it"
                )
    return done


def held_from(end: int, params: Tree, own: Any, constraint: Constraint, name: str) -> Pruned:
    """The Pruned on the masks that a state holds from step `end` on; before, cut to the constraint's best by |w|."""
    if int(own.step) > end:
        return check_alive(on_support(params, own.masks, own.step, name), constraint)
    masks = constraint.select(on_masks(lambda m, w: jnp.abs(w), own.masks, params))
    return check_alive(Pruned(_tree.masked(params, masks), masks), constraint)
