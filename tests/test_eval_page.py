"""Laws of the page: it loads nothing, runs nothing, and shows what a model wrote as text."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from launch.eval_page import Sample, Section, Table, figure_svg, write_page
from trainers.calibration import Estimate


class References(HTMLParser):
    """Everything in a page that a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loading = ("src", "href", "srcset", "data", "poster", "action", "background", "xlink:href")
        self.loaded += [v or "" for name, v in attrs if name in loading]
        assert not any(name.startswith("on") for name, _ in attrs)


def page_of(tmp_path: Path, *sections: Section) -> tuple[str, References]:
    write_page(tmp_path / "out" / "page.html", "Run <1>", sections)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["page.html"]
    page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    parsed = References()
    parsed.feed(page)
    return page, parsed


def drawing() -> str:
    figure = Figure(figsize=(3, 2))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], label="gold & proxy")
    axes.legend()
    return figure_svg(figure)


def test_the_page_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    section = Section("Curves", "One.\n\nTwo, see http://example.org/x.png", plots=(drawing(), drawing()))
    page, parsed = page_of(tmp_path, section)
    assert parsed.tags.count("img") == 2 and parsed.tags.count("p") == 2
    assert not {"script", "link", "iframe", "object", "embed", "svg"} & set(parsed.tags)
    assert all(r.startswith(("data:image/svg+xml;base64,", "#s")) for r in parsed.loaded)
    assert "default-src 'none'" in page and "@import" not in page and "url(" not in page
    assert "prefers-color-scheme: dark" in page
    for plot in (r for r in parsed.loaded if r.startswith("data:")):
        svg = base64.b64decode(plot.split(",", 1)[1]).decode()
        assert svg.startswith("<svg") and "</svg>" in svg
        assert not re.search(r"(?:href|src)\s*=\s*[\"'](?!#)", svg) and not re.search(r"url\((?!#)", svg)
        assert "<metadata>" not in svg and "<!DOCTYPE" not in svg


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert drawing() == drawing()


def test_what_a_model_wrote_is_shown_and_never_run(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script><img src=http://example.org/x onerror=alert(2)>\"'\x00\ud800"
    section = Section(evil, evil, Table((evil, "b"), ((evil, 1),), evil), samples=(Sample(evil, evil, evil, evil),))
    page, parsed = page_of(tmp_path, section)
    assert not {"script", "img"} & set(parsed.tags) and parsed.loaded == ["#s1"]
    assert page.count("&lt;script&gt;alert(1)") == 10
    assert "\x00" not in page and "Run &lt;1&gt;" in page


def test_cells_show_intervals_and_what_is_missing(tmp_path: Path) -> None:
    rows = (("win rate", Estimate(0.61234, 0.55, 0.66666, 300)), ("KL", None), ("steps", 12), ("x", math.nan))
    page, _ = page_of(tmp_path, Section("t", table=Table(("name", "value"), rows)))
    assert '0.6123 <span class="interval">[0.55, 0.6667] n=300</span>' in page
    assert page.count(">–<") == 2 and ">12<" in page
    with pytest.raises(ValueError, match="row 0 has 1 cells for 2"):
        Table(("a", "b"), (("x",),))
    with pytest.raises(ValueError, match="is no SVG"):
        write_page(tmp_path / "no.html", "t", [Section("s", plots=("plot.png",))])
    assert not (tmp_path / "no.html").exists()
