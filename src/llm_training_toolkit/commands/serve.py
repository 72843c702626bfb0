"""Checks of `ltt serve` that need no model: packages, family, key, port."""

from __future__ import annotations

import importlib.util
import secrets
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.errors import LaunchError, PlanError
from llm_training_toolkit.families import check_model_type, read_saved_config
from llm_training_toolkit.runs.directory import RunDirectory, check_run, find_model_directory
from llm_training_toolkit.serving.settings import (
    ServingSettings,
    find_key_problem,
    get_default_name,
    is_loopback,
)

_LINES = """\
model     {name}
endpoint  {url}/v1
page      {url}/{fragment}
key       {key}
stop      Ctrl-C"""
_PACKAGES = ("fastapi", "starlette", "uvicorn", "watchfiles")  # of Ray Serve, and not of Ray


@dataclass(frozen=True)
class ServerPlan:
    """A server that can be started: its settings with the key, and its address."""

    settings: ServingSettings
    host: str
    port: int

    @property
    def url(self) -> str:
        """Address at which a browser on this machine reaches the server."""
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - compared only
        return f"http://{f'[{shown}]' if ':' in shown else shown}:{self.port}"

    def to_json(self) -> dict[str, str | None]:
        """Return what a client needs."""
        return {"url": f"{self.url}/v1", "key": self.settings.key, "model": self.settings.name}

    def format_lines(self) -> list[str]:
        """Return what a person needs. Browsers send no fragment of an address, so the key stays on this machine."""
        key = self.settings.key
        fragment = "" if key is None else f"#key={quote(key, safe='')}"
        shown = _LINES.format(name=self.settings.name, url=self.url, fragment=fragment, key=key or "none is asked for")
        return shown.splitlines()


def prepare_server(settings: ServingSettings, *, host: str, port: int, without_key: bool) -> ServerPlan:
    """Return the server of these settings; an empty name becomes that of the run or directory.

    Raises PlanError, CheckpointError or LaunchError for what can be found without loading the model.
    """
    check_packages()
    check_model(settings.model, settings.step)
    key = resolve_key(settings.key, without=without_key, host=host)
    name = settings.name or get_default_name(settings.model)
    return ServerPlan(replace(settings, name=name, key=key), host, reserve_port(host, port))


def check_packages() -> None:
    """Raise PlanError if Ray Serve's packages are missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise PlanError(
            f"ltt serve needs Ray Serve ({', '.join(missing)} not installed): pip install 'llm-training-toolkit[serve]'"
        )


def check_model(model: str, step: int | None) -> None:
    """Raise CheckpointError without a run or a model at a path, PlanError for a model of another family.

    URIs and the base of adapters are checked by the server process.
    """
    if is_uri(model):
        return
    run = RunDirectory(Path(model).expanduser().absolute())
    if step is not None:
        check_run(run)
    elif not run.resolved_config_path.is_file():
        directory = find_model_directory(run.path)
        found = read_saved_config(str(directory))
        if found is not None:
            check_model_type(str(found.get("model_type")), str(directory / "config.json"))


def resolve_key(key: str | None, *, without: bool, host: str) -> str | None:
    """Return the key that requests carry: the given one, or a new one of 32 characters; None `without` one.

    Raises PlanError for a key that no header can carry, and for a server without a key beyond loopback.
    """
    if without:
        if key is not None:
            raise PlanError("--no-key: a key is given as well (--key or LTT_SERVE_KEY): leave one out")
        if not is_loopback(host):
            raise PlanError(f"--no-key --host {host}: other machines could use the model: leave out one of the two")
        return None
    if key is None:
        return secrets.token_urlsafe(24)
    if (problem := find_key_problem(key)) is not None:
        raise PlanError(f"--key: {problem}")
    return key


def reserve_port(host: str, port: int) -> int:
    """Return the port if nothing listens there, and a free one for 0. Raises LaunchError for one that is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not held by connections that have ended
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise LaunchError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}): give another one; --port 0 takes a "
            "free one"
        ) from error
