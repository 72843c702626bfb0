"""Loss of power, simulated on a directory: what was not synced is gone.

The log of `faults.c` says which names, sizes and syncs there were. A file keeps the bytes it had at its last sync. With
names lost, too, a directory keeps the entries that it had at its own last sync, as POSIX allows. Files that were
truncated or begun anew are empty until the next sync.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

Entries = dict[int, dict[str, int]]  # inodes by name, by the inode of their directory


def list_entries(root: Path) -> Entries:
    """Return the names below a directory, to be given to `lose_power` after the fault."""
    found: Entries = {}
    for path in [root, *root.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            found[path.lstat().st_ino] = {each.name: each.lstat().st_ino for each in path.iterdir()}
    return found


@dataclass
class _Disk:
    """Names and sizes as the programs see them (`now`), and as they are on the disk (`synced`)."""

    root: Path
    now: Entries
    synced: Entries
    sizes: dict[int, int] = field(default_factory=dict)
    """Synced bytes of the files that were made or truncated since the log began."""

    def apply(self, line: str) -> None:
        """Follow one line of the log."""
        what, inode_text, size, path, more = line.split("\t")
        inode = int(inode_text)
        match what:
            case "create" | "mkdir" | "link":
                self._add(path, inode, is_directory=what == "mkdir")
                if what == "create":
                    self.sizes[inode] = 0
            case "truncate":
                self.sizes[inode] = 0
            case "rename":
                self._remove(path)
                self._add(more, inode, is_directory=False)
            case "remove":
                self._remove(path)
            case "fsync" if inode in self.now:
                self.synced[inode] = dict(self.now[inode])
            case "fsync" if inode in self.sizes:
                self.sizes[inode] = int(size)
            case _:
                pass

    def _add(self, path: str, inode: int, *, is_directory: bool) -> None:
        folder, name = self._find(path)
        self.now[folder][name] = inode
        if is_directory:
            self.now[inode], self.synced[inode] = {}, {}

    def _remove(self, path: str) -> None:
        folder, name = self._find(path)
        self.now[folder].pop(name, None)

    def _find(self, path: str) -> tuple[int, str]:
        """Return the directory's inode and the name of a path."""
        *folders, name = Path(path).relative_to(self.root).parts
        inode = self.root.lstat().st_ino
        for folder in folders:
            inode = self.now[inode][folder]
        return inode, name


def lose_power(root: Path, log: Path, graves: Path, before: Entries, *, names: bool) -> None:
    """Make a directory what a loss of power leaves of it. `before`: its names when the log began, all of them synced.

    With `names` the entries of directories that were not synced are lost or back; otherwise file contents alone.
    """
    disk = _Disk(root, {inode: dict(held) for inode, held in before.items()}, dict(before))
    for line in log.read_text().splitlines():
        if line.count("\t") == 4:  # the last line may be cut short
            disk.apply(line)
    there = list_entries(root)
    files = {int(grave.name): grave for grave in graves.iterdir()}
    files |= {path.lstat().st_ino: path for path in root.rglob("*")}
    kept = root.with_name(f"{root.name}.after")
    _restore(kept, root.lstat().st_ino, disk.synced if names else there, files, disk.sizes)
    shutil.rmtree(root)
    kept.rename(root)


def _restore(target: Path, inode: int, entries: Entries, files: dict[int, Path], sizes: dict[int, int]) -> None:
    target.mkdir()
    for name, held in entries[inode].items():
        if held in entries:
            _restore(target / name, held, entries, files, sizes)
            continue
        shutil.copy2(files[held], target / name, follow_symlinks=False)
        if held in sizes and not (target / name).is_symlink():
            os.truncate(target / name, min(sizes[held], (target / name).stat().st_size))
