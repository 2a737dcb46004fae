from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import shiftadd_cli
from shiftadd_cli.recipe_file import packaged_names


def build_wheel(sources: Path, folder: Path, **environment: str) -> Path:
    """Build a wheel of a copy of the sources with the packages installed here."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    # CMake remembers the compiler it found, so every build has its own folder.
    build += [f"-Cbuild-dir={folder / 'build'}", str(sources)]
    result = subprocess.run(
        build, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sources(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a source distribution. CMake's findings about this machine must not leak into a build."""
    folder = tmp_path_factory.mktemp("sources") / "shiftadd"
    unwanted = shutil.ignore_patterns(
        "*.so",
        "CMakeCache.txt",
        "CMakeFiles",
        "*.ninja",
        "*.a",
        "__pycache__",
        ".git",
        ".venv*",
        "out",
        "build",
        ".*_cache",
    )
    shutil.copytree(repository, folder, ignore=unwanted)
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel as built without a compiler, which is the quickest."""
    return build_wheel(sources, tmp_path_factory.mktemp("wheel"), CC="/bin/false", CXX="/bin/false")


def test_wheel_without_a_compiler_is_pure_python(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


# The development install has compiled the kernels. Their code changes no name in a wheel, and takes minutes.
COMPILER = """#!/bin/sh
for argument; do
    shift
    case $argument in
        */native/*.cpp | */nanobind/src/*.cpp) set -- "$@" -x c++ /dev/null ;;
        *) set -- "$@" "$argument" ;;
    esac
done
exec c++ "$@"
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_wheel_with_a_compiler_holds_the_kernels(sources: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    names = zipfile.ZipFile(build_wheel(sources, tmp_path, CXX=str(compiler))).namelist()
    kernels = [name for name in names if name.startswith("shiftadd_cli/native/_native")]
    assert len(kernels) == 1
    assert not [name for name in names if name.endswith((".cpp", ".h", ".a", ".cmake", "CMakeLists.txt"))]


def test_wheel_holds_recipes_types_templates_and_licence_but_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for recipe in packaged_names():
        assert f"shiftadd_cli/configs/{recipe}.yaml" in names
    for file in ("py.typed", "report/unit_costs_45nm.yaml", "report/templates/base.html.jinja"):
        assert f"shiftadd_cli/{file}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith(("shiftadd_cli/", "shiftadd_cli-"))]


def test_recipes_load_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        # The finder of a development install takes precedence over the path.
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'ScikitBuild' not in type(finder).__name__]\n"
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


def test_version_is_the_newest_in_the_changelog(repository: Path) -> None:
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
