"""The reference page: complete, and what the schema says today."""

from __future__ import annotations

from pathlib import Path

from llm_training_toolkit.config.fields import iter_sections
from llm_training_toolkit.config.reference import main, render_reference

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_page_is_what_the_schema_says() -> None:
    fix = "run: python -m llm_training_toolkit.config.reference docs/configuration.md"
    assert PAGE.read_text(encoding="utf-8") == render_reference(), fix


def test_every_field_has_a_row_with_a_description() -> None:
    for key, section in iter_sections():
        assert not key or f"## `{key}`\n" in render_reference()
        for name, info in section.model_fields.items():
            assert info.description, f"{key}.{name} has no docstring"


def test_every_entry_names_type_default_and_effect() -> None:
    entries = [line for line in render_reference().splitlines() if line.startswith("- **`")]
    assert len(entries) > 50
    assert all(". Default: " in entry for entry in entries)
    assert {entry.rpartition("**")[0].rpartition("**")[2] for entry in entries if "Changing it" in entry} == {
        "identity",
        "horizon",
        "free",
    }


def test_main_writes_the_file(tmp_path: Path) -> None:
    main([str(tmp_path / "new" / "page.md")])
    assert (tmp_path / "new" / "page.md").read_text(encoding="utf-8") == render_reference()
