"""`ltt publish`: uploads a run's export to the Hugging Face hub in one commit, private unless asked otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from llm_training_toolkit.checkpoint.run import Run
from llm_training_toolkit.commands.published_card import CARD_NAME, find_licence, format_published_card
from llm_training_toolkit.data.tokenizer import TOKENIZER_FILES
from llm_training_toolkit.errors import CheckpointError, LaunchError, PlanError, Problem
from llm_training_toolkit.evaluation.records import read_eval_records
from llm_training_toolkit.export import ORIGIN_FILE, read_source_checkpoint_name, read_source_run_name
from llm_training_toolkit.runs.directory import RunDirectory, check_run, find_model_directory, parse_checkpoint_name
from llm_training_toolkit.setup.daemon_call import start_daemon_call

_OWN_FILES = frozenset({".gitattributes", CARD_NAME})  # of a new repository on the hub
# Files of exports: a publication deletes those of an earlier one, and nothing that a person added.
_EXPORT_FILES = frozenset(
    {"config.json", "generation_config.json", "adapter_config.json", ORIGIN_FILE, *TOKENIZER_FILES}
)
_WEIGHTS = re.compile(r"(?:model|adapter_model)(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?")
# Looking up a name has no timeout of its own, and takes 10 to 30 s without a network.
_PATIENCE_SECONDS = 15.0
# Without an answer to a request, or progress of an upload; the hub's client waits for ever.
_REQUEST_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class PublishRequest:
    """Arguments of `ltt publish`."""

    run: RunDirectory
    repository: str
    """OWNER/NAME."""
    public: bool = False
    licence: str | None = None
    """Licence's name on the hub; by default that of the base."""
    replace: bool = False
    """Permission to take the place of another run's export."""


@dataclass(frozen=True)
class PublishResult:
    """Result of a publication."""

    address: str
    commit: str
    public: bool
    licence: str | None
    files: int
    bytes: int

    def __str__(self) -> str:
        seen = "public" if self.public else "private"
        return f"{self.address}: {seen}, {self.files} files, {self.bytes / 1e6:,.1f} MB, commit {self.commit[:12]}"

    def to_json(self) -> dict[str, Any]:
        """Return the documented output of `ltt publish --json`."""
        return asdict(self)


def publish_run(request: PublishRequest, say: Callable[[str], None]) -> PublishResult:
    """Upload the export of a run with its card, and delete files of an earlier one that this one lacks.

    Raises CheckpointError for a run without a complete export, and LaunchError if the hub cannot be reached or refuses.
    Raises PlanError for a repository with other content or of the other visibility, owner or run.
    """
    trained = Run.read(check_run(request.run))
    directory = find_model_directory(request.run.path)
    checkpoint = _find_exported_checkpoint(directory)
    api = HfApi()
    with _hub_errors(request.repository):
        found = _ask_in_time(lambda: _find_repository(api, request.repository))
        if found is not None:
            _check_repository(found, request)
            _check_published_run(api, found, request, trained.config.run.name)
        licence = find_licence(trained, request.licence)
    evaluations = [record for record in read_eval_records(request.run) if record.step == checkpoint]
    card = format_published_card(directory, trained, evaluations, repository=request.repository, licence=licence)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    address = f"{constants.ENDPOINT}/{request.repository}"
    say(f"uploading {len(files)} files, {size / 1e6:,.1f} MB, to {address}")
    kept = {path.relative_to(directory).as_posix() for path in files}
    message = f"{trained.directory.name}, step {checkpoint}"
    with _hub_errors(request.repository):
        if found is None:
            api.create_repo(request.repository, private=not request.public)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *_list_additions(directory, files, card),
            *_list_deletions(found, kept),
        ]
        done = api.create_commit(request.repository, operations, commit_message=message)
    return PublishResult(address, done.oid, request.public, licence, len(files), size)


def _find_exported_checkpoint(directory: Path) -> int:
    """Return the step of an export. Raises CheckpointError for a directory that no export has completed."""
    name = read_source_checkpoint_name(directory)
    place = parse_checkpoint_name(Path(name)) if name is not None else None
    if place is None or not any(directory.glob("*.safetensors")) or not (directory / CARD_NAME).is_file():
        raise CheckpointError(f"{directory}: no complete export: ltt export {directory.parent} makes one and checks it")
    return place[0]


