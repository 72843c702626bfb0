"""Ray Serve deployment: replicas that each hold the model and answer requests through the ASGI application.

`build_application` is also an import path for `serve deploy` on clusters that run Ray Serve already.
"""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.serving.app import build_app
from llm_training_toolkit.serving.served_model import ServedModel
from llm_training_toolkit.serving.settings import (
    KEY_VARIABLE,
    ServingLimits,
    ServingSettings,
    find_key_problem,
    get_default_name,
)

_SPARE_REQUESTS = 32  # health, models and refusals go past the queue
_SHUTDOWN_SECONDS = 5.0  # for answers under way, once the server is asked to stop


class ServeArguments(BaseModel):
    """Arguments of `build_application`, as `args:` of a Serve configuration file. The key comes from LTT_SERVE_KEY."""

    model_config = ConfigDict(extra="forbid")
    model: str
    name: str | None = None
    step: int | None = Field(None, ge=0)
    device: str = "auto"
    replicas: int = Field(1, ge=1)
    cpus: int = Field(1, ge=1)
    gpus: int = Field(0, ge=0)
    max_tokens: int = Field(ServingLimits.max_tokens, ge=1)
    max_queued: int = Field(ServingLimits.max_queued, ge=1)
    batch_size: int = Field(ServingLimits.batch_size, ge=1)
    timeout: float = Field(ServingLimits.timeout, gt=0)


class ModelReplica:
    """Process of Ray Serve that holds the model."""

    def __init__(self, settings: ServingSettings) -> None:
        self._settings = settings
        self._model = ServedModel.open(settings)

    def __serve_build_asgi_app__(self) -> Any:  # noqa: ANN401 - the name and the type are Ray Serve's
        """Return the application; Ray Serve calls this after the constructor."""
        return build_app(self._model, self._settings)


def build_deployment(settings: ServingSettings, *, replicas: int, cpus: int, gpus: int) -> serve.Application:
    """Return the application of Ray Serve, with `cpus` and `gpus` for each replica."""
    limits = settings.limits
    deployment = serve.deployment(
        serve.ingress()(ModelReplica),
        name="model",
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=limits.max_queued + limits.batch_size + _SPARE_REQUESTS,
        graceful_shutdown_timeout_s=_SHUTDOWN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=1,  # a model that cannot be loaded now cannot be loaded in a minute
    )
    return deployment.bind(settings)


def build_application(arguments: ServeArguments) -> serve.Application:
    """Return the application for `serve deploy`.

    Raises ConfigError without a key, because a cluster is no loopback, and for one that no header can carry.
    """
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        raise ConfigError(f"{KEY_VARIABLE} is not set where Ray Serve builds the application: set it in env_vars")
    if (problem := find_key_problem(key)) is not None:
        raise ConfigError(f"{KEY_VARIABLE}: {problem}")
    limits = ServingLimits(arguments.max_tokens, arguments.max_queued, arguments.batch_size, arguments.timeout)
    name = arguments.name or get_default_name(arguments.model)
    settings = ServingSettings(arguments.model, name, arguments.step, arguments.device, key, limits)
    return build_deployment(settings, replicas=arguments.replicas, cpus=arguments.cpus, gpus=arguments.gpus)
