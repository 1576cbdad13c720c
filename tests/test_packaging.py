"""What is built holds what is in the checkout: passes/ and cost_models/ are mapped folders, easily lost."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from descompiler.version import VERSION

ROOT = Path(__file__).resolve().parent.parent

# folder of the checkout -> folder of the wheel
FOLDERS = {
    "descompiler": "descompiler",
    "passes": "descompiler/passes",
    "cost_models": "descompiler/cost_models",
}


def python_files(folder: Path) -> set[str]:
    """Paths of all modules below ``folder``, relative to it. Links are not followed."""
    return {
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.endswith(".py")
    }


def build(source: Path, kind: str, out: Path) -> Path:
    """Run one hook of the build backend in ``source``, in a process of its own and without any download."""
    out.mkdir(exist_ok=True)
    hook = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    command = [sys.executable, "-c", hook]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that no build/ is left behind and none of an earlier build slips into the wheel."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, copy)
    unwanted = shutil.ignore_patterns("__pycache__")
    for folder in (*FOLDERS, "examples"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=unwanted)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    archive = build(checkout, "sdist", tmp_path_factory.mktemp("sdist"))
    out = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    (folder,) = out.iterdir()
    return folder


@pytest.fixture(scope="module", params=["checkout", "sdist"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked; once built from the checkout and once from the source distribution."""
    source = request.getfixturevalue(request.param)
    archive = build(source, "wheel", tmp_path_factory.mktemp("wheel"))
    out = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(out)
    return out


def test_wheel_holds_every_module_of_the_three_folders(wheel: Path) -> None:
    expected = {f"{there}/{name}" for here, there in FOLDERS.items() for name in python_files(ROOT / here)}
    found = {f"descompiler/{name}" for name in python_files(wheel / "descompiler")}
    assert found == expected
    assert (wheel / "descompiler" / "py.typed").is_file() and (
        wheel / "descompiler" / "report" / "report.css"
    ).is_file()


def test_wheel_has_no_other_top_level_package(wheel: Path) -> None:
    (info,) = wheel.glob("*.dist-info")
    assert {path.name for path in wheel.iterdir()} == {"descompiler", info.name}


def test_wheel_has_licence_and_command(wheel: Path) -> None:
    (info,) = wheel.glob("*.dist-info")
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "License-Expression: Apache-2.0\n" in (info / "METADATA").read_text()
    assert "descompiler = descompiler.cli.app:main" in (info / "entry_points.txt").read_text()


WITHOUT_METADATA = """
import importlib.metadata as metadata
found = metadata.Distribution.from_name
def from_name(name):
    if name == "descompiler":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.Distribution.from_name = from_name
import torch, descompiler as des
print(des.__version__, des.compile(torch.nn.Embedding(8, 2), (torch.arange(4),))(torch.arange(4)).shape[0])
"""


@pytest.mark.long
def test_a_checkout_runs_uninstalled() -> None:
    """As `make gpu-check PY=python3` does, by an interpreter that has torch and no descompiler."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_METADATA], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [VERSION, "4"]


def test_the_build_has_the_version_of_the_package(wheel: Path) -> None:
    (info,) = wheel.glob("*.dist-info")
    assert f"\nVersion: {VERSION}\n" in (info / "METADATA").read_text()


def test_sdist_holds_the_mapped_folders_and_the_licence(sdist: Path) -> None:
    for folder in FOLDERS:
        assert python_files(sdist / folder) == python_files(ROOT / folder)
    assert (sdist / "descompiler" / "py.typed").is_file()
    assert (sdist / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_example_models_are_shipped(wheel: Path) -> None:
    """descompiler/examples.py is a link to the file that the examples use."""
    shipped = wheel / "descompiler" / "examples.py"
    assert shipped.read_bytes() == (ROOT / "examples" / "models.py").read_bytes() and not shipped.is_symlink()


def test_links_are_relative_and_reach_the_folders() -> None:
    for folder in ("passes", "cost_models"):
        link = ROOT / "descompiler" / folder
        assert link.is_symlink(), f"{link} must be a link, not a folder: {ROOT / folder} is the only copy"
        assert os.readlink(link) == f"../{folder}"
