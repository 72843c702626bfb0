"""Small git repositories with histories of their own, made by the program git."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

FIRST = datetime(2026, 1, 1, tzinfo=UTC)


def day(number: int) -> str:
    """The date of a day of the history, in words of git and of the configuration."""
    return (FIRST + timedelta(days=number)).isoformat()


class History:
    """A repository that grows by a commit a day, by authors whose names must not reach a document."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.days = path, 0
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str, date: str = "", stdin: bytes = b"") -> str:
        """Run git here, without any configuration but the repository's."""
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_AUTHOR_NAME": "Ann Author",
            "GIT_AUTHOR_EMAIL": "ann@example.org",
            "GIT_COMMITTER_NAME": "Carl Committer",
            "GIT_COMMITTER_EMAIL": "carl@example.org",
            **({"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date} if date else {}),
        }
        done = subprocess.run(
            ["git", *arguments], cwd=self.path, check=True, capture_output=True, env=environment, input=stdin
        )
        return done.stdout.decode(errors="surrogateescape").strip()

    def commit(self, message: str, date: str = "", **files: bytes | None) -> str:
        """Commit some files, None to delete one, a day after the last commit; `__` in a name is a dot."""
        for name, content in files.items():
            self.write(name.replace("__", "."), content)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message, date=date or day(self.days))
        self.days += 1
        return self.git("rev-parse", "HEAD")

    def write(self, name: str, content: bytes | None) -> None:
        """Write a file, or remove it."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)


def write_history(path: Path) -> History:
    """A history of 30 commits with everything that is awkward about text, and all that is no text."""
    history = History(path)
    lines = [f"line {number}\n" for number in range(60)]
    history.commit("First\n\nBody.\n\nSigned-off-by: Ann Author <ann@example.org>", a__py="".join(lines).encode())
    for number in range(17):
        lines[3 * number] = f"changed {number} é 漢 😀\n"
        if number % 3 == 0:
            lines[-1 - number] = "and far below\n"
        history.commit(f"Change {number}, asked for by <carl@example.org>", a__py="".join(lines).encode())
    history.commit("No newline at the end", b__txt=b"one\ntwo")
    history.commit("Another end", b__txt=b"one\ntwo\nthree")
    history.commit("Windows", b__txt=b"one\r\ntwo\r\n\tthree \r\n\r\n")
    strange = 'dir/ü name "quoted"\tx.py'
    history.write(strange, b"x = 1\n")
    history.commit("A strange path")
    history.write(strange, b"x = 2\n-- not a header\n++ neither\n@@ -1 +1 @@\ndiff --git a/x b/x\n")
    history.commit("Text like a patch")
    history.commit("Binary and Latin", c__bin=b"\0\1\2" * 50, d__py="# é\n".encode("latin-1"), e__py=b"e = 1\n")
    history.git("mv", "e.py", "f.py")
    history.commit("Renamed and changed", f__py=b"e = 1\nf = 2\n")
    history.commit("Gone\n\nReviewed-by: Carl\nCo-authored-by: Eve <eve@example.org>", f__py=None)
    history.git("checkout", "-q", "-b", "side", "HEAD~2")
    history.commit("On a side branch", g__py=b"g = 1\n")
    history.git("checkout", "-q", "main")
    history.git("merge", "-q", "--no-ff", "-m", "Merge of Carl", "side", date=day(history.days))
    history.days += 1
    history.commit("Empty of changes")
    history.commit("Last", a__py=b"everything is new\n")
    return history
