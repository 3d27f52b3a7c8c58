"""The report's page as a Python string: Flower's bundle carries no html files."""

from __future__ import annotations

TEMPLATE = """\
{% macro figure(plot, style="") %}<figure{% if style %} class="{{ style }}"{% endif %}>
<figcaption>{{ plot.title }}</figcaption>
{{ plot.svg }}
<div class="keys">
{% for key, text in plot.keys %}<span><i class="{{ key }}"></i>{{ text }}</span>{% endfor %}
</div>
</figure>{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
{{ style | safe }}</style>
</head>
<body>
<main>
<header>
<h1>Report on a federated training</h1>
<p class="subtitle"><span class="status {{ status }}">{{ status }}</span>
<span class="muted"><bdi>{{ title }}</bdi>{% if time %}, {{ time }}{% endif %}</span></p>
</header>
<dl class="tiles">
{% for name, value in tiles %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>

<h2>In short</h2>
<dl class="card answers">
{% for answer in summary %}<dt>{{ answer.question }}</dt>
<dd>{{ answer.sentences | join(" ") | replace(" %", "\u00a0%") }}</dd>
{% endfor %}</dl>

<h2>Rounds</h2>
{% if plots %}
<div class="plots{{ ' three' if plots | length == 3 }}">
{% for plot in plots %}
{{ figure(plot) }}
{% endfor %}
</div>
{% if rounds_note %}<p class="note">{{ rounds_note }}</p>{% endif %}
{% else %}<p class="muted">{{ no_rounds }}</p>{% endif %}

<h2>Sites</h2>
{% if sites %}
<div class="card sites" role="region" aria-label="Table of sites" tabindex="0"><table>
<thead>
<tr><th scope="col" rowspan="2">Site</th>
{% for title, heads in columns %}<th scope="colgroup" colspan="{{ heads | length }}">{{ title }}</th>
{% endfor %}
<th scope="col" rowspan="2" class="num">Records scored</th>
{% if private %}<th scope="col" rowspan="2" class="num">Epsilon</th>{% endif %}
<th scope="colgroup" colspan="2">Bytes</th><th scope="col" rowspan="2" class="num">Rounds answered</th></tr>
<tr>
{% for _, heads in columns + [("Bytes", ("up", "down"))] %}{% for head in heads %}
<th scope="col" class="num">{{ head }}</th>
{% endfor %}{% endfor %}
</tr>
</thead>
{% macro cells(row) %}
{% for cell in row.cells %}<td class="num{{ ' absent' if cell in absent }}">{{ cell }}</td>{% endfor %}
{% endmacro %}
<tbody>
{% for site in sites %}<tr><th scope="row"><bdi>{{ site.name }}</bdi></th>{{ cells(site) }}</tr>
{% endfor %}</tbody>
<tfoot>
{% for row in feet %}<tr><th scope="row">{{ row.name }}</th>{{ cells(row) }}</tr>
{% endfor %}</tfoot>
</table></div>
<p class="note">{{ sites_note }}</p>
{% if calibration %}
<h3>Calibration</h3>
<div class="card" role="region" aria-label="Table of calibration" tabindex="0"><table>
<thead>
<tr><th scope="col" rowspan="2">Site</th><th scope="colgroup" colspan="2">Brier score</th>
<th scope="colgroup" colspan="2">Calibration error</th></tr>
<tr>{% for head in (base_head, "final") * 2 %}<th scope="col" class="num">{{ head }}</th>{% endfor %}</tr>
</thead>
{% macro numbers(row) %}<th scope="row"><bdi>{{ row[0] }}</bdi></th>
{% for cell in row[1] %}<td class="num">{{ cell }}</td>{% endfor %}{% endmacro %}
<tbody>
{% for row in calibration[:-1] %}<tr>{{ numbers(row) }}</tr>
{% endfor %}</tbody>
<tfoot><tr>{{ numbers(calibration[-1]) }}</tr></tfoot>
</table></div>
<p class="note">How far the model's probabilities can be believed. Brier score: 0 is best, 2 worst.
Calibration error: how far confidence and share of right answers lie apart, 0 is best.</p>
{% if reliability %}{{ figure(reliability, "single") }}
<p class="note">The held-out records of all sites together, in ten ranges of confidence. A point is as large
as its share of the records; below the line the model is surer than it is right.</p>{% endif %}
{% endif %}
{% else %}<p class="muted">No site has joined yet.</p>{% endif %}

<h2>Traffic</h2>
{% if traffic %}
<div class="card" role="region" aria-label="Table of bytes" tabindex="0"><table>
<thead><tr><th scope="col">What</th><th scope="col" class="num">bytes from sites</th>
<th scope="col" class="num">bytes to sites</th></tr></thead>
<tbody>
{% macro sent(name, up, down) %}<tr><th scope="row">{{ name }}</th><td class="num">{{ up }}</td>
<td class="num">{{ down }}</td></tr>{% endmacro %}
{% for row in traffic[:-1] %}{{ sent(*row) }}
{% endfor %}</tbody>
<tfoot>{{ sent(*traffic[-1]) }}</tfoot></table></div>
<p class="note">As serialised, all sites together. FlowerTune's counter (training messages, both ways):
{{ flowertune }} MiB.</p>
{% else %}<p class="muted">None yet.</p>{% endif %}

<h2>Failures</h2>
{% for time, reason in failures %}<p>Failed, {{ time }}: <bdi>{{ reason }}</bdi></p>
{% endfor %}
{% if set_aside %}
<h3>Replies set aside</h3>
<div class="card aside" role="region" aria-label="Table of replies set aside" tabindex="0"><table>
<thead><tr><th scope="col" class="num">Round</th><th scope="col">Site</th>
<th scope="col">Reason</th></tr></thead>
<tbody>
{% for reply in set_aside %}<tr><td class="num">{{ reply.round }}</td>
<th scope="row"><bdi>{{ reply.site }}</bdi></th><td><bdi>{{ reply.reason }}</bdi></td></tr>
{% endfor %}</tbody>
</table></div>
{% else %}<p class="muted">No reply was set aside.</p>{% endif %}
{% if warnings %}
<h3>Warnings</h3>
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
{% if privacy.spent %}
<h3>Epsilon and delta, by site</h3>
<div class="card spent" role="region" aria-label="Table of epsilon by site" tabindex="0"><table>
<thead><tr><th scope="col">Site</th><th scope="col" class="num">epsilon spent</th>
<th scope="col" class="num">delta</th><th scope="col" class="num">budget of the recipe</th>
<th scope="col">the site's own policy, over all runs</th></tr></thead>
<tbody>
{% for site, epsilon, delta, budget, policy in privacy.spent %}<tr><th scope="row"><bdi>{{ site }}</bdi></th>
<td class="num">{{ epsilon }}</td>
<td class="num">{{ delta }}</td>
<td class="num">{{ budget }}</td>
<td>{{ policy }}</td></tr>
{% endfor %}</tbody></table></div>
<p class="note">Epsilon is this run's, over all its rounds, as each site's own ledger reports it. A site
refuses a run that would pass its policy.</p>
{% endif %}
<h3>What is not protected</h3>
<ul>{% for text in privacy.unprotected %}<li>{{ text }}</li>{% endfor %}</ul>

{% if audits %}
<h2>Audits</h2>
{% if audit_plot %}
{{ figure(audit_plot, "single") }}
{% endif %}
{% for audit in audits %}
<h3>{{ audit.kind }}</h3>
<p>{{ audit_kinds[audit.kind] }} <span class="muted">{{ audit.time }}</span></p>
<div class="card aside" role="region" aria-label="Findings of the audit {{ audit.kind }}" tabindex="0"><table>
<thead><tr><th scope="col">What</th><th scope="col">Verdict</th><th scope="col">Finding</th></tr></thead>
<tbody>
{% for name, verdict, detail in audit.lines %}<tr><th scope="row">{{ name }}</th><td>{{ verdict }}</td>
<td><bdi>{{ detail }}</bdi></td></tr>
{% endfor %}</tbody></table></div>
{% endfor %}
{% endif %}

<h2>Configuration</h2>
<p>Settings changed from their defaults:</p>
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
