"""Lock, pyproject.toml, environment.yml and what is installed say the same."""

import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = {
    canonicalize_name(requirement.name): requirement
    for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    if line.strip() and not line.startswith("#")
    for requirement in [Requirement(line)]
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]


def pinned(name: str) -> str:
    (specifier,) = LOCK[canonicalize_name(name)].specifier
    assert specifier.operator == "=="
    assert "*" not in specifier.version
    return specifier.version


def test_every_line_of_the_lock_pins_one_exact_version():
    assert len(LOCK) > 100
    for name in LOCK:
        assert pinned(name)


def test_torch_and_triton_are_the_pair_that_belongs_together():
    assert (pinned("torch"), pinned("triton")) == ("2.13.0", "3.7.1")


@pytest.mark.parametrize("text", PROJECT["dependencies"] + EXTRAS)
def test_the_lock_satisfies_the_range_in_pyproject(text):
    requirement = Requirement(text)
    assert requirement.specifier.contains(pinned(requirement.name))


def test_installed_versions_are_the_locked_ones():
    wrong = {}
    for name in LOCK:
        installed = distribution(name).version.split("+")[0]  # a CPU build of torch calls itself 2.13.0+cpu
        if installed != pinned(name):
            wrong[name] = (installed, pinned(name))
    assert not wrong


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_is_closed_under_requirements(python):
    """Whatever a locked package requires on Linux is locked too, in a version that it admits."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    missing = []
    for name in LOCK:
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate(environment):
                continue
            wanted = canonicalize_name(requirement.name)
            if wanted.startswith(("nvidia-", "cuda-")):  # only in a CUDA build; pinned by torch itself
                continue
            if wanted not in LOCK or not requirement.specifier.contains(pinned(wanted), prereleases=True):
                missing.append(f"{name} requires {text}")
    assert not missing


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_locked_package_admits_python(python):
    refused = [
        name
        for name in LOCK
        if (bounds := distribution(name).metadata.get("Requires-Python"))
        and not Requirement(f"python{bounds}").specifier.contains(f"{python}.0")
    ]
    assert not refused


def test_conda_users_get_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    python, pip, packages = environment["dependencies"]
    version = python.removeprefix("python=")
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(version)
    assert pip == "pip"
    assert packages == {"pip": ["-r requirements.lock"]}