def _find_repository(api: HfApi, name: str) -> ModelInfo | None:
    """Return what the hub says of a repository, None if it does not exist. Raises without a valid login."""
    get_session().timeout = _REQUEST_TIMEOUT_SECONDS
    api.whoami()
    try:
        return api.model_info(name)
    except RepositoryNotFoundError:
        return None


def _list_names(found: ModelInfo) -> set[str]:
    return {file.rfilename for file in found.siblings or ()}


def _check_repository(found: ModelInfo, request: PublishRequest) -> None:
    """Raise PlanError for a repository with other content than an export, or of the other visibility."""
    names = _list_names(found)
    if ORIGIN_FILE not in names and not names <= _OWN_FILES:
        others = ", ".join(sorted(names - _OWN_FILES)[:3])
        what = f"{request.repository} exists and holds no export of this toolkit ({others})"
        raise _refuse("repository-with-other-content", what, "Name another repository, or empty this one")
    if bool(found.private) == request.public:
        now = "private" if found.private else "public"
        fix = "Leave out --public" if request.public else "Give --public"
        what = f"{request.repository} exists and is {now}"
        raise _refuse("repository-visibility", what, f"{fix}, or change its visibility on the hub")


def _check_published_run(api: HfApi, found: ModelInfo, request: PublishRequest, run: str) -> None:
    """Raise PlanError for a repository that holds the export of another run, unless it may be replaced."""
    if request.replace or ORIGIN_FILE not in _list_names(found):
        return
    with TemporaryDirectory() as folder:
        api.hf_hub_download(request.repository, ORIGIN_FILE, revision=found.sha, local_dir=folder)
        published = read_source_run_name(Path(folder))
    if published != run:
        holder = f"the run {published}" if published is not None else "an unnamed run"
        what = f"{request.repository} holds the export of {holder}, and this is {run}"
        raise _refuse("repository-of-another-run", what, "Name another repository, or give --replace")


def _list_additions(directory: Path, files: list[Path], card: str) -> Iterator[CommitOperationAdd]:
    for path in files:
        name = path.relative_to(directory).as_posix()
        yield CommitOperationAdd(name, card.encode() if name == CARD_NAME else path)


def _list_deletions(found: ModelInfo | None, kept: set[str]) -> Iterator[CommitOperationDelete]:
    """Yield deletions of an earlier publication's files, such as shards of another number; others stay."""
    for name in sorted(_list_names(found)) if found is not None else ():
        if name not in kept and (name in _EXPORT_FILES or _WEIGHTS.fullmatch(name)):
            yield CommitOperationDelete(name)


def _ask_in_time(ask: Callable[[], ModelInfo | None]) -> ModelInfo | None:
    """Return the answer, or raise its error; LaunchError if 15 seconds bring none."""
    asked = start_daemon_call(ask, "ask-hub")
    wait([asked], timeout=_PATIENCE_SECONDS)
    if not asked.done():
        raise _fail("hub-unreachable", f"no answer within {_PATIENCE_SECONDS:g} s")
    return asked.result()


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turn errors of the hub's client into the toolkit's."""
    login = "`hf auth login`, or HF_TOKEN, with a token that may write"
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise _refuse("hub-login", "there is no login", f"Log in first: {login}") from error
    except HFValidationError as error:
        raise _refuse("repository-name", f"{repository} is no name of a repository", "Give OWNER/NAME") from error
    except OfflineModeIsEnabled as error:
        raise _refuse("hub-offline", "HF_HUB_OFFLINE is set", "Unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = _get_first_line(error)
        if status in {401, 403}:
            what = f"this login may not write to {repository} ({said})"
            raise _refuse(
                "hub-rights", what, f"Name a repository of your own or of your team, or log in: {login}"
            ) from error
        raise _fail("hub-refused", said) from error
    except (HTTPError, OSError) as error:
        raise _fail("hub-unreachable", _get_first_line(error)) from error
    except (ValueError, RuntimeError) as error:  # of the card's metadata; of the hub's own uploader
        raise _fail("hub-refused", _get_first_line(error)) from error


def _get_first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _refuse(code: str, what: str, fix: str) -> PlanError:
    return PlanError.from_problems(f"--repo: {what}. {fix}", [Problem(code, "--repo", what, fix)])


def _fail(code: str, what: str) -> LaunchError:
    fix = f"Check the network and {constants.ENDPOINT} (HF_ENDPOINT); the same command starts again"
    return LaunchError.from_problems(f"the hub did not take the export: {what}. {fix}", [Problem(code, "", what, fix)])
