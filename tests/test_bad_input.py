"""Every refusal says what was given and what to pass instead, at the right moment, and leaves `params` alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pruneopt as po
from pruneopt.bounds import Separable
from pruneopt.constraints import NM, Blocks, ByPath, Cardinality, Intersection, Slices, Support, TransposableNM
from pruneopt.curvature import Diagonal, Gram, Identity, hutchinson_diagonal
from pruneopt.objectives import Loss, Quadratic, Reconstruction
from pruneopt.solvers import Descent, Polish, Score, Then
from pruneopt.solvers.base import Outcome

RNG = np.random.default_rng(0)


def params():
    return {
        "w1": jnp.asarray(RNG.standard_normal((4, 6))),
        "b1": jnp.zeros(6),
        "w2": jnp.asarray(RNG.standard_normal((6, 2))),
    }


def loss(p, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ p["w1"] + p["b1"][None]) @ p["w2"] - y) ** 2)


class Unhashable:
    __hash__ = None

    def __call__(self, p, batch):
        return loss(p, batch)


def batches(n=2):
    return [(jnp.asarray(RNG.standard_normal((5, 4))), jnp.asarray(RNG.standard_normal((5, 2)))) for _ in range(n)]


def prune(p=None, constraint=None, fn=loss, data=None, **options):
    return po.prune(
        fn,
        params() if p is None else p,
        batches() if data is None else data,
        constraint or Cardinality(sparsity=0.5),
        progress=False,
        **options,
    )


def total(p):
    return jnp.sum(p["w1"]) + jnp.sum(p["w2"])


def nan_above(p, batch):
    return loss(p, batch) * jnp.where(jnp.max(batch[0]) > 90, jnp.nan, 1.0)


def with_leaf(**leaves):
    return {**params(), **leaves}


def nan_at(tree, name):
    return {**tree, name: tree[name].at[(0,) * tree[name].ndim].set(jnp.nan)}


class Shrinking:
    """Batches whose later passes end early."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(batches(3 if self.passes <= 2 else 1))


class Half:
    """A schedule that makes half of the cut."""

    def stages(self, density):
        return [po.plans.Stage(0.5)]


class Tracked:
    """Batches that count how often they are read."""

    reads = 0

    def __iter__(self):
        Tracked.reads += 1
        return iter(batches())


