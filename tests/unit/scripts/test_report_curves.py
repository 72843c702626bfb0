"""Pictures of loss curves for documents, taken from pages of `ltt report`."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from report_curves import build_picture

CHART = """<figure><svg viewBox="-56 -10 592 268" role="img" aria-label="{title}">
<line class="grid" x1="0" x2="520" y1="8.0" y2="8.0"/><path class="curve" style="stroke: var(--run-0)" d="M0 0L9 9"/>
<circle class="hint" cx="1" cy="1" r="5"><title>base, step 1</title></circle>
</svg></figure>"""
COLOURS = "<style>:root { --run-0: #112233; } @media (dark) { :root { --run-0: #ffffff; } }</style>"
NAME = COLOURS + '<span><span class="chip" style="background: var(--run-0)"></span>base</span>'


def test_charts_of_losses_become_one_svg() -> None:
    page = NAME + CHART.format(title="Training loss") + CHART.format(title="Learning rate")
    picture = ElementTree.fromstring(build_picture(page + CHART.format(title="Validation loss")))
    assert picture.get("viewBox") == "0 0 1208 302"
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["Training loss", "Validation loss", "base"]
    assert not list(picture.iter("{http://www.w3.org/2000/svg}circle"))
    curves = [path.get("style") for path in picture.iter("{http://www.w3.org/2000/svg}path")]
    assert curves == ["stroke: #112233"] * 2


def test_a_page_without_losses_is_refused() -> None:
    with pytest.raises(SystemExit, match="no chart of a loss"):
        build_picture(CHART.format(title="Learning rate"))
