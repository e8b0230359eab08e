"""The rings of the package stay apart: maths <- storage and decoding <- Ray."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffmine"
FORBIDDEN = {
    "diffusion": {
        "ray",
        "fsspec",
        "pyarrow",
        "diffmine.config",
        "diffmine.configfile",
        "diffmine.run",
        "diffmine.data",
        "diffmine.stages",
    },
    "mining": {
        "ray",
        "fsspec",
        "pyarrow",
        "torch",
        "diffmine.config",
        "diffmine.configfile",
        "diffmine.run",
        "diffmine.data",
        "diffmine.stages",
    },
    "data": {"ray", "torch", "diffusers", "diffmine.stages", "diffmine.diffusion"},
    "report": {"ray", "torch", "diffusers", "fsspec", "diffmine.stages", "diffmine.run"},
}


def imports(file: Path) -> set[str]:
    """Every module that a file imports, type-checking imports left out."""
    found: set[str] = set()
    tree = ast.parse(file.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def offences(file: Path, forbidden: set[str]) -> set[str]:
    return {name for name in imports(file) for f in forbidden if name == f or name.startswith(f + ".")}


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_ring(folder: str) -> None:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert len(files) > 1
    assert {str(f.relative_to(PACKAGE)): o for f in files if (o := offences(f, FORBIDDEN[folder]))} == {}


def test_only_stages_know_ray() -> None:
    outside = [f for f in PACKAGE.rglob("*.py") if "stages" not in f.parts]
    assert [f.name for f in outside if offences(f, {"ray"})] == []
    assert any(offences(f, {"ray"}) for f in (PACKAGE / "stages").glob("*.py"))  # the test can see one


def test_only_the_model_knows_diffusers() -> None:
    allowed = {"model.py", "training.py"}  # training takes diffusers' moving average of weights
    assert {f.name for f in PACKAGE.rglob("*.py") if offences(f, {"diffusers"})} <= allowed
