"""Search for each setting's best learning rate, on seeds that are not reported."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from perl.measure.rate_search import BestRates, search_rate
from perl.report.quality import qualities
from perl.report.runs import Run
from perl.stages.auto_rates import learning_rate
from perl.sweep.cells import Cells
from perl.sweep.setting import Setting
from perl.system.progress import console


def search(cells: Cells, setting: Setting, seeds: Sequence[int], kl: float | None = None) -> BestRates:
    """Search around the setting's default learning rate; print the result.

    Args:
        kl: KL at which RL is compared, in nats per completion; None: at its end.
    """

    def score(rate: float, seed: int) -> float:
        run = cells.run(replace(setting, rate=rate), seed)
        if run is None or stopped(run):
            return -math.inf
        quality = next(one for one in qualities(cells.stage, run) if not one.is_gold)
        value = quality.value(run, math.inf if kl is None else kl)
        return -math.inf if value is None else -value if quality.less_is_better else value

    default = _default(cells, setting)
    rates, edges = zip(*(search_rate(partial(score, seed=seed), default) for seed in seeds), strict=True)
    searched = BestRates(rates, any(edges))
    beyond = "; it is at the edge of the range tried, so the best may lie beyond" if searched.edge else ""
    on = ", ".join(map(str, seeds))
    console.print(f"[bold]{setting.words}[/]: learning rate {searched.best:g}, found with seed {on}{beyond}")
    return searched


def stopped(run: Run) -> bool:
    """Return whether a guard stopped the run's RL."""
    rl = run.report.stages.rl
    return rl is not None and any(incident.action == "stopped" for incident in rl.incidents)


def _default(cells: Cells, setting: Setting) -> float:
    """Return the learning rate of the setting's recipe, with `auto` resolved for its base."""
    return learning_rate(setting.recipe(cells.alone(0), 0), cells.stage, cells.config())
