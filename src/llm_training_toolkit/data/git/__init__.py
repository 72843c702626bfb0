"""Histories of git repositories as documents: commits, unified diffs, next edits."""
