"""Generator of the configuration reference: `python -m llm_training_toolkit.config.reference FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_origin

from pydantic.fields import FieldInfo

from llm_training_toolkit.config.fields import format_type, get_inner_section, iter_sections
from llm_training_toolkit.config.run_identity import get_field_tag
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.section import ConfigSection

_HEAD = """\
# Configuration

<!-- Written from the schema: `python -m llm_training_toolkit.config.reference docs/configuration.md` -->

A run is described by one YAML 1.2 file. `key=value` on the command line changes single fields: `optim.lr=3e-4`,
`data.sources.0.fim.rate=0.3`, `model.config_overrides={num_hidden_layers: 4}`, `model.path=null`. An unknown key, a key
given twice and a value of the wrong type are errors.

Effect of a change to a field in a run that has begun:

- **identity**: it would be another run. Refused, unless `--accept KEY` takes the change.
- **horizon**: the length of the run. Refused, unless `--extend` takes it; the schedule stretches to the new length.
- **free**: may change at every start.

`N` stands for a position in a list, from 0.
"""


def render_reference() -> str:
    """Return the reference as Markdown: one list per section."""
    page = [_HEAD]
    page += [_format_section(key, section) for key, section in iter_sections() if key]
    return "\n".join(page)


def _format_section(key: str, section: type[ConfigSection]) -> str:
    fields = (_format_field(name, info) for name, info in section.model_fields.items())
    return "\n".join([f"## `{key}`", "", _join_lines(section.__doc__), "", *fields, ""])


def _format_field(name: str, info: FieldInfo) -> str:
    tag = get_field_tag(info)
    effect = f" Changing it: **{tag.value}**." if tag else ""
    return (
        f"- **`{name}`**: {_format_value_type(info)}. Default: {_format_default(info)}.{effect}\n"
        f"  {_join_lines(info.description)}"
    )


def _format_value_type(info: FieldInfo) -> str:
    if get_inner_section(info.annotation) is None:
        return format_type(info.annotation, info.metadata)
    return "a list of sections, below" if get_origin(info.annotation) is tuple else "a section, below"


def _format_default(info: FieldInfo) -> str:
    if info.is_required():
        return "**required**"
    default: Any = info.default
    return "its defaults" if isinstance(default, ConfigSection) else f"`{json.dumps(default)}`"


def _join_lines(text: str | None) -> str:
    return " ".join((text or "").split())


def main(arguments: list[str]) -> None:
    """Write the reference to the file named."""
    if len(arguments) != 1:
        raise SystemExit(f"usage: python -m {Config.__module__.rpartition('.')[0]}.reference FILE")
    target = Path(arguments[0])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render_reference(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
