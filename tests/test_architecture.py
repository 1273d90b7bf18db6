"""The house keeps its order: imports go down the ladder, rooms on one rung never see each other, names are terms."""

import ast
import importlib
import inspect
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pruneopt"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lower rungs first; rooms and modules on one rung do not import each other.
LADDER = [
    {"_linalg"},
    {"_selection"},
    {"_tree"},
    {"_store"},
    {"network"},
    {"program"},
    {"structure"},
    {"capture"},
    {"curvature", "constraints", "penalties"},
    {"objectives"},
    {"problem"},
    {"bounds"},
    {"solution"},
    {"certify"},
    {"allocation"},
    {"solvers", "training"},
    {"solve"},
    {"delivery"},
    {"plans"},
    {"__init__"},
]
# What a room gave away keeps its public name there: {room: the rooms above whose names its __init__ passes on}.
GIVEN_AWAY = {"structure": {"capture"}}
OUTSIDE = {"threadpoolctl", "jax", "numpy", "scipy", "jaxtyping", "optax", "tqdm", "safetensors", "matplotlib"}
OPTAX = {"solvers/descent.py", "plans/retrain.py", "plans/refine.py", "plans/refine_windows.py"}
JAX_EXTEND = {"network/calls.py", "structure/graph.py", "program/primitives.py"}
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


def inside(file):
    """The modules of the package that a file imports, as room.module or module."""
    for name in imported(file):
        parts = name.split(".")
        if parts[0] == "pruneopt" and len(parts) > 1:
            deeper = len(parts) > 2 and (PACKAGE / parts[1] / f"{parts[2]}.py").exists()
            yield ".".join(parts[1:3]) if deeper else parts[1]


WRITES = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear"}


def holders(tree):
    """Names that a module binds to what can be written: a literal, a comprehension or a call of a container."""
    literal = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    made = {"list", "dict", "set", "deque", "defaultdict", "OrderedDict", "Counter", "WeakKeyDictionary"}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            value, targets = node.value, node.targets if isinstance(node, ast.Assign) else [node.target]
            called = isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1].split("[")[0] in made
            if called or isinstance(value, literal):
                yield from (target.id for target in targets if isinstance(target, ast.Name))


def written(tree):
    """Names whose contents functions of a module write: by index, by an operator, or by a method that does."""
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))
    for node in (n for function in functions for n in ast.walk(function)):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            yield ast.unparse(node.value)
        elif isinstance(node, ast.AugAssign):
            yield ast.unparse(node.target)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITES:
            yield ast.unparse(node.func.value)


@pytest.mark.parametrize(
    "code", ["a = []\ndef f(): a[:] = [1]", "a: dict = {}\ndef f(): a.update(b=1)", "a = set()\ndef f(): a.clear()"]
)
def test_state_of_a_module_is_found(code):
    tree = ast.parse(code)
    assert {*holders(tree)} & {*written(tree)} == {"a"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
class TestFile:
    def test_imports_go_down_the_ladder(self, file):
        room, module = place(file)
        for name in inside(file):
            other = name.split(".")[0]
            if other == room or room == "__init__" or (module == "__init__" and other in GIVEN_AWAY.get(room, ())):
                continue
            assert rung(other) < rung(room), f"{room} imports {other}, which is not below it"

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

    def test_keeps_no_state_in_a_module(self, file):
        tree = ast.parse(file.read_text())
        assert not any(isinstance(node, ast.Global) for node in ast.walk(tree))
        assert not {*holders(tree)} & {*written(tree)}, "state goes to the task that owns it"

    def test_prints_nothing_and_unpickles_nothing(self, file):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") != "print"
                for word in node.keywords:
                    assert word.arg != "allow_pickle" or word.value.value is False
        assert not {name.split(".")[0] for name in imported(file)} & {"pickle", "dill", "cloudpickle", "shelve"}


def classes_of_sets():
    """Names of every class of the constraints' room but `Constraint` itself, which checks of arguments may ask for."""
    from pruneopt import constraints

    rooms = [importlib.import_module(f"pruneopt.constraints.{f.stem}") for f in (PACKAGE / "constraints").glob("*.py")]
    kinds = {name for room in rooms for name, x in vars(room).items() if is_a(x, constraints.Constraint)}
    return kinds - {"Constraint"}


def is_a(thing, kind):
    return inspect.isclass(thing) and issubclass(thing, kind)


def class_tests(tree):
    """The expressions that an isinstance, an issubclass, a `match` or a comparison of types asks for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            yield node.args[1]
        elif isinstance(node, ast.MatchClass):
            yield node.cls
        elif isinstance(node, ast.Compare) and "type(" in ast.unparse(node):
            yield node


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name != "constraints"], ids=lambda f: f.stem)
def test_no_set_is_asked_for_its_class_outside_its_room(file):
    tree, kinds = ast.parse(file.read_text()), classes_of_sets()
    known = {name.rsplit(".", 1)[1] for name in imported(file) if name.startswith("pruneopt.constraints.")} & kinds
    for asked in class_tests(tree):
        for node in ast.walk(asked):
            name = getattr(node, "id", "") if isinstance(node, ast.Name) else getattr(node, "attr", "")
            here = name in known if isinstance(node, ast.Name) else ast.unparse(node).startswith("constraints.")
            assert not (here and name in kinds), f"{file} asks for {name}; let `constraints.parts.of` say what it needs"


def test_the_parts_know_no_set():
    assert set(inside(PACKAGE / "constraints" / "parts.py")) == {"_tree"}


MOST = 10  # arguments of a public function
# What each call of these needs is the network (3), the set, the method, other data, and how the run goes.
WIDE = {"plans/layerwise.py:layerwise": 11, "plans/prune.py:prune": 12}


def test_no_public_function_takes_more_than_ten_arguments():
    found = {}
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                given = node.args
                count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
                if count > MOST:
                    found[f"{file.relative_to(PACKAGE)}:{node.name}"] = count
    assert found == WIDE


LONGEST = 60  # lines of a function's body, what is nested in it counted, its docstring not


def body_lines(function):
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_lines_of_a_body_are_counted_with_what_is_nested_and_without_the_docstring():
    tree = ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    def g():\n        return 1\n\n    return g')
    assert [body_lines(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] == [4, 1]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_body_is_long(file):
    functions = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)]
    assert not {n.name: body_lines(n) for n in functions if body_lines(n) > LONGEST}, "split it into named functions"


def test_every_room_stands_on_the_ladder():
    rooms = {place(file)[0] for file in FILES}
    assert rooms <= set().union(*LADDER)


@pytest.mark.parametrize("room", sorted({place(file)[0] for file in FILES if file.parent != PACKAGE}))
def test_no_circle_inside_a_room(room):
    graph = {f.stem: set() for f in FILES if f.parent.name == room and f.stem != "__init__"}
    for file in FILES:
        if file.parent.name == room and file.stem != "__init__":
            graph[file.stem] = {n.split(".")[1] for n in inside(file) if n.startswith(f"{room}.")}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_public_names_have_docstrings():
    import pruneopt as po

    for room in (
        po,
        po.bounds,
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
