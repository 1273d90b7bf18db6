"""The house keeps its order: imports go down the ladder, rooms on one rung never see each other, names are terms."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pruneopt"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lower rungs first; rooms and modules on one rung do not import each other.
LADDER = [
    {"_linalg"},
    {"_tree"},
    {"_data"},
    {"structure"},
    {"curvature", "constraints", "penalties"},
    {"objectives"},
    {"problem"},
    {"solution"},
    {"solvers", "certify", "apply", "files", "training"},
    {"solve"},
    {"report", "redundancy"},
    {"plans"},
    {"__init__"},
]
# Inside a room a file may import those before it in this order; a room that is not listed, only its base.
INSIDE = {
    "structure": [
        "leaves",
        "evaluate",
        "rules",
        "keys",
        "forms",
        "program",
        "per_example",
        "segment",
        "reading",
        "operators",
        "axes",
        "unit_rules",
        "units",
        "graph",
        "cost",
        "walk",
        "capture",
    ],
    "curvature": [
        "base",
        "diagonal",
        "gram",
        "low_rank",
        "shrunk",
        "fisher",
        "streamed",
        "hessian",
        "gauss_newton",
        "true_fisher",
        "block_diagonal",
        "kronecker",
        "low_rank_plus_diagonal",
    ],
    "constraints": [
        "base",
        "ball",
        "cardinality",
        "support",
        "nm",
        "transposable",
        "block",
        "intersection",
        "by_path",
        "shares",
    ],
    "penalties": ["base", "l1", "partition", "group", "nonconvex", "ordered"],
    "solvers": [
        "base",
        "threshold",
        "active_set",
        "factors",
        "admm",
        "auto",
        "alps",
        "block_obs",
        "chita",
        "conjugate_gradients",
        "descent",
        "frank_wolfe",
        "global_admm",
        "hard_threshold",
        "polish",
        "proximal_gradient",
        "pursuit",
        "greedy_obs",
        "obs",
        "cbs",
        "score",
        "sparse_swaps",
        "summed_obs",
        "swap",
        "thanos",
    ],
    "training": [
        "schedule",
        "base",
        "metric",
        "freeze",
        "gradual",
        "proximal",
        "drop_and_grow",
        "hard_threshold",
        "straight_through",
        "gates",
        "lagrangian",
        "admm",
    ],
    "plans": [
        "calibration",
        "run_folder",
        "judged",
        "layerwise",
        "models",
        "methods",
        "gradual",
        "prune",
        "staged",
        "retrain",
        "recalibrate",
        "path",
        "sensitivity",
        "lossless",
        "lottery",
        "penalised",
        "distil",
    ],
}
OUTSIDE = {"threadpoolctl", "jax", "numpy", "scipy", "jaxtyping", "optax", "tqdm", "safetensors", "matplotlib"}
OPTAX = {"solvers/descent.py", "plans/retrain.py"}
JAX_EXTEND = {"structure/evaluate.py", "structure/graph.py", "structure/rules.py"}
STANDARD = __import__("sys").stdlib_module_names


def rung(room):
    return next(i for i, names in enumerate(LADDER) if room in names)


def place(file):
    """(room, module) of a file of the package; a top-level module is its own room."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return (parts[0], parts[0]) if len(parts) == 1 else (parts[0], parts[1])


def imported(file):
    """Every dotted name that the file imports anywhere, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
class TestFile:
    def test_imports_go_down_the_ladder(self, file):
        room, module = place(file)
        for name in imported(file):
            if not name.startswith("pruneopt."):
                continue
            parts = name.split(".")[1:]
            if parts[0] == room and len(LADDER) and module != room:
                if module == "__init__":
                    continue
                order = INSIDE.get(room, ["base", module])
                assert parts[1] in order[: order.index(module)], f"{room}/{module} imports its sibling {parts[1]}"
            elif room != "__init__":
                assert rung(parts[0]) < rung(room), f"{room} imports {parts[0]}, which is not below it"

    def test_outside_packages_are_the_declared_ones(self, file):
        where = str(file.relative_to(PACKAGE))
        for name in imported(file):
            top = name.split(".")[0]
            assert top in OUTSIDE | STANDARD | {"pruneopt", "__future__"}, f"{where} imports {top}"
            assert top != "optax" or where in OPTAX or place(file)[0] == "training", f"{where} imports optax"
            assert not name.startswith("jax.extend") or where in JAX_EXTEND, f"{where} imports {name}"

    def test_is_a_room_of_its_own(self, file):
        assert file.stem not in {"utils", "helpers", "common", "misc", "core"}
        assert len(file.relative_to(PACKAGE).parts) <= 2, "three levels deep"
        assert len(file.read_text().splitlines()) <= 400, "split it by mathematics"
        assert file.read_text().strip(), "an empty shell"

    def test_prints_nothing_and_unpickles_nothing(self, file):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") != "print"
                for word in node.keywords:
                    assert word.arg != "allow_pickle" or word.value.value is False
        assert not {name.split(".")[0] for name in imported(file)} & {"pickle", "dill", "cloudpickle", "shelve"}


def test_every_room_stands_on_the_ladder():
    rooms = {place(file)[0] for file in FILES}
    assert rooms == set().union(*LADDER) & rooms
    assert {r for r in rooms if (PACKAGE / r).is_dir()} >= set(INSIDE)


def test_public_names_have_docstrings():
    import inspect

    import pruneopt as po

    for room in (
        po,
        po.constraints,
        po.curvature,
        po.objectives,
        po.penalties,
        po.plans,
        po.solvers,
        po.structure,
        po.training,
    ):
        for name in room.__all__:
            thing = getattr(room, name)
            if callable(thing):
                assert inspect.getdoc(thing), f"{room.__name__}.{name}"
