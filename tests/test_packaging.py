from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import shiftadd_cli
from shiftadd_cli.recipe_file import packaged_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=repository, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_recipes_types_and_licence_but_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for recipe in packaged_names():
        assert f"shiftadd_cli/configs/{recipe}.yaml" in names
    assert "shiftadd_cli/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith(("shiftadd_cli/", "shiftadd_cli-"))]


def test_recipes_load_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import shiftadd_cli, shiftadd_cli.recipe_file as files\n"
        "from shiftadd_cli import Recipe\n"
        "print(shiftadd_cli.__file__, files.configs_folder(), *files.packaged_names(), Recipe.load('rtn').fit)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    package = tmp_path / "shiftadd_cli"
    assert result.stdout.split() == [
        str(package / "__init__.py"),
        str(package / "configs"),
        *packaged_names(),
        "uniform",
    ]


def test_version_is_the_newest_of_the_changelog(repository: Path) -> None:
    headings = re.findall(r"^## (\S+)", (repository / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == shiftadd_cli.__version__


def test_constraints_pin_every_declared_dependency(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    pinned = re.findall(r"^([A-Za-z0-9._-]+)==", (repository / "constraints.txt").read_text(), flags=re.MULTILINE)

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[<>=;~! \[]", name)[0]).lower()

    assert {normal(name) for name in declared} <= {normal(name) for name in pinned}


def test_public_names_resolve_and_unknown_ones_do_not() -> None:
    for name in shiftadd_cli.__all__:
        assert getattr(shiftadd_cli, name) is not None
        assert name in dir(shiftadd_cli)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = shiftadd_cli.nonsense
