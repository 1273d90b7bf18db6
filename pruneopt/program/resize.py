"""How primitives take the sizes that are left: their changed parameters and inputs."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from pruneopt.program.rewrite import Resize, Site, taken


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
            known = site.program.reader.known(site.equation.inputs[1 + k])
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