# (what is called, the exception, words that the sentence must hold: argument, value, remedy)
CASES = {
    "sparsity above 1": (lambda: Cardinality(sparsity=1.5), ValueError, ("sparsity=1.5", "[0, 1)", "pass")),
    "a number without a name": (lambda: Cardinality(0.9), TypeError, ("Cardinality(0.9)", "sparsity=", "count=")),
    "per names in a tuple": (
        lambda: Cardinality(sparsity=0.5, per=("in", "out")),
        ValueError,
        ("per=", "pass one name"),
    ),
    "sparsity 1": (lambda: Cardinality(sparsity=1.0), ValueError, ("sparsity=1.0", "[0, 1)")),
    "sparsity negative": (lambda: Cardinality(sparsity=-0.1), ValueError, ("sparsity=-0.1", "[0, 1)")),
    "sparsity NaN": (lambda: Cardinality(sparsity=float("nan")), ValueError, ("sparsity=nan", "[0, 1)")),
    "sparsity text": (lambda: Cardinality(sparsity="90%"), ValueError, ("sparsity='90%'", "[0, 1)")),
    "count negative": (lambda: Cardinality(count=-1), ValueError, ("count=-1", "pass the number")),
    "count fraction": (lambda: Cardinality(count=2.5), ValueError, ("count=2.5", "whole number")),
    "count above size": (
        lambda: prune(constraint=Cardinality(count=37)),
        ValueError,
        ("count=37", "36", "pass count <= 36"),
    ),
    "count above a leaf's size": (
        lambda: prune(constraint=Cardinality(count=20, per="leaf")),
        ValueError,
        ("count=20", "12", "pass count"),
    ),
    "both amounts": (lambda: Cardinality(sparsity=0.5, count=3), ValueError, ("both", "sparsity=0.5", "exactly one")),
    "no amount": (lambda: Cardinality(), ValueError, ("neither", "exactly one")),
    "unknown scope": (lambda: Cardinality(count=1, per="row"), ValueError, ("per='row'", "pass 'tree'")),
    "axis that is not there": (
        lambda: prune(constraint=Cardinality(count=1, per=2)),
        ValueError,
        ("per=2", "'w1'", "2 axes"),
    ),
    "floor above the budget": (
        lambda: prune(constraint=Cardinality(count=5, floor=4)),
        ValueError,
        ("floor=4", "8", "5", "lower"),
    ),
    "floor for slices": (lambda: Cardinality(count=1, per="out", floor=1), ValueError, ("floor=1", "per='out'")),
    "N above M": (lambda: NM(5, 4), ValueError, ("n=5", "m=4", "1 <= n <= m")),
    "N zero": (lambda: NM(0, 4), ValueError, ("n=0", "1 <= n <= m")),
    "M does not divide": (lambda: prune(constraint=NM(2, 5)), ValueError, ("m=5", "'w1'", "length 4", "leaves=")),
    "N:M axis unknown": (lambda: NM(2, 4, axis="input"), ValueError, ("axis='input'", "pass 'in'")),
    "no span": (lambda: Cardinality(count=1, per="in", span=0), ValueError, ("span=0", ">= 1", "pass")),
    "span of a half": (lambda: Cardinality(count=1, per="in", span=0.5), ValueError, ("span=0.5", "whole number")),
    "span over the tree": (lambda: Cardinality(count=1, span=2), ValueError, ("span=2", "per='tree'", "per='in'")),
    "count above a run's size": (
        lambda: prune(constraint=Cardinality(count=13, per="in", span=2)),
        ValueError,
        ("count=13", "12", "pass count"),
    ),
    "transposable N above M": (lambda: TransposableNM(5, 4), ValueError, ("n=5", "m=4", "1 <= n <= m")),
    "M does not divide both ways": (
        lambda: prune(constraint=TransposableNM(2, 4)),
        ValueError,
        ("m=4", "4 inputs", "6 outputs", "'w1'", "leaves="),
    ),
    "transposable vector": (
        lambda: TransposableNM(1, 2).check({"b1": jnp.zeros(6)}),
        ValueError,
        ("'b1'", "(6,)", "leaves="),
    ),
    "blocks do not tile": (
        lambda: prune(constraint=Blocks((4, 4), Cardinality(sparsity=0.5))),
        ValueError,
        ("shape=(4, 4)", "'w1'", "leaves="),
    ),
    "block of length zero": (lambda: Blocks((0, 4), Cardinality(sparsity=0.5)), ValueError, ("shape=(0, 4)", ">= 1")),
    "slice axis": (lambda: prune(constraint=Slices(3, Cardinality(count=1))), ValueError, ("axis=3", "'w1'")),
    "mask of another shape": (
        lambda: prune(constraint=Support({"w1": jnp.ones((3, 6), bool)})),
        ValueError,
        ("mask 'w1'", "(3, 6)", "(4, 6)"),
    ),
    "mask of a leaf that is not there": (
        lambda: prune(constraint=Support({"w9": jnp.ones((3, 6), bool)})),
        ValueError,
        ("'w9'", "w1"),
    ),
    "mask of floats": (
        lambda: prune(constraint=Support({"w1": jnp.ones((4, 6))})),
        TypeError,
        ("mask 'w1'", "float", "booleans"),
    ),
    "leaf without a pattern": (
        lambda: prune(constraint=ByPath({"w1": NM(2, 4)})),
        ValueError,
        ("'w2'", "['w1']", "'*'"),
    ),
    "empty tree": (lambda: prune({}), ValueError, ("params", "empty", "pass")),
    "no prunable leaf": (lambda: prune({"b": jnp.zeros(3)}), ValueError, ("no prunable leaf", "['b']", "leaves=")),
    "pattern without a leaf": (lambda: prune(leaves="w3"), ValueError, ("'w3'", "matches no leaf", "w1")),
    "integer leaf chosen": (
        lambda: prune(with_leaf(n=jnp.ones((2, 2), int)), leaves=["w1", "n"]),
        TypeError,
        ("'n'", "int", "leaves="),
    ),
    "complex leaf chosen": (
        lambda: prune(with_leaf(z=jnp.ones((2, 2), complex)), leaves="z"),
        TypeError,
        ("'z'", "complex", "leaves="),
    ),
    "function leaf chosen": (lambda: prune(with_leaf(f=jnp.tanh), leaves="f"), TypeError, ("'f'", "leaves=")),
    "empty leaf chosen": (
        lambda: prune(with_leaf(e=jnp.ones((0, 2))), leaves="e"),
        ValueError,
        ("'e'", "no entries", "leaves="),
    ),
    "NaN in params": (lambda: prune(nan_at(params(), "w2")), ValueError, ("params", "'w2'", "NaN")),
    "infinity in params": (
        lambda: prune(with_leaf(w1=jnp.full((4, 6), jnp.inf))),
        ValueError,
        ("params", "'w1'", "infinity"),
    ),
    "NaN in a leaf that is only read": (
        lambda: prune(nan_at(params(), "b1"), method="taylor"),
        ValueError,
        ("batches: batch 0: fn returns nan", "repair"),
    ),
    "NaN in a batch": (
        lambda: prune(data=[*batches(1), (jnp.full((5, 4), jnp.nan), jnp.zeros((5, 2)))], method="taylor"),
        ValueError,
        ("batches", "batch 1", "NaN"),
    ),
    "NaN in a gradient": (
        lambda: prune(fn=lambda p, b: jnp.sqrt(jnp.sum(p["w1"] * 0) + 0 * jnp.sum(p["w2"])), method="fisher"),
        ValueError,
        ("gradient of fn", "NaN", "'w1'"),
    ),
    **{
        f"NaN of the loss on one batch, {method}": (
            lambda method=method: prune(
                fn=nan_above, data=[*batches(), (batches(1)[0][0] + 99, batches(1)[0][1])], method=method
            ),
            ValueError,
            ("batches: batch 2: fn returns nan at the given params; repair that batch",),
        )
        for method in ("snip", "grasp", "obd", "fisher", "m_fac", "kfac_obd", "hap", "kfac_channels")
    },
    **{
        f"Fisher of zero, {method}": (
            lambda method=method: prune(fn=lambda p, b: 0 * loss(p, b), method=method),
            ValueError,
            ("Fisher of fn", "zero everywhere", "method='magnitude'"),
        )
        for method in ("obs", "woodfisher", "cbs", "kfac_obs", "global_steps")
    },
    "gradient of zero": (
        lambda: prune(fn=lambda p, b: jnp.mean(b[0]) + 0 * total(p), method="taylor"),
        ValueError,
        ("gradient of fn", "zero everywhere", "method='obd'"),
    ),
    "gradient of zero, GraSP": (
        lambda: prune(fn=lambda p, b: jnp.mean(b[0]) + 0 * total(p), method="grasp"),
        ValueError,
        ("gradient of fn", "zero everywhere"),
    ),
    "Fisher of zero": (
        lambda: prune(fn=lambda p, b: jnp.mean(b[0]) + 0 * total(p), method="fisher"),
        ValueError,
        ("Fisher of fn", "zero everywhere", "method='magnitude'"),
    ),
    "Hessian of zero": (
        lambda: prune(fn=lambda p, b: jnp.mean(b[0]) + total(p), method="obd"),
        ValueError,
        ("Hessian of fn", "zero everywhere", "method='magnitude'"),
    ),
    "gradient of another structure": (
        lambda: po.Problem(
            Quadratic({"w": jnp.ones((2, 2))}, None, {"v": jnp.ones((2, 2))}), subject_to=Cardinality(count=1)
        ),
        ValueError,
        ("gradient", "structure"),
    ),
    "gradient of another shape": (
        lambda: po.Problem(
            Quadratic({"w": jnp.ones((2, 2))}, None, {"w": jnp.ones((2, 3))}), subject_to=Cardinality(count=1)
        ),
        ValueError,
        ("gradient", "'w'", "(2, 3)", "(2, 2)"),
    ),
    "curvature with NaN": (
        lambda: po.Problem(Quadratic({"w": jnp.ones((2, 2))}, Diagonal({"w": jnp.full((2, 2), jnp.nan)}))),
        ValueError,
        ("curvature", "'w'", "NaN"),
    ),
    "negative damping": (
        lambda: po.Problem(Quadratic({"w": jnp.ones((2, 2))}, Identity(), damping=-1.0)),
        ValueError,
        ("damping=-1.0", ">= 0"),
    ),
    "no batches": (lambda: prune(data=[], method="taylor"), ValueError, ("batches", "empty", "pass")),
    "no loss": (lambda: prune(fn=None, method="taylor"), TypeError, ("fn is None", "'taylor'", "scalar")),
    "batches None": (
        lambda: po.prune(loss, params(), None, Cardinality(sparsity=0.5), method="obd", progress=False),
        TypeError,
        ("batches is None", "pass"),
    ),
    "one-shot iterator": (
        lambda: prune(data=iter(batches()), method="obd"),
        TypeError,
        ("batches", "one-shot", "lambda"),
    ),
    "generator": (
        lambda: prune(data=(b for b in batches()), method="fisher"),
        TypeError,
        ("batches", "one-shot", "lambda"),
    ),
    "one array as batches": (lambda: prune(data=jnp.ones((5, 4)), method="taylor"), TypeError, ("batches", "[batch]")),
    "second pass ends early": (
        lambda: po.plans.lossless(loss, params(), Shrinking(), method="magnitude", progress=False),
        ValueError,
        ("batches ended after 1 of 3",),
    ),
    "batches of two structures": (
        lambda: prune(data=[batches(1)[0], {"x": jnp.ones((5, 4))}], method="taylor"),
        ValueError,
        ("batches", "batch 1", "structure"),
    ),
    "loss that is not scalar": (
        lambda: prune(fn=lambda p, b: b[0] @ p["w1"], method="taylor"),
        ValueError,
        ("fn returns", "pass a loss", "mean over examples"),
    ),
    "loss of integers": (
        lambda: prune(fn=lambda p, b: jnp.sum(b[1] > 0), method="obd"),
        ValueError,
        ("fn returns", "floating"),
    ),
    "loss that returns a pair": (
        lambda: prune(fn=lambda p, b: (loss(p, b), None), method="fisher"),
        ValueError,
        ("fn returns a pair", "has_updates=True"),
    ),
    "loss that returns no pair": (
        lambda: Loss(loss, params(), batches(), has_updates=True),
        ValueError,
        ("fn returns", "has_updates=True", "(loss, updates)"),
    ),
    "loss without a hash": (lambda: prune(fn=Unhashable(), method="taylor"), TypeError, ("Unhashable", "__hash__")),
    "loss that is no function": (lambda: prune(fn=3, method="taylor"), TypeError, ("fn is 3", "scalar")),
    "unknown method": (lambda: prune(method="magnitud"), ValueError, ("method='magnitud'", "magnitude")),
    "constraint that is a number": (
        lambda: po.prune(loss, params(), batches(), 0.9, progress=False),
        TypeError,
        ("constraint is 0.9", "Cardinality"),
    ),
    "a tensor would be emptied": (
        lambda: prune(with_leaf(w2=1e-6 * params()["w2"])),
        ValueError,
        ("'w2'", "collapse", "floor=1", "floor=0"),
    ),
    "no steps": (lambda: po.plans.Cubic(0), ValueError, ("steps=0", ">= 1")),
    "share of one": (lambda: po.plans.CoarseThenFine(share=1.0), ValueError, ("share=1.0", "(0, 1)")),
    "no probes": (lambda: hutchinson_diagonal(loss, params(), batches(), probes=0), ValueError, ("probes=0", "pass")),
    "no epochs": (lambda: Descent(optax.sgd(0.1), epochs=0), ValueError, ("epochs=0", ">= 1")),
    "unknown rule": (lambda: Score("hessian"), ValueError, ("rule='hessian'", "pass")),
    "negative tolerance": (
        lambda: po.plans.lossless(loss, params(), batches(), tolerance=-1, progress=False),
        ValueError,
        ("tolerance=-1", ">= 0"),
    ),
    "fine_tune of another structure": (
        lambda: prune(fine_tune=lambda p, s: {"w1": p["w1"]}),
        ValueError,
        ("fine_tune", "structure"),
    ),
    "fine_tune that diverges": (
        lambda: prune(fine_tune=lambda p, s: {**p, "w1": p["w1"] * jnp.nan}),
        ValueError,
        ("fine_tune", "'w1'", "NaN"),
    ),
    "not a statistic": (
        lambda: po.plans.recalibrate(lambda p, b: {"w1": None, "b1": p["b1"] ** 2, "w2": None}, params(), batches()),
        ValueError,
        ("updates", "'b1'", "moving average"),
    ),
    "no statistic": (
        lambda: po.plans.recalibrate(lambda p, b: {"w1": None, "b1": None, "w2": None}, params(), batches()),
        ValueError,
        ("updates", "no statistic"),
    ),
    "report with half its inputs": (
        lambda: po.report(loss, params(), prune()),
        ValueError,
        ("fn and batch", "pass both"),
    ),
    "masks of another shape": (
        lambda: po.apply(params(), {"w1": jnp.ones((2, 2), bool)}),
        ValueError,
        ("mask 'w1'", "(2, 2)", "(4, 6)"),
    ),
    "no masks": (lambda: po.from_masks(params(), {}), ValueError, ("masks", "pass")),
    "gram not square": (lambda: Gram.checked(jnp.ones((2, 3))), ValueError, ("gram", "(2, 3)", "square")),
    "gram not symmetric": (lambda: Gram.checked(jnp.arange(4.0).reshape(2, 2)), ValueError, ("gram", "symmetric")),
    "gram with NaN": (lambda: Gram.checked(jnp.full((2, 2), jnp.nan)), ValueError, ("gram", "NaN")),
    "gram with a negative diagonal": (lambda: Gram.checked(-jnp.eye(2)), ValueError, ("gram", "negative diagonal")),
    "gram of integers": (lambda: Gram.checked(jnp.eye(2, dtype=int)), TypeError, ("gram", "int")),
    "gram of other inputs": (
        lambda: po.Problem(Reconstruction(jnp.ones((3, 2)), Gram(jnp.eye(2)))),
        ValueError,
        ("2 inputs", "3 rows", "transpose"),
    ),
    "matrix of integers": (
        lambda: po.Problem(Reconstruction(jnp.ones((2, 2), int), Gram(jnp.eye(2)))),
        TypeError,
        ("int", "floating"),
    ),
    "objective that is none": (lambda: po.Problem(loss), TypeError, ("objective", "function", "Objective")),
    "two leaves of one name": (
        lambda: prune({"a": {"b": jnp.ones((2, 2))}, "a/b": jnp.ones((2, 2))}),
        ValueError,
        ("'a/b'",),
    ),
    "leaves as a dictionary": (lambda: prune(leaves={"w1": True}), TypeError, ("leaves={'w1': True}", "pattern")),
    "schedule as text": (lambda: prune(schedule="cubic"), TypeError, ("schedule is 'cubic'", "Cubic(10)")),
    "schedule as a class": (lambda: prune(schedule=po.plans.Cubic), TypeError, ("schedule", "instance")),
    "schedule that stops early": (lambda: prune(schedule=Half()), ValueError, ("schedule", "cut=1")),
    "fine_tune that is no function": (lambda: prune(fine_tune=3), TypeError, ("fine_tune is 3", "function")),
    "fine_tune with NaN elsewhere": (
        lambda: prune(fine_tune=lambda p, s: {**p, "b1": p["b1"] * jnp.nan}),
        ValueError,
        ("fine_tune", "'b1'", "NaN"),
    ),
    "fine_tune of another dtype": (
        lambda: prune(fine_tune=lambda p, s: {**p, "b1": p["b1"].astype(jnp.float32)}),
        ValueError,
        ("fine_tune", "'b1'", "float32", "dtype"),
    ),
    "callable that repeats an iterator": (
        lambda: prune(data=lambda it=iter(batches()): it, method="taylor"),
        TypeError,
        ("batches()", "same one-shot iterator"),
    ),
    "callable without batches": (
        lambda: prune(data=lambda: None, method="taylor"),
        TypeError,
        ("batches()", "NoneType"),
    ),
    "a batch of nothing": (
        lambda: prune(data=[(jnp.ones((0, 4)), jnp.ones((0, 2)))], fn=lambda p, b: jnp.sum(p["w1"]), method="taylor"),
        ValueError,
        ("batches", "0 examples"),
    ),
    "loss of NaN, loss-free": (
        lambda: po.plans.lossless(
            lambda p, b: loss(p, b) + jnp.nan, params(), batches(), method="magnitude", progress=False
        ),
        ValueError,
        ("fn returns nan", "repair"),
    ),
    "no levels": (lambda: po.plans.sensitivity(loss, params(), batches(), [], progress=False), ValueError, ("levels",)),
    "masks with NaN": (lambda: po.from_masks(params(), {"w1": np.full((4, 6), np.nan)}), ValueError, ("'w1'", "NaN")),
    "report of other shapes": (
        lambda: po.report(None, {**params(), "w1": jnp.ones((7, 7))}, prune()),
        ValueError,
        ("pruned", "'w1'", "(4, 6)", "(7, 7)"),
    ),
    "report of plain params": (lambda: po.report(None, params(), params()), TypeError, ("pruned is a dict", "prune")),
    "budget that is a number": (lambda: Slices(-1, 0.5), TypeError, ("budget=0.5", "Cardinality")),
    "pattern with a number": (lambda: ByPath({"*": 0.5}), TypeError, ("0.5", "Cardinality")),
    "constraints that are no tuple": (lambda: Intersection(NM(2, 4)), ValueError, ("tuple", "Intersection((a, b))")),
    "scope twice": (lambda: Cardinality(count=1, per=(0, 0)), ValueError, ("per=(0, 0)", "different axes")),
    "mask as a list": (lambda: prune(constraint=Support({"w1": [True]})), TypeError, ("'w1/0'", "bool", "array")),
    "curvature that is a tree": (
        lambda: po.Problem(Quadratic({"w": jnp.ones((2, 2))}, {"w": jnp.ones((2, 2))})),
        TypeError,
        ("curvature is a dict", "Diagonal"),
    ),
    "gram that is an array": (
        lambda: po.Problem(Reconstruction(jnp.ones((2, 2)), jnp.eye(2))),
        TypeError,
        ("curvature", "Gram.checked"),
    ),
    "constant NaN": (
        lambda: po.Problem(Quadratic({"w": jnp.ones((2, 2))}, Identity(), constant=float("nan"))),
        ValueError,
        ("constant=nan",),
    ),
    "folder that does not exist": (
        lambda: po.save(prune(), "no/such/folder/f"),
        FileNotFoundError,
        ("no/such/folder", "make it"),
    ),
    "certify without a solution": (
        lambda: po.certify(po.Problem(Quadratic(params(), Identity()), subject_to=Cardinality(sparsity=0.5)), None),
        TypeError,
        ("solution is a NoneType",),
    ),
    "redundancy with half its inputs": (
        lambda: po.redundancy(loss, params()),
        ValueError,
        ("fn and batches", "pass both"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_one_sentence(name):
    call, error, words = CASES[name]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message
    assert len(message) < 600, message


@pytest.mark.parametrize(
    ("solver", "problem", "words"),
    [
        (Score(), lambda: po.Problem(Quadratic(params(), Identity())), ("needs a constraint", "subject_to=")),
        (
            Score(),
            lambda: po.Problem(Loss(loss, params(), batches()), subject_to=Cardinality(sparsity=0.5)),
            ("quadratic", "Loss", "Quadratic("),
        ),
        (Score(), lambda: po.Problem(Quadratic(params()), subject_to=Cardinality(sparsity=0.5)), ("nothing to rank",)),
        (
            Polish(),
            lambda: po.Problem(Quadratic(params(), Identity()), subject_to=Cardinality(sparsity=0.5)),
            ("init is None", "init=", "Support"),
        ),
        (Polish(), lambda: po.Problem(Loss(loss, params(), batches())), ("quadratic", "Descent")),
        (Polish(), lambda: po.Problem(Quadratic(params(), None, params())), ("curvature",)),
        (
            Polish(),
            lambda: po.Problem(Quadratic(params(), Diagonal(jax.tree.map(jnp.zeros_like, params())), params())),
            ("positive", "damp"),
        ),
        (Descent(optax.sgd(0.1)), lambda: po.Problem(Quadratic(params(), Identity())), ("Loss", "Polish")),
        (
            Descent(optax.sgd(0.1)),
            lambda: po.Problem(Loss(loss, params(), batches()), subject_to=Cardinality(sparsity=0.5)),
            ("Cardinality", "Support(mask)"),
        ),
        (
            Then(Score(), Descent(optax.sgd(0.1))),
            lambda: po.Problem(Quadratic(params(), Identity()), subject_to=Cardinality(sparsity=0.5)),
            ("Loss",),
        ),
        (
            Score(),
            lambda: po.Problem(
                Quadratic(params(), Identity()), subject_to=Cardinality(sparsity=0.5), penalty=po.penalties.L1(0.1)
            ),
            ("penalty", "L1"),
        ),
    ],
)
def test_a_solver_refuses_what_it_cannot_solve(solver, problem, words):
    with pytest.raises(ValueError, match=r"\w") as caught:
        po.solve(problem(), solver)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_arguments_are_checked_before_data_is_read():
    Tracked.reads = 0
    with pytest.raises(ValueError, match=r"count=99"):
        prune(constraint=Cardinality(count=99), data=Tracked(), method="fisher", leaves=["w1", "w2"])
    with pytest.raises(ValueError, match="NaN"):
        prune(nan_at(params(), "w1"), data=Tracked(), method="fisher", leaves=["w1", "w2"])
    assert Tracked.reads == 0
    with pytest.raises(ValueError, match=r"m=5"):  # which axis is `in` takes one batch to know
        prune(constraint=NM(2, 5), data=Tracked(), method="fisher")
    assert Tracked.reads == 1


@pytest.mark.parametrize("bad", [None, "NaN batch", "fine_tune raises"])
def test_params_are_untouched_whatever_happens(bad):
    p = params()
    copy = jax.tree.map(np.array, p)

    def tune(q, support):
        if bad == "fine_tune raises":
            raise RuntimeError("the user's own")
        return jax.tree.map(lambda x: x + 1, q)

    data = [*batches(1), (jnp.full((5, 4), jnp.nan), jnp.zeros((5, 2)))] if bad == "NaN batch" else batches()
    try:
        prune(p, data=data, method="fisher", fine_tune=tune, schedule=po.plans.Iterative(2))
        assert bad is None
    except (ValueError, RuntimeError):
        assert bad is not None
    jax.tree.map(np.testing.assert_array_equal, p, copy)


@pytest.mark.default_flags
def test_float64_leaf_in_32_bit_mode_is_not_rounded_silently():
    with pytest.raises(TypeError, match="float64"):
        po.prune(None, {"w": np.ones((4, 4))}, None, Cardinality(sparsity=0.5), progress=False)


class Liar(po.solvers.Solver):
    """A solver that returns what it should not."""

    def __init__(self, lie):
        self.lie = lie

    def refuses(self, problem):
        return None

    def run(self, problem, init, key):
        value, support = problem.objective.center, problem.full_support()
        if self.lie == "nonfinite":
            value = jax.tree.map(lambda x: x * jnp.nan, value)
        if self.lie == "outside":
            support = problem.subject_to.select(value)
        return Outcome(value, support, evidence=Separable())


@pytest.mark.parametrize(
    ("lie", "status"), [("infeasible", "infeasible"), ("nonfinite", "nonfinite"), ("outside", "infeasible")]
)
def test_a_wrong_solver_is_caught_by_solve(lie, status):
    problem = po.Problem(Quadratic(params(), Identity()), subject_to=Cardinality(sparsity=0.5, floor=1))
    with pytest.raises(po.SolveError, match=status):
        po.solve(problem, Liar(lie))
    assert po.solve(problem, Liar(lie), throw=False).status.name.lower() == status
