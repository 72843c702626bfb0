"""Start the cluster of a cluster file on this machine, in this terminal; Ctrl-C or SIGTERM ends it.

    python cluster/start.py [cluster/local.yaml]

It runs the commands that `ray up` would run on the head, from the same file after the same checks. `ray up`
needs an ssh server for that, even on the machine it is typed on.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

_LOCAL = Path(__file__).with_name("local.yaml")


def read(path: Path) -> dict[str, Any]:
    """A cluster file with Ray's defaults filled in. Raises SystemExit when it is none, or names other machines."""
    try:
        written = YAML(typ="safe").load(path)
        config: dict[str, Any] = prepare_config(written)
        validate_config(config)
    except OSError as error:
        raise SystemExit(f"error: {path}: {error.strerror}") from error
    except (YAMLError, ValidationError, KeyError, AttributeError) as error:
        raise SystemExit(f"error: {path} is no cluster file: {getattr(error, 'message', error)}") from error
    provider = config["provider"]
    if (provider["type"], provider.get("head_ip"), provider.get("worker_ips")) != ("local", "127.0.0.1", []):
        raise SystemExit(f"error: {path} names other machines than this one: `ray up {path}` starts it")
    if "head_start_ray_commands" not in written:
        raise SystemExit(f"error: {path}: head_start_ray_commands: missing; Ray's own begin with `ray stop`")
    return config


def script(config: dict[str, Any]) -> str:
    """The head's commands as one shell script; the last one stays in the foreground and takes the signals."""
    names = ("initialization_commands", "head_setup_commands", "head_start_ray_commands")
    commands: list[str] = [command for name in names for command in config[name]]
    return "\n".join(["set -e", *commands[:-1], f"exec {commands[-1]} --block"])


def main() -> None:
    """Become the head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=_LOCAL)
    commands = script(read(parser.parse_args().file))
    # `ray`, and `ltt` for the jobs, are beside this Python; Ray's servers and jobs inherit the PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.execvp("bash", ["bash", "-c", commands])


if __name__ == "__main__":
    main()
