"""Extras of the distribution and the pinned requirement files of the image."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
FOR_USERS = EXTRAS.keys() - {"all", "dev"}


def requirements(extra: str) -> Iterator[Requirement]:
    """Requirements of an extra, those of extras that it names included."""
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == PROJECT["name"]:
            for named in requirement.extras:
                yield from requirements(named)
        else:
            yield requirement


def pins(name: str) -> dict[str, str]:
    """Versions by package, of a requirement file and of those that it includes."""
    found: dict[str, str] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("-r "):
            found |= pins(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            package, _, version = line.partition("==")
            found[canonicalize_name(package)] = version
    return found


def unmet(requirements: Iterator[Requirement], pinned: dict[str, str]) -> list[str]:
    """Requirements that the pins miss or contradict."""
    return [
        str(each)
        for each in requirements
        if not each.specifier.contains(pinned.get(canonicalize_name(each.name), "0"), prereleases=True)
    ]


def test_all_covers_every_extra_for_users() -> None:
    assert {"bench", "gpu", "mlflow", "qlora", "wandb"} <= FOR_USERS
    wanted = {str(requirement) for extra in FOR_USERS for requirement in requirements(extra)}
    assert {str(requirement) for requirement in requirements("all")} == wanted


def test_one_package_has_one_range_in_all_extras() -> None:
    ranges: dict[str, set[str]] = {}
    for extra in EXTRAS:
        for requirement in requirements(extra):
            ranges.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert [name for name, found in ranges.items() if len(found) > 1] == []


def test_extras_that_messages_and_pages_name_exist() -> None:
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    named = [extra for file in files for extra in re.findall(r"llm-training-toolkit\[(\w+)\]", file.read_text())]
    assert {"qlora", "wandb", "mlflow", "hybrid"} <= {*named}
    assert {*named} - EXTRAS.keys() == set()


def test_pins_meet_the_direct_requirements() -> None:
    run_time = pins("requirements.txt")
    assert unmet(map(Requirement, PROJECT["dependencies"]), run_time) == []
    assert unmet(requirements("dev"), pins("requirements-dev.txt")) == []
    assert unmet(requirements("bench"), run_time | pins("requirements-bench.txt")) == []
