"""URIs, such as `s3://bucket/file`: told from paths, and without the secrets that they may carry. Pure."""

from __future__ import annotations

import re


def is_uri(path: str) -> bool:
    """Return whether a path is a URI."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


_IN_TEXT = re.compile(r"""[A-Za-z][A-Za-z0-9+.-]*://[^\s"'`<>]*""")
_AFTER_IN_TEXT = re.compile(r"[\]},;)]*$")  # of the text around an address, such as the end of a YAML mapping
_WEB_QUERY = re.compile(r"[?#].*", re.DOTALL)
# Other stores than web servers take options by name, and `?` alone is a wildcard of theirs.
_OPTIONS = re.compile(r"\?[\w.%-]+=[^?]*$")


# Schemes with a container or repository before the `@`.
_NO_USER_SCHEMES = frozenset({"abfs", "abfss", "adl", "az", "github", "wasb", "wasbs"})


def has_userinfo(path: str) -> bool:
    """Return whether a URI names a user, key or token (`s3://KEY:SECRET@bucket`). `gs://anonymous@` names nobody."""
    if not is_uri(path) or path.partition("://")[0].lower() in _NO_USER_SCHEMES:
        return False
    user, found, _ = path.partition("://")[2].partition("/")[0].rpartition("@")
    return bool(found) and not (user == "anonymous" and path.startswith("gs://"))


def redact_uri(path: str) -> str:
    """Return a URI without userinfo, query and fragment, any of which may be a secret; a path unchanged."""
    if not is_uri(path):
        return path
    scheme, _, rest = path.partition("://")
    rest = (_WEB_QUERY if scheme.lower() in {"http", "https"} else _OPTIONS).sub("", rest)
    if has_userinfo(path):
        authority, slash, below = rest.partition("/")
        rest = authority.rpartition("@")[2] + slash + below
    return f"{scheme}://{rest}"


def redact_text(text: str) -> str:
    """Return a text, such as a YAML file or an error, with every URI in it redacted."""

    def redact_match(match: re.Match[str]) -> str:
        around = _AFTER_IN_TEXT.search(match[0])
        assert around is not None, "it may be empty"
        return redact_uri(match[0][: around.start()]) + around[0]

    return _IN_TEXT.sub(redact_match, text)
