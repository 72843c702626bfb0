"""report.html: plots of a search by Optuna and plotly, on one page that holds plotly.js and needs no network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from jinja2 import Environment
from optuna.distributions import BaseDistribution, CategoricalDistribution
from plotly import graph_objects
from plotly.offline import get_plotlyjs

from llm_training_toolkit.config.search import SearchConfig
from llm_training_toolkit.search.event_log import EventLog, TrialRecord
from llm_training_toolkit.search.optuna_sampler import build_distribution
from llm_training_toolkit.search.results import (
    compute_best_so_far,
    find_best_trial,
    find_comparable_values,
    get_trial_tokens,
    rank_trials,
)
from llm_training_toolkit.search.space import format_point, format_short_value

_BEST_QUANTILE = 0.25  # Optuna's default of 0.1 leaves one or two trials of a usual search to judge by
_MIN_TRIALS = 4  # with fewer the importance of a key is chance

_PLOT_CONFIG = {"displaylogo": False, "showSendToCloud": False}  # plotly's default offers an upload to its cloud

_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{ name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; } p { margin: .3rem 0; }
.dim { color: #6b7785; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid #d5dbe1; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; } .best td { font-weight: 600; color: #1769aa; }
</style>
<script>{{ plotly_js | safe }}</script>
<body>
<h1>{{ name }}</h1>
<p class="dim">{{ trials | length }} trials, {{ "{:,}".format(tokens) }} tokens; {{ search.scheduler.name }}, \
{{ search.searcher.name }}</p>
{% if best %}
<p><b>{{ best.name }}</b>: {{ search.metric }} <b>{{ "%.5g" % best.last_rung.value }}</b> after step \
{{ "{:,}".format(best.last_rung.step) }} with {{ format_point(best.parameters) }}</p>
{% endif %}
{% for title, caption, plot in sections %}
<h2>{{ title }}</h2><p class="dim">{{ caption }}</p>
{{ plot | safe }}
{% endfor %}
<h2>Table</h2>
<div class="scroll"><table>
<tr><th>trial<th>state<th class="number">{{ search.metric }}<th class="number">step<th class="number">tokens
{%- for key in search.search %}<th>{{ key }}{% endfor %}<th>error</tr>
{% for trial in trials %}
<tr{% if trial is sameas best %} class="best"{% endif %}><td>{{ trial.name }}<td>{{ trial.state }}
{%- with last = trial.last_rung %}
<td class="number">{{ "%.5g" % last.value if last }}<td class="number">{{ "{:,}".format(last.step) if last }}
{%- endwith %}
<td class="number">{{ "{:,}".format(get_trial_tokens(trial)) }}
{%- for key in search.search %}<td>{{ format_short_value(trial.parameters[key]).strip('"') }}{% endfor %}
<td>{{ trial.error or "" }}</tr>
{% endfor %}
</table></div>
</body></html>
""")


def render_report_page(search: SearchConfig, event_log: EventLog, name: str, tokens: int) -> str:
    """Render the page of a search; `tokens` is the total of all its trials."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sections = _build_sections(search, event_log)
    return _PAGE.render(
        name=name,
        tokens=tokens,
        search=search,
        trials=rank_trials(event_log, search.mode),
        best=find_best_trial(event_log, search.mode),
        sections=sections,
        plotly_js=get_plotlyjs(),
        format_point=format_point,
        format_short_value=format_short_value,
        get_trial_tokens=get_trial_tokens,
    )


def _build_sections(search: SearchConfig, event_log: EventLog) -> list[tuple[str, str, str]]:
    """Return title, caption and HTML of each plot."""
    reached = [
        (trial, trial.last_rung.value)
        for trial in event_log.trials.values()
        if trial.last_rung is not None and math.isfinite(trial.last_rung.value)
    ]
    if not reached:
        return [("Best so far", "No trial has come to a rung with a finite value.", "")]
    study = _build_study(search, reached)
    plots = optuna.visualization
    sections = [
        (
            "Best so far",
            "Best value of any trial, against the tokens of all trials.",
            _render_plot(_plot_best_so_far(search, event_log), "best", "tokens of all trials", search.metric),
        ),
        (
            "Learning curves",
            "Value of each trial at its rungs, against its tokens.",
            _render_plot(plots.plot_intermediate_values(study), "curves", "tokens of the trial", search.metric),
        ),
        (
            "Trials",
            "One line for each trial at its last rung.",
            _render_plot(plots.plot_parallel_coordinate(study, target_name=search.metric), "trials"),
        ),
    ]
    return [*sections, ("Importance", *_render_importance(search, event_log))]


def _render_importance(search: SearchConfig, event_log: EventLog) -> tuple[str, str]:
    """Return caption and plot of the keys' importance (PED-ANOVA, Watanabe et al. 2023)."""
    comparable = find_comparable_values(event_log, search.mode)
    if len(comparable) < _MIN_TRIALS or len({value for _, value in comparable}) == 1:
        return "Too few trials differ at one rung to tell.", ""
    caption = (
        "Share of each key in what sets the best quarter of the trials apart, at the rung that most trials reached."
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_BEST_QUANTILE)
    figure = optuna.visualization.plot_param_importances(_build_study(search, comparable), evaluator)
    return caption, _render_plot(figure, "importance", "importance")


def _build_study(search: SearchConfig, trials: Sequence[tuple[TrialRecord, float]]) -> optuna.Study:
    """Build a study in which each trial is complete with the given value; its intermediate steps are tokens."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize" if search.mode == "min" else "maximize")
    distributions = {key: _build_labelled_distribution(search, key) for key in search.search}
    for trial, value in trials:
        study.add_trial(
            optuna.create_trial(
                value=value,
                params={key: _get_label(search, key, trial.parameters[key]) for key in search.search},
                distributions=distributions,
                intermediate_values={rung.tokens: rung.value for rung in trial.rungs if math.isfinite(rung.value)},
            )
        )
    return study


def _build_labelled_distribution(search: SearchConfig, key: str) -> BaseDistribution:
    values = search.search[key]
    if values.choice is None:
        return build_distribution(values)
    return CategoricalDistribution([_get_label(search, key, choice) for choice in values.boundary_values])


def _get_label(search: SearchConfig, key: str, value: Any) -> Any:  # noqa: ANN401 - whatever a field takes
    return value if search.search[key].choice is None else format_short_value(value).strip('"')


def _plot_best_so_far(search: SearchConfig, event_log: EventLog) -> graph_objects.Figure:
    tokens, values = zip(*compute_best_so_far(event_log, search.mode), strict=True)
    return graph_objects.Figure(graph_objects.Scatter(x=tokens, y=values, mode="lines+markers", line_shape="hv"))


def _render_plot(figure: graph_objects.Figure, name: str, across: str | None = None, up: str | None = None) -> str:
    """Render a plot as HTML without plotly.js, which the page holds once; the heading serves as title."""
    figure.update_layout(title=None, template="plotly_white", height=420, margin={"t": 40, "b": 50, "l": 60, "r": 20})
    if across is not None:
        figure.update_xaxes(title_text=across)
    if up is not None:
        figure.update_yaxes(title_text=up)
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=_PLOT_CONFIG)
    return text
