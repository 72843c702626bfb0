"""Checks of the git repositories among the sources, and commands of git that execute nothing of a repository."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.config.section import parse_timestamp
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.config.uri import is_uri, redact_uri
from llm_training_toolkit.plan.problem import Problem

_TIMEOUT_SECONDS = 600.0  # of a check that walks a history; the slowest one known takes seconds
# A repository's own .git/config is read by every git command and may name programs. Only plumbing commands are used,
# which run no hooks, pagers and aliases; these switches and the environment turn off the rest.
_SAFE_SWITCHES = (
    "--no-pager",
    "--no-replace-objects",
    *("-c", "safe.directory=*"),  # of another owner: nothing of it is executed
    *("-c", "core.fsmonitor=false"),
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "core.attributesFile=/dev/null"),
    *("-c", "core.quotePath=false"),
    *("-c", "diff.suppressBlankEmpty=false"),
    *("-c", "protocol.allow=never"),  # a partial clone would fetch, by a command of its own
)
_PARTIAL = r"^(extensions\.partialclone|remote\..*\.promisor)$"  # keys of a clone that lacks objects
_SAFE_ENVIRONMENT = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
}


def build_git_command(repository: Path, *arguments: str) -> list[str]:
    """Build a command of git in a repository that runs no program which the repository names."""
    return ["git", *_SAFE_SWITCHES, "-C", str(repository), *arguments]


def build_git_environment(repository: Path) -> dict[str, str]:
    """Build the environment of such a command: without the caller's git variables, and only in this directory."""
    inherited = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    ceiling = str(repository.resolve().parent)
    return {**inherited, **_SAFE_ENVIRONMENT, "HOME": os.devnull, "GIT_CEILING_DIRECTORIES": ceiling}


def resolve_object_directory(repository: Path) -> Path:
    """Return the directory of a repository's objects, which the work trees of a repository share."""
    return (repository / (_ask_git(repository, "rev-parse", "--git-path", "objects") or "objects")).resolve()


def init_shadow_repository(directory: Path, repository: Path) -> None:
    """Make an empty bare repository that can read a repository's objects, without its attributes and configuration."""
    names = _ask_git(repository, "rev-parse", "--show-object-format") or "sha1"
    _ask_git(directory, "init", "--quiet", "--bare", "--template=", f"--object-format={names}")


def resolve_repository(source: SourceConfig) -> Path:
    """Return the directory of a source's repository."""
    return Path(source.path.removeprefix("file://")).expanduser()


def find_git_problems(data: DataConfig) -> Iterator[Problem]:
    """Find every reason why a repository cannot be read, or its future would be trained on.

    A path that does not exist here may be one of the cluster that a run is submitted to: the preparation refuses it.
    """
    yield from _find_future_problems(data)
    for key, sources in (("data.sources", data.sources), ("data.eval.sources", data.eval.sources)):
        for index, source in enumerate(sources):
            if source.format != "git" or not (is_uri(source.path) or resolve_repository(source).exists()):
                continue
            if (problem := find_repository_problem(f"{key}[{index}]", source)) is not None:
                yield problem


def find_repository_problem(where: str, source: SourceConfig) -> Problem | None:
    """Return the reason why a repository's commits cannot be read, None if they can."""
    path, shown = resolve_repository(source), redact_uri(source.path)
    if is_uri(source.path) and not source.path.startswith("file://"):
        what = f"{shown} is an address, and the history of a local repository is read"
        return Problem("git-not-local", f"{where}.path", what, "Clone it, and give the directory of the clone")
    if shutil.which("git") is None:
        what = "format git needs the program git, which is not on the PATH"
        return Problem("git-missing", f"{where}.format", what, "Install git on every machine that prepares data")
    if not path.is_dir() or _ask_git(path, "rev-parse", "--git-dir") is None:
        what = f"{shown} is no git repository"
        fix = "Give the top directory of a clone (the one that holds .git), or a bare repository"
        return Problem("git-not-a-repository", f"{where}.path", what, fix)
    return _find_history_problem(where, source, path, shown)


