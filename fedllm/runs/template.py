"""The report's page as a Python string: Flower's bundle carries no html files."""

from __future__ import annotations

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root {
  --page: #fbfbfa; --card: #ffffff; --text: #1d2126; --muted: #626b75; --line: #e2e4e7;
  --accent: #1f6f78; --second: #c08a3e; --site: #a9b4bd; --good: #2c7a4b; --bad: #b3403a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1b1f23; --text: #e4e7ea; --muted: #9aa4ae; --line: #30363c;
    --accent: #58b3bd; --second: #d9a860; --site: #5d6872; --good: #6cbf8b; --bad: #e58a83;
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
h2 { font-size: 1.1rem; margin: 2.75rem 0 .75rem; }
p { margin: 0 0 .75rem; max-width: 46rem; }
ul { margin: 0; padding-left: 1.15rem; max-width: 46rem; }
.muted { color: var(--muted); }
.note { margin-top: .6rem; font-size: .86rem; color: var(--muted); }
.status {
  display: inline-block; margin: 0 0 1rem; padding: .05rem .65rem; border: 1px solid currentColor;
  border-radius: 1rem; font-size: .84rem; font-weight: 600; color: var(--second);
}
.status.finished { color: var(--good); }
.status.failed { color: var(--bad); }
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
figure.single { max-width: 34rem; }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .4rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif !important; }
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
.card { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .7rem; text-align: left; border-top: 1px solid var(--line); vertical-align: top; }
thead th, tbody:first-child tr:first-child > * { border-top: 0; }
thead th {
  font-size: .78rem; line-height: 1.35; font-weight: 600; color: var(--muted); vertical-align: bottom;
}
thead th[colspan] { text-align: center; padding-bottom: 0; }
thead tr + tr th { padding-top: .1rem; }
.num { text-align: right; }
td.num { white-space: nowrap; }
tbody th { font-weight: 500; overflow-wrap: break-word; }
.sites tbody th { min-width: 9rem; max-width: 16rem; }
.aside th:first-child { width: 5rem; }
.aside tbody th { min-width: 6rem; width: 25%; }
.aside td:last-child { min-width: 10rem; }
tfoot th, tfoot td { font-weight: 600; }
.absent { color: var(--muted); font-weight: 400; }
.facts th { width: 15rem; color: var(--muted); font-weight: 400; }
.facts td { overflow-wrap: anywhere; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 40rem) {
  main { padding: 1.5rem .9rem 3rem; }
  figure { padding: .75rem .6rem .6rem; }
  th, td { padding: .45rem .6rem; }
  .sites th[scope=row] {
    position: sticky; left: 0; background: var(--card); min-width: 7rem; max-width: 8rem;
  }
  .facts th, .facts td { display: block; width: auto; max-width: none; }
  .facts th { padding-bottom: 0; }
  .facts td { border-top: 0 !important; padding-top: 0; }
}
@media print { figure, .card, tr { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<div class="status {{ status }}">{{ status }}</div>
<p>{{ summary | join(" ") }}</p>
<dl class="tiles">
{% for name, value in tiles %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>

<h2>Rounds</h2>
{% if plots %}
<div class="plots{{ ' three' if plots | length == 3 }}">
{% for plot in plots %}
<figure><figcaption>{{ plot.title }}</figcaption>
{% if plot.svg %}{{ plot.svg }}
<div class="keys">
{% for style, text in plot.keys %}<span><i class="{{ style }}"></i>{{ text }}</span>{% endfor %}
</div>
{% else %}<p class="muted">{{ plot.absent }}</p>{% endif %}
</figure>
{% endfor %}
</div>
{% else %}<p class="muted">No reply has arrived yet.</p>{% endif %}

<h2>Sites</h2>
{% if sites %}
<div class="card sites"><table>
<thead>
<tr><th rowspan="2">Site</th><th colspan="3">Accuracy</th><th colspan="3">Macro-F1</th>
<th rowspan="2" class="num">Records scored</th>
{% if private %}<th rowspan="2" class="num">Epsilon</th>{% endif %}
<th colspan="2">Bytes</th><th rowspan="2" class="num">Rounds answered</th></tr>
<tr>
{% for head in ["majority", "base", "final"] * 2 + ["up", "down"] %}<th class="num">{{ head }}</th>
{% endfor %}
</tr>
</thead>
{% macro cells(row) %}
{% for cell in row.cells %}<td class="num{{ ' absent' if cell in absent }}">{{ cell }}</td>{% endfor %}
{% endmacro %}
<tbody>
{% for site in sites %}<tr><th scope="row"><bdi>{{ site.name }}</bdi></th>{{ cells(site) }}</tr>
{% endfor %}</tbody>
<tfoot><tr><th scope="row">{{ total.name }}</th>{{ cells(total) }}</tr></tfoot>
</table></div>
<p class="note">{{ sites_note }}</p>
{% else %}<p class="muted">No site has joined yet.</p>{% endif %}

<h2>Traffic</h2>
{% if traffic %}
<div class="card"><table>
<thead><tr><th>What</th><th class="num">bytes from sites</th><th class="num">bytes to sites</th></tr></thead>
<tbody>
{% for name, up, down in traffic %}<tr><th scope="row">{{ name }}</th><td class="num">{{ up }}</td>
<td class="num">{{ down }}</td></tr>
{% endfor %}</tbody></table></div>
<p class="note">As serialised, all sites together. FlowerTune's counter (training messages, both ways):
{{ flowertune }} MiB.</p>
{% else %}<p class="muted">None yet.</p>{% endif %}

<h2>Replies set aside</h2>
{% if set_aside %}
<div class="card aside"><table>
<thead><tr><th class="num">Round</th><th>Site</th><th>Reason</th></tr></thead>
<tbody>
{% for reply in set_aside %}<tr><td class="num">{{ reply.round }}</td>
<th scope="row"><bdi>{{ reply.site }}</bdi></th><td><bdi>{{ reply.reason }}</bdi></td></tr>
{% endfor %}</tbody>
</table></div>
{% else %}<p class="muted">None; every reply was used.</p>{% endif %}

{% if warnings %}
<h2>Warnings</h2>
<ul>{% for text in warnings %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}

<h2>Privacy</h2>
{% for sentence in privacy.sentences %}<p>{{ sentence }}</p>
{% endfor %}
{% if privacy.facts %}
<div class="card"><table class="facts"><tbody>
{% for name, value in privacy.facts %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div>
{% endif %}

{% if audits %}
<h2>Audits</h2>
{% if audit_plot %}
<figure class="single"><figcaption>{{ audit_plot.title }}</figcaption>
{{ audit_plot.svg }}
<div class="keys">
{% for style, text in audit_plot.keys %}<span><i class="{{ style }}"></i>{{ text }}</span>{% endfor %}
</div>
</figure>
{% endif %}
{% for audit in audits %}
<h3>{{ audit.kind }}</h3>
<p>{{ audit_kinds[audit.kind] }} <span class="muted">{{ audit.time }}</span></p>
<div class="card aside"><table>
<thead><tr><th>What</th><th>Verdict</th><th>Finding</th></tr></thead>
<tbody>
{% for name, verdict, detail in audit.lines %}<tr><th scope="row">{{ name }}</th><td>{{ verdict }}</td>
<td><bdi>{{ detail }}</bdi></td></tr>
{% endfor %}</tbody></table></div>
{% endfor %}
{% endif %}

<h2>Settings changed from their defaults</h2>
{% if changed %}
<div class="card"><table class="facts"><tbody>
{% for key, value in changed %}<tr><th scope="row"><code>{{ key }}</code></th>
<td><code>{{ value }}</code></td></tr>
{% endfor %}</tbody></table></div>
{% else %}<p class="muted">None.</p>{% endif %}

<h2>Versions and hashes</h2>
{% if manifest %}
<div class="card"><table class="facts"><tbody>
{% for name, value in manifest %}<tr><th scope="row">{{ name }}</th><td><code>{{ value }}</code></td></tr>
{% endfor %}</tbody></table></div>
{% else %}<p class="muted">The run has not written its manifest yet.</p>{% endif %}
</main>
</body>
</html>
"""
