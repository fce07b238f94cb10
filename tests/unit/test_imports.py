"""Who may import what: import-linter's contracts, and the three modules that know about ranks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KNOW_RANKS = {"t2i/engine.py", "t2i/monitor.py", "t2i/doctor/probe.py"}


def imported_modules(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", ["t2i", "data_pipeline", "eval"])
def test_only_three_modules_import_deepspeed_or_torch_distributed(package: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / package).rglob("*.py")
        if any(
            name.split(".")[0] == "deepspeed" or name.startswith("torch.distributed") for name in imported_modules(path)
        )
    }
    assert found <= KNOW_RANKS


def test_import_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
