"""The package that is installed is the one that stands in the repository."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import moe_lens

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def package_folders() -> dict[str, Path]:
    """Import name -> folder, for every folder with an ``__init__.py`` that is to be installed."""
    tops = {"moe_lens": ROOT / "moe_lens"} | {
        f"moe_lens.{name}": ROOT / name for name in ("kernels", "cli")
    }
    found = {}
    for name, top in tops.items():
        for init in top.rglob("__init__.py"):
            parts = init.parent.relative_to(top).parts
            found[".".join((name, *parts))] = init.parent
    return found


def test_every_package_folder_is_installed() -> None:
    folders = package_folders()
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)
    for name, folder in folders.items():
        mapped = max(
            (each for each in SETUPTOOLS["package-dir"] if f"{name}.".startswith(f"{each}.")),
            key=len,
        )
        inside = name.removeprefix(mapped).strip(".").replace(".", "/")
        assert ROOT / SETUPTOOLS["package-dir"][mapped] / inside == folder


def test_every_data_file_of_the_package_is_installed() -> None:
    for path in (ROOT / "moe_lens").rglob("*"):
        if path.is_dir() or path.suffix == ".py" or "__pycache__" in path.parts:
            continue
        declared = [
            path.relative_to(ROOT / package.replace(".", "/")).match(pattern)
            for package, patterns in SETUPTOOLS["package-data"].items()
            for pattern in patterns
            if path.is_relative_to(ROOT / package.replace(".", "/"))
        ]
        assert any(declared), f"{path.relative_to(ROOT)} is not in package-data"


def test_the_installed_version_is_the_one_in_the_code_and_has_its_changes() -> None:
    assert version("moe-lens") == moe_lens.__version__
    assert f"## {moe_lens.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_kernels_and_command_line_live_inside_the_package() -> None:
    code = "import moe_lens.kernels, moe_lens.cli, sys; print('kernels' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True
    )
    assert run.stdout.strip() == "False"
