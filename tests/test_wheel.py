"""The wheel: built from a copy of the tree, installed where the tree cannot be seen, and used."""

from __future__ import annotations

import configparser
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("sharding", "models", "runtime")

# Where each package was found, the data that some need to be imported, and what pytest would load.
LOOK = """
import importlib.metadata, json
import meshwright.models, meshwright.runtime, meshwright.sharding
found = [module.__file__ for module in (meshwright.sharding, meshwright.models, meshwright.runtime)]
print(json.dumps({
    "files": found,
    "presets": len(meshwright.models.presets()),
    "chip": meshwright.sharding.Topology.parse("v5p:4x4x4").num_devices,
    "plugins": [(e.name, e.value) for e in importlib.metadata.entry_points(group="pytest11")
                if e.value.startswith("meshwright")],
    "version": importlib.metadata.version("meshwright"),
}))
"""


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_of_code_is_a_package_that_is_listed() -> None:
    packages = {
        f"meshwright.{'.'.join(init.parent.relative_to(ROOT).parts)}"
        for folder in FOLDERS
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert sorted(project()["tool"]["setuptools"]["packages"]) == sorted(packages)  # pyright: ignore[reportIndexIssue]
    lost = {
        str(file.relative_to(ROOT))
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.py")
        if not (file.parent / "__init__.py").exists()
    }
    assert not lost


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    # A copy, so that building leaves nothing in the tree and finds nothing of an earlier build.
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source],
        check=True,
        capture_output=True,
        timeout=180,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_all_code_and_all_data_and_nothing_else(wheel: pathlib.Path) -> None:
    expected = {
        f"meshwright/{file.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert {"meshwright/models/presets.toml", "meshwright/sharding/hardware/chips.toml"} <= held
    assert {f"meshwright/{folder}/py.typed" for folder in FOLDERS} <= held


def test_the_wheel_declares_its_command_its_plugin_and_its_licence(wheel: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entries,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        points = configparser.ConfigParser()
        points.read_string(archive.read(entries).decode())
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    assert dict(points["console_scripts"]) == {"meshwright": "meshwright.runtime.cli.main:main"}
    assert dict(points["pytest11"]) == {"meshwright": "meshwright.runtime.testing.plugin"}


@pytest.fixture(scope="module")
def installed(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A virtual environment that holds the wheel and sees our dependencies, but not the tree."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True, timeout=120)
    scheme = {"base": str(home), "platbase": str(home)}
    site = pathlib.Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", home / "bin" / "python"]
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", wheel],
        check=True,
        capture_output=True,
        timeout=120,
    )
    # What a .pth file names is searched, but .pth files in it, such as an editable install's, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def run(installed: pathlib.Path, *words: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [installed / "bin" / words[0], *words[1:]],
        cwd=installed,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_installed_it_is_three_packages_with_their_data(installed: pathlib.Path) -> None:
    found = json.loads(run(installed, "python", "-c", LOOK))
    assert all(pathlib.Path(file).is_relative_to(installed) for file in found["files"]), found["files"]
    assert found["presets"] >= 10
    assert found["chip"] == 64
    assert ["meshwright", "meshwright.runtime.testing.plugin"] in found["plugins"]
    assert found["version"] == project()["project"]["version"]  # pyright: ignore[reportIndexIssue]


def test_installed_it_gives_the_command(installed: pathlib.Path) -> None:
    told = run(installed, "meshwright", "--help")
    assert all(command in told for command in ("train", "launch", "profile", "checkpoint", "doctor"))
    assert "train.steps=" in run(installed, "meshwright", "config")


@pytest.mark.slow
def test_installed_it_trains(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(16):
        (text / f"{number}.txt").write_text(f"document {number} says {number * 7919} and no more. " * 20)
    (tmp_path / "build_model.py").write_text(
        "from meshwright.models.perceptron import MlpConfig, mlp\n\n"
        "def build(embed):\n    return mlp(MlpConfig(vocab=259, embed=embed, mlp=32))\n"
    )
    (tmp_path / "config.yaml").write_text(
        json.dumps(
            {
                "topology": "cpu:2",
                "compilation_cache": None,
                "model": {"build": "build_model:build", "arguments": {"embed": 16}},
                "data": {"source": str(text), "sequence": 16, "cache": str(tmp_path / "tokens")},
                "train": {"steps": 2, "global_batch": 4, "evaluate_every": 0},
            }
        )
    )
    command = [installed / "bin" / "meshwright", "train", "config.yaml"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()) == 2
