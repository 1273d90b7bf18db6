"""The table of primitives: one row each, its columns side by side, and what is missing said with its reason."""

import gc
from collections import Counter
from dataclasses import fields

import jax
import numpy as np
import pytest
from jax.experimental import pallas  # noqa: F401  (its primitives are in the table)
from jax.extend.core import Primitive

from pruneopt.program import rows_elementwise
from pruneopt.program.forms import PRODUCTS
from pruneopt.program.primitives import FAMILIES, TABLE, column
from pruneopt.program.row import Row
from pruneopt.program.rows_elementwise import same
from pruneopt.program.versions import CALLS, DERIVATIVES
from pruneopt.program.zeros import at_all, keeps

# In some of the known versions of JAX alone.
SOMETIMES = {"call", "closed_call", "eval_jaxpr", "log2", "one_minus_square", "polynomial", "random_gamma_grad"}

# Rows that say which axes they tie and not where they are zero: {why: primitives}.
WITHOUT_ZEROS = {
    "f(0) is no zero": "acos cos cosh erfc exp exp2 is_finite logistic not one_minus_square",
    "f(0) is not finite or no number": "acosh digamma lgamma log log2 rsqrt",
    "a comparison: its result is no number": "eq eq_to ge gt le le_to lt lt_to ne argmax argmin",
    "bits, not numbers": "bitcast_convert_type clz population_count shift_left shift_right_arithmetic",
    "bits as well": "shift_right_logical mulhi nextafter",
    "a function of two numbers with no simple zero": "atan2 complex igamma igamma_grad_a igammac polygamma pow zeta",
    "as above": "polynomial random_gamma_grad regularized_incomplete_beta",
    "its axes are blocked or counted, so nothing is gained": "iota sort top_k cumlogsumexp cummax cummin cumprod",
    "the same of reductions": "reduce reduce_and reduce_or reduce_prod reduce_xor",
    "the same of windows": "reduce_window reduce_window_max reduce_window_min reduce_window_sum",
    "bounded functions that no network was seen to use": "bessel_i0e bessel_i1e",
}


def test_each_primitive_has_one_row():
    assert Counter(name for family in FAMILIES for name in family.ROWS).most_common(1)[0][1] == 1
    assert len(TABLE) > 140
    assert all(row != Row() for row in TABLE.values())


def test_each_row_is_of_a_primitive_that_exists():
    known = {o.name for o in gc.get_objects() if isinstance(o, Primitive)}
    assert not TABLE.keys() - known - SOMETIMES


class TestColumns:
    """What a row that fills one column must fill beside it."""

    @pytest.mark.parametrize("name", ["layout", "scales", "picks", "product", "zeros", "infinite"])
    def test_whatever_is_known_of_a_primitive_its_axes_are(self, name):
        assert not column(name).keys() - column("axes").keys()

    @pytest.mark.parametrize("name", ["layout", "scales", "picks", "product"])
    def test_what_a_parameter_goes_through_says_where_it_is_zero(self, name):
        assert not column(name).keys() - column("zeros").keys()

    def test_other_rows_without_zeros_are_listed_with_their_reason(self):
        listed = [name for names in WITHOUT_ZEROS.values() for name in names.split()]
        assert len(listed) == len(set(listed))
        assert set(listed) == column("axes").keys() - column("zeros").keys() - {"scan"}  # `Zeros` reads its body

    def test_a_row_ties_axes_or_carries_a_body_or_reads_its_body_for_them(self):
        bodies = column("inlined").keys() | column("whole").keys()
        assert bodies & column("axes").keys() == {"scan"}
        assert bodies | column("axes").keys() == TABLE.keys()

    def test_a_parameter_is_laid_out_otherwise_or_scaled_or_multiplied(self):
        assert not column("layout").keys() & column("scales").keys()
        assert not column("layout").keys() & column("product").keys()

    def test_what_multiplies_has_a_form(self):
        assert column("product").keys() == PRODUCTS

    def test_calls_are_inlined_and_those_with_a_derivative_may_stay_whole(self):
        assert column("inlined").keys() == CALLS.keys()
        assert column("inlined").keys() & column("whole").keys() == DERIVATIVES

    def test_no_column_stays_empty(self):
        for field in fields(Row):
            assert column(field.name), f"no row fills {field.name}"


OTHERWISE = {"convert_element_type", "reduce_precision", "integer_pow", "bitcast_convert_type"}  # take more arguments
COMPLEX, WHOLE = {"conj", "imag", "real"}, {"clz", "population_count"}
UNARY = {name for name, row in rows_elementwise.ROWS.items() if row.axes is same and hasattr(jax.lax, name)} - OTHERWISE


@pytest.mark.parametrize("name", sorted(UNARY))
def test_a_function_of_one_number_is_zero_at_zero_where_its_row_says_so(name):
    zero = jax.numpy.zeros(2, complex if name in COMPLEX else "uint32" if name in WHOLE else float)
    value = np.asarray(getattr(jax.lax, name)(zero))
    if TABLE[name].zeros is keeps:
        np.testing.assert_array_equal(value, np.zeros_like(value))
    elif TABLE[name].infinite is at_all:
        assert not np.isfinite(value).any()
    else:
        assert value.all() or name in ("bessel_i1e", "population_count")
