"""The gates that keep the house in order: sizes of files and functions, directions of imports, private parts of Ray."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_ray"
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 400, 80
MOST_PRIVATE_RAY_IMPORTS = 5
"""Lower it whenever one goes; Ray is capped in pyproject.toml because of them."""
PURE = ("algorithms", "config", "data", "types.py", "batch.py", "micro_batches.py")
"""Mathematics, configuration and data: they run without Ray, vLLM and DeepSpeed."""
LOWER = {
    "algorithms": ("driver", "learner", "rollout", "stages", "serving", "runs", "cli"),
    "models": ("driver", "stages", "rollout", "serving", "cli"),
    "runs": ("driver", "stages", "learner", "rollout", "serving", "report", "cli"),
    "telemetry": ("driver", "stages", "learner", "rollout", "serving", "report", "cli"),
    "report": ("driver", "stages", "learner", "rollout", "cli"),
    "rollout": ("driver", "stages", "learner", "rewards", "cli"),
    "learner": ("driver", "stages", "rollout", "rewards", "cli"),
    "rewards": ("driver", "stages", "rollout", "cli"),
    "driver": ("stages", "cli"),
}
"""A room, and the rooms that it must not import."""


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere, also inside functions, but for those that only a type checker reads."""
    modules: set[str] = set()
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def test_no_file_and_no_function_is_too_long():
    too_long = []
    for path in FILES:
        text = path.read_text()
        if text.count("\n") > MOST_LINES_OF_A_FILE:
            too_long.append(f"{path.relative_to(PACKAGE)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    too_long.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}: {lines} lines")
    assert not too_long


def test_files_are_neither_fragments_nor_heaps():
    lines = [count for path in FILES if (count := path.read_text().count("\n")) > 10]
    assert 105 <= statistics.median(lines) <= 145


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_import_no_engine(room):
    paths = [PACKAGE / room] if room.endswith(".py") else (PACKAGE / room).rglob("*.py")
    engines = {"ray", "vllm", "deepspeed"}
    assert not {path.name: found for path in paths if (found := {m.split(".")[0] for m in imported(path)} & engines)}


@pytest.mark.parametrize("room", LOWER)
def test_rooms_import_downwards(room):
    upwards = tuple(f"rlhf_ray.{name}" for name in LOWER[room])
    wrong = {
        str(path.relative_to(PACKAGE)): sorted(m for m in imported(path) if m.startswith(upwards))
        for path in (PACKAGE / room).rglob("*.py")
    }
    assert not {path: modules for path, modules in wrong.items() if modules}


def test_private_parts_of_ray_are_counted_down():
    private = {
        (str(path.relative_to(PACKAGE)), module)
        for path in FILES
        for module in imported(path)
        if module.startswith("ray.") and any(part.startswith("_") for part in module.split("."))
    }
    modules = {
        (path, module)
        for path, module in private
        if not any(module.startswith(f"{m}.") for p, m in private if p == path)
    }
    assert len(modules) <= MOST_PRIVATE_RAY_IMPORTS, sorted(modules)
