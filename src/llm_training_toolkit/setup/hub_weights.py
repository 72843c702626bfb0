"""Asks the hub for the weights of `model.path`: whether the id exists, this login may read it, and safetensors.

The answer brings config.json into the hub's cache, from which `families` reads size, family and dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.tqdm import tqdm

from llm_training_toolkit import families
from llm_training_toolkit.config import Config
from llm_training_toolkit.config.model_config import ModelConfig
from llm_training_toolkit.errors import DataError, PlanError, Problem
from llm_training_toolkit.setup.daemon_call import PLAN_PATIENCE_SECONDS, start_daemon_call

_REQUEST_SECONDS = 5.0


class _HiddenBar(tqdm):
    """Progress bar of a small file, which would stand in the middle of a plan."""

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - those of tqdm
        super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class HubAnswer:
    """Answer of the hub about a model."""

    problem: Problem | None = None
    unreachable: str = ""
    """Reason of a failed question; empty if it answered, or was not asked."""
    commit: str | None = None
    """Commit that the revision means now, if that was asked."""
    missing_tokenizer: str = ""
    """Reason why a tokenizer that a plan asked for cannot be had; empty otherwise."""


def ask_hub(path: str, revision: str | None = None) -> HubAnswer:
    """Ask the hub for the weights at `path` and a branch, tag or commit of it, within 12 seconds.

    Fetches their config.json into the hub's cache. Directories, weights in the cache and the hub's offline mode need no
    answer.
    """
    if not _needs_answer(path, revision):
        return HubAnswer()
    return _ask_in_time(lambda: _ask_for_files(path, revision), path, revision)


def _needs_answer(path: str, revision: str | None) -> bool:
    return families.is_hub_id(path) and not constants.HF_HUB_OFFLINE and not _is_cached(path, revision)


def ask_for_size(config: Config, say: Callable[[str], None] | None = None) -> HubAnswer | None:
    """Ask the hub for the weights of a run, and fetch the tokenizer by which a family without a known name is told.

    None for a run that has begun, which knows its size, and without a hub id. `say` is told of the question. Raises
    PlanError if the size is neither known here nor at the hub, and DataError for a tokenizer that cannot be had.
    """
    answer = _ask_for_weights(config, say)
    if answer is not None and _needs_tokenizer(config):
        _fetch_tokenizer(config)
    return answer


def ask_for_plan(config: Config) -> HubAnswer | None:
    """Ask as `ask_for_size` does, but wait 12 seconds for the tokenizer, without which a plan can be made."""
    answer = _ask_for_weights(config)
    if answer is None or not _needs_tokenizer(config):
        return answer
    fetched = start_daemon_call(lambda: _fetch_tokenizer(config), "fetch-tokenizer")
    wait([fetched], timeout=PLAN_PATIENCE_SECONDS)
    if not fetched.done():
        return replace(answer, missing_tokenizer=_format_late_answer())
    error = fetched.exception()
    if error is not None and not isinstance(error, DataError):
        raise error
    return answer if error is None else replace(answer, missing_tokenizer=str(error))


def _ask_for_weights(config: Config, say: Callable[[str], None] | None = None) -> HubAnswer | None:
    model = config.model
    if model.path is None or not families.is_hub_id(model.path) or families.read_recorded_plan(config):
        return None
    if say is not None and _needs_answer(model.path, model.revision):
        say(f"asking the hub for {model.path}")
    answer = ask_hub(model.path, model.revision)
    if not families.has_known_size(config):
        if families.find_weights_file(model.path, families.CONFIG_FILE, model.revision) is not None:
            families.find_run_size(config)  # raises: model.name is another one than that of the weights
        raise _build_unknown_size_error(model, answer)
    return answer


def _needs_tokenizer(config: Config) -> bool:
    return config.tokenizer.path is not None and not families.has_known_name(config.model.name)


def _fetch_tokenizer(config: Config) -> None:
    from llm_training_toolkit.data.tokenizer import resolve_tokenizer_directory

    assert config.tokenizer.path is not None, "_needs_tokenizer"
    resolve_tokenizer_directory(config.tokenizer.path, config.tokenizer.revision)


def ensure_known_size(config: Config) -> None:
    """Ask the hub only if the size does not follow from what is here. Raises the errors of `ask_for_size`.

    For ranks: the driver has asked, and each of many would ask again at each restart.
    """
    if not families.has_known_size(config):
        ask_for_size(config)


def _build_unknown_size_error(model: ModelConfig, answer: HubAnswer) -> PlanError:
    """Return the error of weights without a known size: the hub's own problem, else the missing config.json."""
    if answer.problem is None:
        asked = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else answer.unreachable or "it has none"
        what = f"{model.name} is the name of no known size, and the hub gives no config.json of {model.path} ({asked})"
        remedy = "Correct it, ask again with a network, or give the directory of the weights"
        fix = f"{families.suggest_names(model.name)} {remedy}".strip()
        problem = Problem("size-not-known", "model.path", what, fix)
    else:
        problem = answer.problem
    return PlanError.from_problems(str(problem), [problem])


def ask_hub_commit(path: str, revision: str | None) -> str | None:
    """Return the commit that a branch or tag of a hub's model means now, or None if 12 seconds do not tell."""

    def ask() -> HubAnswer:
        return HubAnswer(commit=HfApi().model_info(path, revision=revision, timeout=_REQUEST_SECONDS).sha)

    return _ask_in_time(ask, path, revision).commit


def _ask_in_time(ask: Callable[[], HubAnswer], path: str, revision: str | None) -> HubAnswer:
    asked = start_daemon_call(ask, "ask-hub")
    wait([asked], timeout=PLAN_PATIENCE_SECONDS)
    if not asked.done():
        return HubAnswer(unreachable=_format_late_answer())
    error = asked.exception()
    return asked.result() if error is None else _explain_refusal(path, revision, error)


def _format_late_answer() -> str:
    return f"no answer within {PLAN_PATIENCE_SECONDS:g} s"


def _is_cached(path: str, revision: str | None) -> bool:
    """Return whether weights of the hub are on this machine, and not their configuration alone."""
    weights = ("model.safetensors", "model.safetensors.index.json")
    here = {name: families.find_weights_file(path, name, revision) for name in (families.CONFIG_FILE, *weights)}
    return here[families.CONFIG_FILE] is not None and any(here[name] is not None for name in weights)


def _ask_for_files(path: str, revision: str | None) -> HubAnswer:
    found = HfApi().model_info(path, revision=revision, timeout=_REQUEST_SECONDS)
    if found.gated:
        HfApi().auth_check(path)
    files = {file.rfilename for file in found.siblings or ()}
    if any(name.endswith(".safetensors") for name in files):
        if families.CONFIG_FILE in files:
            HfApi().hf_hub_download(
                path,
                families.CONFIG_FILE,
                revision=revision,
                etag_timeout=_REQUEST_SECONDS,
                tqdm_class=_HiddenBar,
            )
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
