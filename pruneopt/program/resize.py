"""How primitives take the sizes that are left once units are deleted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from pruneopt.program.axes import Ids, Reader
from pruneopt.program.program import Equation

Gone = Mapping[int, Bool[np.ndarray, " units"]]  # {class of units: which of them are deleted}
Resize = Callable[["Site", list[Any]], tuple[dict[str, Any], list[Any]]]  # (changed parameters, changed inputs)


class Left:
    """What is left of a program's axes where units `gone` are deleted."""

    def __init__(self, reader: Reader, gone: Gone):
        self.reader, self._gone = reader, gone
        self._kept: dict[int, Bool[np.ndarray, " n"]] = {}

    def kept(self, axis: int) -> Bool[np.ndarray, " n"]:
        """Which entries of an axis are left."""
        if axis not in self._kept:
            axes = self.reader.axes
            kept = np.ones(axes.size[axis], bool)
            for atom in self._gone.keys() & set(axes.atoms(axis)):
                kept &= ~np.any(axes.owned(axis, atom)[self._gone[atom]], axis=0)
            self._kept[axis] = kept
        return self._kept[axis]

    def any(self, axis: int) -> bool:
        """Whether any entry of an axis is left."""
        return bool(self.kept(axis).any())

    def sizes(self, ids: Ids) -> tuple[int, ...]:
        """How many entries of each axis are left; all of an axis of copies, which each reader cuts for itself."""
        return tuple(
            self.reader.axes.size[axis] if axis in self.reader.copies else int(self.kept(axis).sum()) for axis in ids
        )

    def sliced(self, value: Any, ids: Ids, but: int = -1) -> Any:
        """An array without the deleted entries of these axes, all but one of them."""
        for k, axis in enumerate(ids):
            if k != but and not (kept := self.kept(axis)).all():
                value = taken(value, np.flatnonzero(kept), k)
        return value

    def fitted(self, value: Any, own: Ids, read: Ids, but: int = -1) -> Any:
        """An array with as many copies along each axis, all but one of them, as its reader needs."""
        for k, (axis, needed) in enumerate(zip(own, read, strict=True)):
            if k != but and axis != needed and not (kept := self.kept(needed)).all():
                value = jax.lax.slice_in_dim(value, 0, int(kept.sum()), axis=k)
        return value

    def resized(self, sizes: Mapping[int, int]) -> Left:
        """The same where these axes have other sizes."""
        other = Left(self.reader, self._gone)
        other._kept = self._kept | {axis: np.ones(n, bool) for axis, n in sizes.items()}
        return other


class Site(NamedTuple):
    """Where an equation stands: what is left of its inputs and outputs."""

    left: Left
    equation: Equation
    read: tuple[Ids, ...]

    def shape(self, i: int) -> tuple[int, ...]:
        """Of input i before."""
        return self.left.reader.shape(self.equation.inputs[i])

    def kept(self, i: int, k: int) -> Bool[np.ndarray, " n"]:
        """Entries of axis k of input i that are left."""
        return self.left.kept(self.read[i][k])

    def out(self, i: int) -> tuple[int, ...]:
        """The shape of output i."""
        return self.left.sizes(self.left.reader.of(self.equation.outputs[i]))


def taken(value: Any, at: np.ndarray, axis: int) -> Any:
    """The entries `at`, in order, along an axis: a slice where they are evenly spaced."""
    steps = np.unique(np.diff(at))
    if not len(at) or len(steps) > 1 or (len(steps) and steps[0] < 1):
        return value.take(at, axis=axis)
    step = int(steps[0]) if len(steps) else 1
    place = tuple(slice(int(at[0]), int(at[-1]) + 1, step) if k == axis else slice(None) for k in range(value.ndim))
    return value[place]


def to_shape(name: str) -> Resize:
    """The parameter of that name is the shape of the result."""
    return lambda site, values: ({name: site.out(0)}, values)


def reshaped(site: Site, values: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """To the sizes that are left."""
    return {"new_sizes": site.out(0)}, values


def cut(site: Site, values: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """A slice of what is left: the entries that it takes are first picked, where they are no stretch."""
    p = site.equation.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    value = values[0]
    for k, (start, stop, step) in enumerate(zip(p["start_indices"], p["limit_indices"], strides, strict=True)):
        kept = site.kept(0, k)
        if not kept.all():
            at = np.arange(start, stop, step)
            value = taken(value, (np.cumsum(kept) - 1)[at[kept[at]]], k)
        else:
            value = taken(value, np.arange(start, stop, step), k)
    shape = value.shape
    return {"start_indices": (0,) * len(shape), "limit_indices": shape, "strides": None}, [value]


def split(site: Site, values: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """Into what is left of each part."""
    k = site.equation.params["axis"]
    return {"sizes": tuple(site.out(i)[k] for i in range(len(site.equation.outputs)))}, values


def dynamic_slice(site: Site, values: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """At known places of axes that are cut; axes sliced at unknown ones are whole."""
    value, *starts = values
    for k, size in enumerate(site.equation.params["slice_sizes"]):
        kept = site.kept(0, k)
        if size != len(kept) and not kept.all():
            known = site.left.reader.known(site.equation.inputs[1 + k])
            assert known is not None
            at = np.arange(size) + int(np.clip(known, 0, len(kept) - size))
            value = taken(value, (np.cumsum(kept) - 1)[at[kept[at]]], k)
            starts[k] = np.zeros((), starts[k].dtype)
    return {"slice_sizes": site.out(0)}, [value, *starts]


def gathered(site: Site, values: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """Whole slices stay whole."""
    sizes = tuple(
        values[0].shape[k] if size == n else size
        for k, (size, n) in enumerate(zip(site.equation.params["slice_sizes"], site.shape(0), strict=True))
    )
    return {"slice_sizes": sizes}, values


def convolved(site: Site, values: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """As many groups as channels are left for."""
    spec, (image, kernel, *rest) = site.equation.params["dimension_numbers"], values
    channels, inside = image.shape[spec.lhs_spec[1]], kernel.shape[spec.rhs_spec[1]]
    if not channels:  # nothing is summed
        kernel, inside = jax.lax.slice_in_dim(kernel, 0, 0, axis=spec.rhs_spec[1]), 0
    return {"feature_group_count": channels // inside if inside else 1}, [image, kernel, *rest]
