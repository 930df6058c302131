"""Who imports whom in iapo, read from the source: lower layers know nothing of higher ones."""

import ast
from functools import cache
from pathlib import Path

import pytest

import iapo

ROOT = Path(iapo.__file__).parent

# From the lowest to the highest: module or folder, and what it is. A module may import its own layer and lower ones.
LAYERS = (
    ("iapo.arguments", "how the commands read theirs"),
    ("iapo.answer_format", "the format of an answer"),
    ("iapo.config", "the section iapo of the configuration"),
    ("iapo.probe", "how information is measured in one forward pass"),
    ("iapo.information", "exit entropies and what follows from them"),
    ("iapo.advantage", "the terms of the advantage"),
    ("iapo.methods", "what other papers add to GRPO"),
    ("iapo.step", "one step's advantages"),
    ("iapo.tasks", "the embedded tasks, their models, and the verifier of answers"),
    ("iapo.reward", "the reward of one completion"),
    ("iapo.data", "data sets"),
    ("iapo.checkpoints", "the checkpoints of a run"),
    ("iapo.metrics", "what is logged, and where"),
    ("iapo.verl_adapter", "everything that runs inside verl"),
    ("iapo.tools", "the commands evaluate, report, export and model"),
    ("iapo.launch", "from the command line to a running trainer"),
    ("iapo.train", "the command train"),
    ("iapo.evaluation", "an older name of a command"),
    ("iapo.report", "an older name of a command"),
    ("iapo.__main__", "the command iapo"),
)

VERL = ("verl", "ray", "vllm", "transfer_queue", "tensordict")  # what only a training machine has
WITH_VERL = ("iapo.verl_adapter", "iapo.launch")


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported(tree: ast.AST, known: frozenset[str]) -> set[str]:
    """The modules that these statements import; `from folder import module` is an import of the module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
    return found


def is_main_block(node: ast.stmt) -> bool:
    """`if __name__ == "__main__":` runs only where the module is the program, so nobody imports by it."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def runs_at_import(node: ast.stmt) -> list[ast.stmt]:
    """The statements in this one that run when its module is imported: functions' bodies don't, classes' do."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    inner = [child for field in ("body", "orelse", "finalbody", "handlers") for child in getattr(node, field, [])]
    return [node, *inner] if not inner else [found for child in inner for found in runs_at_import(child)]


@cache
def imports(lazy: bool) -> dict[str, set[str]]:
    """Module -> what it imports, with or without what its functions import when they are called."""
    found, known = {}, frozenset(modules())
    for name, path in modules().items():
        statements = [node for node in ast.parse(path.read_text()).body if not is_main_block(node)]
        if not lazy:
            statements = [inner for node in statements for inner in runs_at_import(node)]
        found[name] = set().union(*(imported(node, known) for node in statements)) - {name}
    return found


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer(module: str) -> int:
    (number,) = [i for i, (name, _) in enumerate(LAYERS) if inside(module, name)]
    return number


def ours(names: set[str]) -> set[str]:
    return {name for name in names if inside(name, "iapo") and name != "iapo"}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A path from a node back to it, or nothing."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for other in sorted(graph.get(node, ())):
                if found := visit(other, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_the_functions_of_this_test():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    tree = ast.parse(
        "import a\nclass C:\n    import b\n    def f(self):\n        import c\ntry:\n    import d\nfinally:\n    pass"
    )
    assert imported(tree, frozenset()) == {"a", "b", "c", "d"}
    at_import = [inner for node in tree.body for inner in runs_at_import(node)]
    assert set().union(*(imported(node, frozenset()) for node in at_import)) == {"a", "b", "d"}
    assert imported(ast.parse("from iapo import data, x"), frozenset({"iapo.data"})) == {"iapo.data", "iapo"}
    assert imports(lazy=True)["iapo.train"] >= {"iapo.launch.compose"} and not imports(lazy=False)["iapo.train"] & {
        "iapo.launch.compose"
    }


def test_every_module_is_in_one_layer():
    assert {name for name, _ in LAYERS if not any(inside(module, name) for module in modules())} == set()
    for module in ours(set(modules())):
        layer(module)


@pytest.mark.parametrize("module", sorted(ours(set(modules()))))
def test_no_module_imports_a_higher_one(module):
    """Not even inside a function."""
    higher = {other for other in ours(imports(lazy=True)[module]) if layer(other) > layer(module)}
    assert not higher, f"{module} ({LAYERS[layer(module)][1]}) imports {', '.join(sorted(higher))}"


def test_there_is_no_cycle_of_modules():
    graph = {name: ours(found) for name, found in imports(lazy=False).items()}
    assert cycle(graph) == []


def test_there_is_no_cycle_of_folders():
    """Lazy imports count too: what needs another folder to run depends on it."""
    graph: dict[str, set[str]] = {}
    for name, found in imports(lazy=True).items():
        folders = {LAYERS[layer(other)][0] for other in ours(found)}
        if name != "iapo":
            graph.setdefault(LAYERS[layer(name)][0], set()).update(folders - {LAYERS[layer(name)][0]})
    assert cycle(graph) == []


def test_verl_is_imported_only_where_it_is_adapted_and_started():
    for module, found in imports(lazy=True).items():
        if not any(inside(module, package) for package in WITH_VERL):
            assert not [name for name in found if any(inside(name, package) for package in VERL)], module


def reached(module: str) -> set[str]:
    """A module and every module of ours that it imports, directly or through others."""
    found, left = set(), {module}
    while left:
        found |= left
        left = ours({other for name in left for other in imports(lazy=True).get(name, ())}) - found
    return found


@pytest.mark.parametrize(
    "module", ["iapo.step", "iapo.advantage", "iapo.information", "iapo.probe.text", "iapo.reward"]
)
def test_the_algorithm_needs_no_verl_by_any_way(module):
    """Followed through every module of ours that it imports."""
    if module not in modules():
        pytest.skip(f"{module} is not there")
    assert not {name for name in reached(module) if any(inside(name, package) for package in WITH_VERL)}


@pytest.mark.parametrize("module", ["packing", "kernels", "output_layer", "supported_models"])
def test_only_the_attention_of_the_probe_needs_transformers(module):
    """Who sees what, the kernels and the checks are torch alone."""
    found = {other for name in reached(f"iapo.probe.{module}") for other in imports(lazy=True)[name]}
    assert not {name for name in found if inside(name, "transformers")}


def test_the_format_imports_nothing_and_the_configuration_nothing_heavy():
    assert imports(lazy=True)["iapo.answer_format"] == {"re", "abc"}
    assert imports(lazy=True)["iapo.config"] == {
        "math",
        "collections.abc",
        "dataclasses",
        "typing",
        "iapo.answer_format",
    }
