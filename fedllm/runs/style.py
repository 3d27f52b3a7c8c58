"""The report's style sheet: light and dark, from a phone's width to paper."""

from __future__ import annotations

STYLE = """\
:root {
  --page: #fbfbfa; --card: #ffffff; --text: #1d2126; --muted: #59626b; --line: #e2e4e7;
  --accent: #1f6f78; --second: #b0782c; --site: #83909b; --good: #2c7a4b; --wait: #8a5a12; --bad: #b3403a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1b1f23; --text: #e4e7ea; --muted: #9aa4ae; --line: #30363c;
    --accent: #58b3bd; --second: #d9a860; --site: #76828d; --good: #6cbf8b; --wait: #d9a860; --bad: #e58a83;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: 0 0 .75rem; max-width: 46rem; }
ul { margin: 0; padding-left: 1.15rem; max-width: 46rem; }
.muted { color: var(--muted); }
.note { margin-top: .6rem; font-size: .86rem; color: var(--muted); }
.status {
  display: inline-block; padding: .05rem .65rem; border: 1px solid currentColor;
  border-radius: 1rem; font-size: .84rem; font-weight: 600; color: var(--wait);
}
.status.finished { color: var(--good); }
.status.failed { color: var(--bad); }
.subtitle { display: flex; flex-wrap: wrap; gap: .3rem .9rem; align-items: center; }
.answers { display: grid; grid-template-columns: 14rem 1fr; gap: 0; margin: 0; }
.answers dt, .answers dd { margin: 0; padding: .8rem 1rem; border-top: 1px solid var(--line); }
.answers dt { font-weight: 600; }
.answers dt:first-of-type, .answers dd:first-of-type { border-top: 0; }
.answers dd { padding-right: max(1rem, calc(100% - 47rem)); }
.tiles {
  display: flex; flex-wrap: wrap; gap: 1px;
  margin: 1.5rem 0 0; background: var(--line); border: 1px solid var(--line);
  border-radius: .6rem; overflow: hidden;
}
.tiles div { flex: 1 1 8.5rem; background: var(--card); padding: .8rem 1rem; box-sizing: border-box; }
.tiles dt { font-size: .8rem; color: var(--muted); }
.tiles dd { margin: 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.plots.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure, .card { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
figure { padding: .9rem 1rem .7rem; }
figure.single, .plots figure:only-child { max-width: 34rem; }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .4rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif !important; }
.three svg text { font-size: 11px !important; }
.keys {
  display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin-top: .35rem;
  font-size: .8rem; color: var(--muted);
}
.keys i {
  display: inline-block; width: 1.1rem; height: 0; border-top: 3px solid var(--accent);
  vertical-align: middle; margin-right: .4rem;
}
.keys i.site { border-top: 2px solid var(--site); }
.keys i.second { border-color: var(--second); }
.keys i.dashed { border-top: 2px dashed var(--second); }
.card { overflow-x: auto; overflow-wrap: normal; position: relative; }
.card:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .45rem; text-align: left; border-top: 1px solid var(--line); vertical-align: top; }
thead th, tbody:first-child tr:first-child > * { border-top: 0; }
thead th {
  font-size: .78rem; line-height: 1.35; font-weight: 600; color: var(--muted); vertical-align: bottom;
}
thead th[colspan] { text-align: center; padding-bottom: 0; }
thead th[colspan]::after {
  content: ""; display: block; margin: .15rem 0 0 .9rem; border-top: 1px solid var(--line);
}
thead tr + tr th { padding-top: .1rem; }
.num { text-align: right; }
td.num { white-space: nowrap; }
tbody th { font-weight: 500; overflow-wrap: break-word; }
.sites tbody th { min-width: 9rem; max-width: 16rem; }
.spent tbody th { min-width: 6rem; }
.spent td:last-child { white-space: nowrap; }
.aside th:first-child { width: 5rem; }
.aside tbody th { min-width: 6rem; width: 25%; }
.aside td:last-child { min-width: 10rem; }
tfoot th, tfoot td { font-weight: 600; }
.absent { color: var(--muted); font-weight: 400; }
.facts th { width: 15rem; color: var(--muted); font-weight: 400; }
.facts th, .facts td { padding-block: .35rem; }
.facts td { overflow-wrap: anywhere; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 40rem) {
  main { padding: 1.5rem .9rem 3rem; }
  figure { padding: .75rem .6rem .6rem; }
  th, td { padding: .45rem .6rem; }
  .sites th[scope=row] {
    position: sticky; left: 0; background: var(--card); min-width: 7rem; max-width: 8rem;
  }
  .answers { display: block; }
  .answers dd { border-top: 0; padding: 0 1rem .8rem; }
  .answers dt { padding-bottom: .2rem; }
  .facts th, .facts td { display: block; width: auto; max-width: none; }
  .facts th { padding-bottom: 0; }
  .spent th, .spent td { padding-inline: .4rem; }
  .spent tbody th { min-width: 4rem; }
  .spent td:last-child { white-space: normal; min-width: 6.2rem; }
  .facts td { border-top: 0 !important; padding-top: 0; }
}
@page { margin: 14mm 12mm; }
@media print {
  :root {
    --page: #ffffff; --card: #ffffff; --text: #1d2126; --muted: #59626b; --line: #e2e4e7;
    --accent: #1f6f78; --second: #b0782c; --site: #83909b; --good: #2c7a4b; --wait: #8a5a12; --bad: #b3403a;
  }
  html { font-size: 80%; }
  body { font-size: 1rem; }
  main { max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; }
  h2 { margin-top: 1.75rem; }
  figure, tr, .answers dd, .tiles { break-inside: avoid; }
  thead { display: table-header-group; }
  .card { overflow: visible; }
  .sites table { font-size: .76rem; }
  .sites th, .sites td { padding: .35rem .3rem; }
  .sites tbody th, .sites th[scope=row] { position: static; min-width: 0; }
}
"""
