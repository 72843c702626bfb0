"""Asks the hub for the weights of `model.path`: whether the id exists, this login may read it, and safetensors."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from llm_training_toolkit.errors import Problem
from llm_training_toolkit.plan.checks.run_check import is_directory_or_hub_id
from llm_training_toolkit.setup.daemon_call import start_daemon_call

_REQUEST_SECONDS = 5.0
# For two requests and the address: looking up a name has no timeout of its own, and takes 10 to 30 s without a network.
_PATIENCE_SECONDS = 12.0


@dataclass(frozen=True)
class HubAnswer:
    """Answer of the hub about a model."""

    problem: Problem | None = None
    unreachable: str = ""
    """Reason of a failed question; empty if it answered, or was not asked."""
    commit: str | None = None
    """Commit that the revision means now, if that was asked."""


def ask_hub(path: str, revision: str | None = None) -> HubAnswer:
    """Ask the hub for the weights at `path` and a branch, tag or commit of it, within 12 seconds.

    Directories, weights in the hub's cache and its offline mode need no answer.
    """
    is_cached = isinstance(_find_cached_config(path, revision), str)
    if Path(path).expanduser().is_dir() or is_cached or constants.HF_HUB_OFFLINE or not is_directory_or_hub_id(path):
        return HubAnswer()
    return _ask_in_time(lambda: _ask_for_files(path, revision), path, revision)


def ask_hub_commit(path: str, revision: str | None) -> str | None:
    """Return the commit that a branch or tag of a hub's model means now, or None if 12 seconds do not tell."""

    def ask() -> HubAnswer:
        return HubAnswer(commit=HfApi().model_info(path, revision=revision, timeout=_REQUEST_SECONDS).sha)

    return _ask_in_time(ask, path, revision).commit


def _ask_in_time(ask: Callable[[], HubAnswer], path: str, revision: str | None) -> HubAnswer:
    asked = start_daemon_call(ask, "ask-hub")
    wait([asked], timeout=_PATIENCE_SECONDS)
    if not asked.done():
        return HubAnswer(unreachable=f"no answer within {_PATIENCE_SECONDS:g} s")
    error = asked.exception()
    return asked.result() if error is None else _explain_refusal(path, revision, error)


def _find_cached_config(path: str, revision: str | None) -> object:
    try:
        return try_to_load_from_cache(path, "config.json", revision=revision)
    except ValueError:  # not the form of an id
        return None


def _ask_for_files(path: str, revision: str | None) -> HubAnswer:
    found = HfApi().model_info(path, revision=revision, timeout=_REQUEST_SECONDS)
    if found.gated:
        HfApi().auth_check(path)
    if any(file.rfilename.endswith(".safetensors") for file in found.siblings or ()):
        return HubAnswer()
    what = f"{path} has no weights in safetensors on the hub, and pickled ones are not opened"
    fix = "Save them with transformers, save_pretrained, where you trust them, and give that directory"
    return HubAnswer(Problem("no-safetensors", "model.path", what, fix))


def _explain_refusal(path: str, revision: str | None, error: BaseException) -> HubAnswer:
    match error:
        case GatedRepoError():
            what = f"{path} is gated, and this login has not been let in"
            fix = (
                f"Accept its conditions at {constants.ENDPOINT}/{path}, then `hf auth login`, or HF_TOKEN on every node"
            )
            return HubAnswer(Problem("hub-model-gated", "model.path", what, fix))
        case RevisionNotFoundError():
            what = f"{path} has no branch, tag or commit {revision} on the hub"
            return HubAnswer(Problem("no-such-revision", "model.revision", what, "Correct it, or remove it for `main`"))
        case RepositoryNotFoundError():
            what = f"{path} is no directory here, and the hub shows no model of this name"
            fix = "Correct it; for a private model `hf auth login`, or HF_TOKEN on every node"
            return HubAnswer(Problem("no-such-hub-model", "model.path", what, fix))
    return HubAnswer(unreachable=str(error).partition("\n")[0] or type(error).__name__)