def read_head_commit(path: Path) -> str:
    """Return the id of the current commit, empty if there is none."""
    return _ask_git(path, "rev-parse", "--verify", "--quiet", "HEAD^{commit}") or ""


def _find_history_problem(where: str, source: SourceConfig, path: Path, shown: str) -> Problem | None:
    if not read_head_commit(path):
        what = f"the repository {shown} has no commit on its current branch"
        return Problem("git-no-history", f"{where}.path", what, "Check out a branch that has commits")
    if _ask_git(path, "rev-parse", "--is-shallow-repository") == "true":
        what = f"{shown} is a shallow clone: its oldest commit would look as if it had written every file"
        return Problem("git-shallow-clone", f"{where}.path", what, "Run `git fetch --unshallow` in it")
    if _ask_git(path, "config", "--local", "--get-regexp", _PARTIAL):
        what = f"{shown} is a partial clone, whose missing files git would fetch while they are read"
        return Problem("git-partial-clone", f"{where}.path", what, "Clone it again without --filter")
    return _find_date_problem(where, source, path, shown)


def _find_date_problem(where: str, source: SourceConfig, path: Path, shown: str) -> Problem | None:
    limits = [parse_timestamp(date) for date in (source.after, source.before) if date is not None]
    if limits != sorted(set(limits)):
        what = f"no commit is both before {source.before} and after {source.after}"
        return Problem("git-empty-period", f"{where}.before", what, "Let before be the later date")
    # A history is oldest at its roots; the newest commit may be anywhere in it where clocks were wrong.
    if source.before is not None and not _has_commit(path, source.before, "--max-parents=0", is_before=True):
        what = f"no commit of {shown} is before {source.before}"
        return Problem("git-no-commit-before", f"{where}.before", what, "Give a later date")
    if source.after is not None and not _has_commit(path, source.after, is_before=False):
        what = f"no commit of {shown} is of {source.after} or later"
        return Problem("git-no-commit-after", f"{where}.after", what, "Give an earlier date, or fetch newer commits")
    return None


def _has_commit(path: Path, date: str, *options: str, is_before: bool) -> bool:
    """Return whether a commit is on a side of a date; reading ends with the first one that is."""
    limit = parse_timestamp(date)
    command = build_git_command(path, "rev-list", "--timestamp", *options, "HEAD")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=build_git_environment(path)
    ) as process:
        assert process.stdout is not None
        found = any((int(line.split()[0]) < limit) == is_before for line in process.stdout)
        process.kill()
    return found


def _find_future_problems(data: DataConfig) -> Iterator[Problem]:
    """Find training sources that reach beyond the date from which the same repository is held out."""
    held_out = _find_held_out_dates(data)
    for index, source in enumerate(data.sources):
        path = resolve_repository(source).resolve()
        if source.format != "git" or path not in held_out:
            continue
        after = held_out[path]
        if after is None:
            what = f"{source.path} is held out from its first commit on, and trained on as well"
            fix = "Give the held-out source a date in after, and this one the same date in before"
        elif source.before is None or parse_timestamp(source.before) > parse_timestamp(after):
            what = f"{source.path} is held out from {after} on, and trained on beyond that date"
            fix = f"Set before: {after}"
        else:
            continue
        yield Problem("git-trains-on-future", f"data.sources[{index}].before", what, fix)


def _find_held_out_dates(data: DataConfig) -> dict[Path, str | None]:
    """Return the earliest date from which each repository is held out, None for its first commit."""
    dates: dict[Path, str | None] = {}
    for source in data.eval.sources:
        if source.format == "git":
            path = resolve_repository(source).resolve()
            dates[path] = _choose_earlier(dates.get(path, source.after), source.after)
    return dates


def _choose_earlier(one: str | None, other: str | None) -> str | None:
    return None if one is None or other is None else min(one, other, key=parse_timestamp)


def _ask_git(path: Path, *arguments: str) -> str | None:
    """Return what a command of git prints, None if it fails."""
    done = subprocess.run(
        build_git_command(path, *arguments),
        capture_output=True,
        check=False,
        env=build_git_environment(path),
        timeout=_TIMEOUT_SECONDS,
    )
    return done.stdout.decode(errors="backslashreplace").strip() if done.returncode == 0 else None
