"""The page around the report's content: one file, its script and style inside, forbidden by its own policy to load more."""

from collections.abc import Iterable, Sequence
from html import escape

from plotly.offline import get_plotlyjs

from exfm.launch.report.figures import Figure


def figure_html(figure: Figure) -> str:
    # inside a script element only "<" could end it; JSON may write it as an escape
    data = figure.plot.to_json().replace("<", "\\u003c")
    key = escape(figure.key)
    return (
        f'<figure><h3>{escape(figure.title)}</h3><div class="plot" id="{key}" '
        f'style="min-height:{figure.plot.layout.height}px"></div>'
        f"<figcaption>{escape(figure.caption)}</figcaption>"
        f'<script type="application/json" data-plot="{key}">{data}</script></figure>'
    )


def figures_html(figures: Iterable[Figure]) -> str:
    """Side by side where there is room for two."""
    drawn = "".join(map(figure_html, figures))
    return f'<div class="grid">{drawn}</div>' if drawn else ""


def table_html(header: Sequence[str], lines: Iterable[tuple[str, Sequence[tuple[str, str]]]], caption: str = "") -> str:
    """lines: (class of the row, cells of (text, small print)); the first cell heads its row."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(f'<tr class="{kind}">{"".join(map(_cell, cells, range(len(cells))))}</tr>' for kind, cells in lines)
    note = f'<p class="note">{escape(caption)}</p>' if caption else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def _cell(cell: tuple[str, str], column: int) -> str:
    main, small = cell
    inside = escape(main) + (f"<small>{escape(small)}</small>" if small else "")
    return f'<th scope="row">{inside}</th>' if column == 0 else f"<td>{inside}</td>"


def details_html(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(body)}</pre></details>"


def section_html(title: str, *parts: str) -> str:
    inside = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""


def page_html(title: str, lead: Iterable[str], body: str) -> str:
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in lead)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<header><h1>{escape(title)}</h1><ul class="lead">{sentences}</ul></header>{body}'
        "<noscript><p>The figures need JavaScript.</p></noscript></main>"
        f"<script>{get_plotlyjs()}</script><script>{SCRIPT}</script></body></html>\n"
    )


POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1d2129; --muted: #626a76; --line: #e2e5ea; --band: #f5f7f9;
  --accent: #007a5a; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171c; --text: #e4e7ec; --muted: #9aa3af; --line: #2d333c; --band: #1b2027; --accent: #3fcf9f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 17px; font-weight: 600; color: var(--muted); margin: 0 0 12px; overflow-wrap: anywhere; }
.lead { list-style: none; margin: 0; padding: 0; font-size: 23px; line-height: 1.4; font-weight: 500; max-width: 46em;
  overflow-wrap: anywhere; }
.lead li + li { margin-top: 10px; }
section { margin-top: 52px; }
h2 { font-size: 20px; margin: 0 0 14px; }
h3 { font-size: 15px; margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(500px, 100%), 1fr)); gap: 32px; margin-top: 28px; }
h2 + .grid { margin-top: 0; }
figure { margin: 0; min-width: 0; }
figcaption, .note { color: var(--muted); font-size: 14px; max-width: 75em; margin: 4px 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 500; font-size: 13.5px; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 8px; }
tbody th { font-weight: 500; white-space: normal; min-width: 7em; max-width: 20em; overflow-wrap: anywhere; }
tr.first > * { border-top: 1px solid var(--muted); }
tr.strong > * { background: var(--band); font-weight: 650; }
small { display: block; color: var(--muted); font-size: 12.5px; font-weight: 400; white-space: pre; }
th small { white-space: normal; }
details { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: 9px 4px; overflow-wrap: anywhere; }
pre { overflow-x: auto; margin: 0 0 14px; padding: 14px; background: var(--band); font-size: 13px; line-height: 1.45; }
@media (max-width: 760px) { main { padding: 24px 16px 60px; } .lead { font-size: 19px; } section { margin-top: 40px; }
  table { font-size: 14px; } th, td { padding: 7px 7px; } small { font-size: 12px; } }
"""

SCRIPT = """
const dark = matchMedia('(prefers-color-scheme: dark)');
function draw() {
  const css = getComputedStyle(document.documentElement), color = name => css.getPropertyValue(name).trim();
  for (const holder of document.querySelectorAll('script[data-plot]')) {
    const { data, layout } = JSON.parse(holder.textContent);
    layout.font = { ...layout.font, color: color('--text'), family: getComputedStyle(document.body).fontFamily };
    layout.hoverlabel = { ...layout.hoverlabel, bgcolor: color('--band'), bordercolor: color('--line'),
      font: { color: color('--text') } };
    for (const axis of Object.keys(layout).filter(key => /^[xy]axis/.test(key)))
      Object.assign(layout[axis], { gridcolor: color('--line'), linecolor: color('--line'), spikecolor: color('--muted') });
    for (const trace of data)
      if (trace.type === 'bar') trace.marker.line.color = color('--page');
    Plotly.react(holder.dataset.plot, data, layout, { responsive: true, displayModeBar: false });
  }
}
draw();
dark.addEventListener('change', draw);
"""
