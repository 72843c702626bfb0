"""Save the loss curves of a page of `ltt report` as one SVG, for documents.

python scripts/report_curves.py report.html docs/pictures/curves.svg
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_FIGURE = re.compile(r'<svg viewBox="(\S+) (\S+) (\S+) (\S+)"[^>]*aria-label="([^"]*)">(.*?)</svg>', re.DOTALL)
_HINT = re.compile(r"<circle.*?</circle>\s*", re.DOTALL)  # shows its value under the pointer, which a picture has not
_LEGEND = re.compile(r'<span><span class="chip" style="background: var\((--run-\d)\)"></span>([^<]*)</span>')
_GAP, _HEAD = 24, 34  # units of the SVG between charts, and above them for titles and names
_COLOUR = re.compile(r"(--run-\d): (#\w+)")  # those of the light page come first
_STYLE = """
svg { background: #ffffff; }
text { font: 11px system-ui, sans-serif; fill: #5d6875; } .title { font-weight: 600; fill: #1c2430; }
.grid { stroke: #dfe3e8; } .curve { fill: none; stroke-width: 1.7; stroke-linejoin: round; }
"""


def build_picture(page: str) -> str:
    """Return one SVG of the charts of losses, side by side. Raises SystemExit for a page without them."""
    charts = [match for match in _FIGURE.finditer(page) if "loss" in match[5]]
    if not charts:
        raise SystemExit("error: the page has no chart of a loss: give one that `ltt report` wrote")
    parts, left = [], 0.0
    for x, y, width, _, title, content in (match.groups() for match in charts):
        parts.append(f'<g transform="translate({left - float(x):g} {_HEAD - float(y):g})">')
        parts.append(f'<text class="title" x="0" y="-16">{title}</text>{_HINT.sub("", content)}</g>')
        left += float(width) + _GAP
    for number, (colour, name) in enumerate(dict.fromkeys(_LEGEND.findall(page))):
        at = f'x="{60 + 120 * number}" y="12"'
        parts.append(f'<text {at} style="fill: var({colour}); font-weight: 600">{name}</text>')
    size = f"0 0 {left - _GAP:g} {_HEAD + max(float(match[4]) for match in charts):g}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}"><style>{_STYLE}</style>\n'
    return head + _resolve_colours("\n".join([*parts, "</svg>\n"]), page)


def _resolve_colours(picture: str, page: str) -> str:
    """Replace the variables of colours, which most viewers of SVG other than browsers do not know."""
    colours = dict(reversed(_COLOUR.findall(page)))
    return re.sub(r"var\((--run-\d)\)", lambda match: colours[match[1]], picture)


def main() -> None:
    """Read a page, write a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    given.picture.write_text(build_picture(given.page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
