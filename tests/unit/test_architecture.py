"""The arrows of the design: which room may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMON = {"choices", "config", "errors", "home", "settings"}
MAY = {
    "adapters": COMMON,
    "aggregation": COMMON | {"adapters"},
    "wire": COMMON | {"adapters"},
    "privacy": COMMON,
    "models": COMMON,
    "data": COMMON,
    "evaluation": COMMON,
    "training": COMMON | {"adapters", "privacy", "data", "models", "evaluation"},
    "runs": COMMON | {"adapters"},
    "federation": COMMON
    | {"training", "runs", "aggregation", "wire", "adapters", "privacy", "data", "models", "evaluation"},
    "cli": COMMON | {"federation", "runs", "resources", "data", "models"},
}
# what all rooms know knows none of them
COMMON_MAY = {
    "config": {"choices", "combinations", "errors", "settings"},
    "combinations": {"config", "errors", "settings"},
    "settings": set(),
    "choices": {"errors"},
    "errors": set(),
}
FLOWER = {"strategies", "apps", "fedllm/federation", "fedllm/cli"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("room", MAY)
def test_a_room_imports_only_its_neighbours(room: str) -> None:
    files = modules(f"fedllm/{room}")
    assert files
    for path in files:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "fedllm" and len(parts) > 1:
                assert parts[1] in MAY[room] | {room}, f"{path}: {name}"


@pytest.mark.parametrize("module", COMMON_MAY)
def test_what_all_rooms_know_knows_no_room(module: str) -> None:
    for name in imports(ROOT / f"fedllm/{module}.py"):
        parts = name.split(".")
        assert parts[0] != "fedllm" or parts[1] in COMMON_MAY[module], name


def test_flower_is_imported_in_its_rooms_only() -> None:
    for path in modules("fedllm") + modules("strategies") + modules("apps"):
        place = path.relative_to(ROOT).as_posix()
        allowed = any(place.startswith(room) for room in FLOWER)
        for name in imports(path):
            assert allowed or name.split(".")[0] != "flwr", f"{place}: {name}"


def test_nothing_in_the_library_imports_strategies_or_apps() -> None:
    for path in modules("fedllm"):
        for name in imports(path):
            assert name.split(".")[0] not in {"strategies", "apps", "tests"}, f"{path}: {name}"


def test_no_module_is_over_600_lines() -> None:
    for folder in ("fedllm", "strategies", "apps", "tests"):
        for path in modules(folder):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, path


def test_nothing_unpickles() -> None:
    for path in modules("fedllm") + modules("strategies") + modules("apps"):
        assert "pickle" not in set(imports(path)), path
        assert "torch.load(" not in path.read_text(encoding="utf-8"), path
