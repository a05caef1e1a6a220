"""The wheel carries every package and data file: the list in pyproject.toml forgets none."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("common", "proto", "scheduler", "kernels", "models", "text", "workers", "controller", "client", "cli")


def modules_of_the_tree() -> list[str]:
    files = [ROOT / "__init__.py"] + [file for part in PARTS for file in sorted((ROOT / part).rglob("*.py"))]
    names = [".".join(("pilotfish", *file.relative_to(ROOT).with_suffix("").parts)) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def test_every_module_imports_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[2:]:\n"
        "    module = importlib.import_module(name)\n"
        "    assert module.__file__.startswith(sys.argv[1]), (name, module.__file__)\n"
    )
    command = [sys.executable, "-c", script, str(site), *modules_of_the_tree()]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(site)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_wheel_carries_the_data_files_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    data = [
        file.relative_to(ROOT)
        for part in PARTS
        for pattern in ("*.proto", "*.pyi", "*.cpp", "*.h", "*.cu", "*.json", "*.html")
        for file in (ROOT / part).rglob(pattern)
    ]
    assert data
    assert [str(path) for path in data if f"pilotfish/{path}" not in names] == []
    assert [name for name in names if "/tests/" in name or "/benchmarks/" in name] == []


def test_import_pilotfish_pulls_neither_torch_nor_ray() -> None:
    script = "import sys, pilotfish; print([m for m in ('torch', 'ray', 'transformers', 'numpy', 'grpc') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
