"""Hook of mkdocs: links from docs/ to files of the repository outside docs/ lead to copies of them in the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
COPIES = "repository"  # folder of the site
_LINK = re.compile(r"\]\((\.\./[^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file outside docs/ that a page links to."""
    pages = [DOCS / page.src_uri for page in files.documentation_pages()]
    for page in pages:
        for target in sorted({target for target, _ in _LINK.findall(page.read_text(encoding="utf-8"))}):
            source = (page.parent / target).resolve()
            if not source.is_file() or not _is_outside_docs(source):
                continue
            uri = _get_copy_uri(source)
            if not files.get_file_from_path(uri):
                files.append(File.generated(config, uri, content=_read_copy(source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Rewrite links to files outside docs/. A link to a folder fails the strict build."""
    if page.file.src_uri.startswith(f"{COPIES}/"):
        return markdown

    def rewrite(match: re.Match[str]) -> str:
        source = (DOCS / page.file.src_uri).parent.joinpath(match[1]).resolve()
        if not _is_outside_docs(source):
            return match[0]
        start = posixpath.dirname(page.file.src_uri)
        return f"]({posixpath.relpath(_get_copy_uri(source), start or '.')}{match[2] or ''})"

    return _LINK.sub(rewrite, markdown)


def _is_outside_docs(source: Path) -> bool:
    return source.is_relative_to(ROOT) and not source.is_relative_to(DOCS)


def _get_copy_uri(source: Path) -> str:
    relative = source.relative_to(ROOT).as_posix()
    return f"{COPIES}/{relative}" if source.suffix == ".md" else f"{COPIES}/{relative}.md"


def _read_copy(source: Path) -> str:
    """Return a page of a file: Markdown without its links into the repository, other files as a block of code."""
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".md":
        return re.sub(r"!?\[([^\]]*)\]\((?![a-z]+:)[^)]*\)", r"\1", text)
    return f"# {source.name}\n\n```{source.suffix.removeprefix('.')}\n{text}\n```\n"
