"""A page to look at: one HTML file without a reference to anything outside itself, and pictures that follow its theme.

What is not `Html` already is text, and is escaped: a page shows words of documents that anybody may have written. The
page is XML too, so that a fault of escaping is a fault of parsing, and its policy lets a browser load and run nothing.
"""

import html
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import Template
from typing import Any

from .files import atomic_write
from .plots import pyplot

# matplotlib draws in these; the style sheet says what they are, by day and by night.
INK, FAINT, PAPER = "#010101", "#020202", "#030303"
SERIES = [f"#0{number}0405" for number in range(1, 9)]
MARKERS = "osD^vPX*"
_NAMES = {INK: "ink", FAINT: "faint", PAPER: "paper"} | {colour: f"row{n}" for n, colour in enumerate(SERIES)}
# What XML cannot hold, and what would turn the text around it to the other direction.
_NEVER = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]")

# Rows in the colours of Okabe and Ito, which the colour-blind tell apart; by day darker where white would swallow them.
_PAGE = Template("""<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/>
<link rel="icon" href="data:,"/>
<title>$title</title>
<style>
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --faint: #68717a; --line: #d8dce1; --panel: #f4f6f8;
  --good: #00664a; --bad: #a8420a; --row0: #6a737d; --row1: #0072b2; --row2: #d55e00; --row3: #009e73; --row4: #b0548c;
  --row5: #a87400; --row6: #2f8fc4; --row7: #7a3b10; }
@media (prefers-color-scheme: dark) {
:root { --paper: #14171a; --ink: #e4e8ec; --faint: #939ca5; --line: #343a41; --panel: #1d2226;
  --good: #4cc9a0; --bad: #ff9a5c; --row0: #9aa4ae; --row1: #56b4e9; --row2: #f0853a; --row3: #2ec49a; --row4: #d98fbc;
  --row5: #e69f00; --row6: #9ad4f5; --row7: #f0e442; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin-top: 1.5rem; }
p.said { color: var(--faint); margin: 0.3rem 0; } p.good { color: var(--good); font-weight: 600; }
p.bad { color: var(--bad); font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.8rem 0.3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td.number, th.number { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; overflow-x: auto; } figcaption { color: var(--faint); font-size: 0.9rem; }
svg { width: 100%; min-width: 36rem; height: auto; }
svg text { font-family: system-ui, "DejaVu Sans", sans-serif !important; }
pre, code { font: 0.85rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { background: var(--panel); padding: 0.7rem 1rem; overflow-x: auto; }
pre.line { white-space: pre-wrap; }
summary { cursor: pointer; }
</style>
</head>
<body>
$body
</body>
</html>
""")


class Html(str):
    """Text that is HTML already."""


def escaped(value: object) -> Html:
    """A value as HTML: itself where it is `Html`, else its text, with every character that would mean something."""
    return value if isinstance(value, Html) else Html(html.escape(_NEVER.sub("\ufffd", str(value))))


def element(name: str, *inside: object, **attributes: object) -> Html:
    """An element; `class_` stands for `class`. What is inside, and what attributes say, is escaped."""
    said = "".join(f' {key.rstrip("_")}="{escaped(value)}"' for key, value in attributes.items() if value != "")
    return Html(f"<{name}{said}>{''.join(map(escaped, inside))}</{name}>")


def section(title: str, *parts: object) -> Html:
    """A heading and what stands under it; nothing where there are no parts."""
    shown = [part for part in parts if part]
    return element("section", element("h2", title), *shown) if shown else Html()


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> Html:
    """A table; columns in `numbers` stand to the right."""
    right = set(numbers)

    def line(kind: str, cells: Sequence[object]) -> Html:
        kinds = ("number" if column in right else "" for column in range(len(cells)))
        return element("tr", *(element(kind, cell, class_=of) for cell, of in zip(cells, kinds, strict=True)))

    body = [line("td", row) for row in rows]
    whole = element("table", element("thead", line("th", heads)), element("tbody", *body))
    return element("div", whole, class_="wide")


def pairs(values: Mapping[str, object]) -> Html:
    """Names and values, as a table of two columns."""
    return table(("name", "value"), values.items())


def bullets(lines: Iterable[object]) -> Html:
    """A list; nothing where there are no lines."""
    found = [element("li", line) for line in lines]
    return element("ul", *found) if found else Html()


def folded(title: str, *inside: object, shown: bool = False) -> Html:
    """What is shown on demand, or until it is folded."""
    return element("details", element("summary", title), *inside, open="open" if shown else "")


def verdict(good: bool, text: str) -> Html:
    """A line that is good or bad, in its colour; the text says which without it."""
    return element("p", text, class_="good" if good else "bad")


def configuration(values: Mapping[str, object], command: str, versions: Mapping[str, str]) -> Html:
    """The last section of every page: how to do it again."""
    shown = {name: "" if value is None else value for name, value in values.items()}
    return section(
        "How it was made",
        element("pre", command, class_="line"),
        element("p", ", ".join(f"{name} {version}" for name, version in versions.items()), class_="said"),
        folded("every setting", pairs(shown)),
    )


def picture(draw: Callable[[Any], None], says: str, width: float = 8.4, height: float = 3.0) -> Html:
    """What `draw` draws on matplotlib's axes, as SVG inside the page.

    Args:
        draw: takes the axes; draws in INK, FAINT and SERIES.
        says: the caption, which is the description for those who do not see it too.
        width, height: in inches.
    """
    plot = pyplot("--report")
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "slotfast",  # the same names in every run
        "text.parse_math": False,
        "font.size": 9.5,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": FAINT,
        "grid.alpha": 0.35,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
    }
    with plot.rc_context(style):
        figure, axes = plot.subplots(figsize=(width, height), layout="constrained")
        draw(axes)
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=nothing)
        plot.close(figure)
    return element("figure", _inline(written.getvalue(), says), element("figcaption", says))


def write_page(path: str | os.PathLike, title: str, parts: Iterable[Html]) -> None:
    """Write a page, whole or not at all.

    Args:
        path: of the HTML file.
        title: of the page; its first heading too.
        parts: sections, in order.
    """
    body = "\n".join([element("h1", title), *filter(None, parts)])
    with atomic_write(path) as file:
        file.write(_PAGE.substitute(title=escaped(title), body=_unique(body)).encode())


def _inline(svg: str, says: str) -> Html:
    """matplotlib's file as an element: without its prologue, in the page's colours, readable aloud."""
    svg = svg[svg.index("<svg") :]
    for colour, name in _NAMES.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2).replace("xlink:href=", "href=")
    space = 'xmlns="http://www.w3.org/2000/svg"'
    return Html(svg.replace("<svg", f'<svg {space} role="img" aria-label="{escaped(says)}"', 1).strip())


def _unique(body: str) -> str:
    """The body with names that are each one picture's own: matplotlib calls its groups alike in all."""
    count = 0

    def rename(found: re.Match[str]) -> str:
        nonlocal count
        count += 1
        names = r'( id="|[ (]href="#|url\(#)'
        return re.sub(names, rf"\g<1>p{count}-", found[0])

    return re.sub(r"<svg .*?</svg>", rename, body, flags=re.DOTALL)
