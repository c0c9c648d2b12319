"""The rules of the house (docs/architecture.md), held by the code's own imports."""

import ast
import sys
from pathlib import Path

import pytest

import tidegate

PACKAGE = Path(tidegate.__file__).parent
PARTS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py")))

# Standard modules that reach outside the process: the pure parts must not import them.
IO_MODULES = {
    "aiohttp", "asyncio", "ctypes", "http", "io", "os", "pathlib", "psutil", "pyroute2", "random",
    "select", "shutil", "signal", "socket", "sqlite3", "ssl", "subprocess", "tempfile", "threading",
    "time",
}  # fmt: skip

MAY_IMPORT = {
    "kernel": set(),
    "intent": set(),
    "verdict": set(),
    "identity": set(),
    "kubeapi": set(),
    "workloads": {"kernel", "intent", "kubeapi"},
    "enforce": {"kernel", "intent", "identity"},
    "observe": {"kernel", "verdict"},
    "catalog": {"intent", "identity", "kubeapi"},
}
"""What a part may import of the others; parts that are not named put others together."""


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def imports_of_part(part: str) -> dict[Path, set[str]]:
    return {path: imported(path) for path in (PACKAGE / part).rglob("*.py")}


def part_of(module: str) -> str | None:
    names = module.split(".")
    return names[1] if len(names) > 1 and names[0] == "tidegate" and names[1] in PARTS else None


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_a_part_imports_only_the_parts_below_it(part: str) -> None:
    for path, modules in imports_of_part(part).items():
        others = {part_of(module) for module in modules} - {part, None}
        assert others <= MAY_IMPORT[part], f"{path.relative_to(PACKAGE)} imports {others}"


def test_the_kernel_part_knows_nothing_of_tidegate() -> None:
    for path, modules in imports_of_part("kernel").items():
        own = {module for module in modules if module.split(".")[0] == "tidegate"}
        assert all(part_of(module) == "kernel" for module in own), f"{path}: {own}"


@pytest.mark.parametrize("part", ["intent", "verdict"])
def test_the_pure_parts_do_no_input_or_output(part: str) -> None:
    for path, modules in imports_of_part(part).items():
        roots = {module.split(".")[0] for module in modules}
        assert not roots & IO_MODULES, f"{path.relative_to(PACKAGE)}: {roots & IO_MODULES}"
        foreign = roots - set(sys.stdlib_module_names) - {"tidegate", "msgspec", "re2", "yaml"}
        assert not foreign, f"{path.relative_to(PACKAGE)}: {foreign}"


def test_enforcing_and_observing_do_not_know_each_other() -> None:
    for one, other in (("enforce", "observe"), ("observe", "enforce")):
        for path, modules in imports_of_part(one).items():
            assert other not in {part_of(module) for module in modules}, path
