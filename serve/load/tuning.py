"""Finding the settings of a server that reach a latency goal best, on this machine.

Every setting is measured once, the better half again, and so on by halves (successive halving,
Jamieson & Talwalkar 2016); the job's own settings are measured every time, to tell a gain from
noise. Settings compare by the median of their runs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from twotower.errors import UserError
from twotower.serve.config import ServeConfig
from twotower.serve.load.config import LEAST_REQUESTS, TuneConfig
from twotower.serve.load.measurement import Measurement


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is tuned, by the names of `ServeConfig`."""

    instances: int
    threads: int
    max_queue_delay_us: int
    max_batch_size: int

    def applied(self, serve: ServeConfig) -> ServeConfig:
        """Return the server's configuration with this setting."""
        return replace(serve, **asdict(self))


def setting_of(serve: ServeConfig) -> Setting:
    """Return the setting that a server's configuration has."""
    return Setting(
        instances=serve.instances, threads=serve.threads,
        max_queue_delay_us=serve.max_queue_delay_us, max_batch_size=serve.max_batch_size,
    )  # fmt: skip


@dataclass
class Trial:
    """A setting and its runs."""

    setting: Setting
    runs: list[Measurement] = field(default_factory=list)

    def p99s_ms(self) -> list[float]:
        """Return every run's 99th percentile, ascending; infinite where too many failed."""
        return sorted(p99_ms(m) for m in self.runs)

    def rates(self) -> list[float]:
        """Return every run's answers a second, ascending."""
        return sorted(m.answered_rate for m in self.runs)

    def merits(self, goal_ms: float) -> list[tuple[bool, float]]:
        """Return every run's merit, ascending."""
        return sorted(merit(m, goal_ms) for m in self.runs)


def median(ascending: list[float]) -> float:
    """Return the middle of some values, the lower of two."""
    return ascending[(len(ascending) - 1) // 2]


def p99_ms(found: Measurement) -> float:
    """Return the 99th percentile, infinite where so many requests failed.

    Raises:
        UserError: of too few requests.
    """
    if found.requests < LEAST_REQUESTS:
        raise UserError(
            f"{found.requests} requests came in {found.seconds:g} seconds, and a 99th percentile "
            f"takes {LEAST_REQUESTS}: raise seconds"
        )
    p99 = found.latency_ms["p99"]
    return float("inf") if p99 is None else p99


def merit(found: Measurement, goal_ms: float) -> tuple[bool, float]:
    """Return how good a run is: first whether it reaches the goal.

    Of runs that do, the better one has answered more (closed loop), or sooner (open loop, where
    all are asked the same); of those that do not, sooner.
    """
    p99 = p99_ms(found)
    reaches = p99 <= goal_ms and found.keeps_up
    return reaches, found.answered_rate if reaches and found.clients is not None else -p99


def settings_to_try(config: TuneConfig, serve: ServeConfig, cores: int) -> list[Setting]:
    """Return the job's own setting, and all others that keep no more threads busy than cores.

    Args:
        config: what is given there may keep more busy.
        serve: the job's.
        cores: of this machine.
    """
    powers = [2**i for i in range(cores.bit_length()) if 2**i <= cores]
    others = [
        Setting(
            instances=instances, threads=threads, max_queue_delay_us=delay, max_batch_size=size
        )
        for instances, threads, delay, size in itertools.product(
            config.instances or powers, config.threads or powers, config.max_queue_delay_us,
            config.max_batch_size or [serve.max_batch_size],
        )
        if instances * threads <= cores
        or ((config.instances or instances == 1) and (config.threads or threads == 1))
    ]  # fmt: skip
    return list(dict.fromkeys([setting_of(serve), *others]))


def tune(
    settings: list[Setting], measure: Callable[[Setting], Measurement], config: TuneConfig,
    seed: int, report: Callable[[str, float], None],
) -> list[Trial]:  # fmt: skip
    """Measure settings, the better ones more often, and return all trials, the best first.

    Args:
        settings: the first is the job's own.
        measure: runs the load on a server of a setting.
        config: the goal and the number of rounds.
        seed: of the order in a round.
        report: told what is measured, and the share done.

    Raises:
        UserError: when a run has too few requests to be judged.
    """
    trials = [Trial(setting) for setting in settings]
    own, alive, done = trials[0], list(trials), 0
    rounds = [max(2, -(-len(trials) // 2**i)) for i in range(config.repeats)]
    total = sum(rounds) + config.repeats
    for number in range(config.repeats):
        # What slows the machine for a while should not meet the same setting every round.
        for trial in random.Random(f"{seed} {number}").sample(alive, len(alive)):
            report(f"round {number + 1} of {config.repeats}", min(1.0, done / total))
            trial.runs.append(measure(trial.setting))
            done += 1
        alive = _best_first(alive, config.p99_ms)
        if number + 1 < config.repeats:
            alive = alive[: rounds[number + 1]]
            alive += [own] if own not in alive else []
    rest = [trial for trial in trials if trial not in alive]
    return [*alive, *_best_first(rest, config.p99_ms)]


def _best_first(trials: list[Trial], goal_ms: float) -> list[Trial]:
    return sorted(
        trials, key=lambda t: t.merits(goal_ms)[(len(t.runs) - 1) // 2], reverse=True
    )  # fmt: skip


def chosen(trials: list[Trial], own: Setting, goal_ms: float) -> tuple[Trial, bool]:
    """Return the trial to keep, and whether it beats the job's own setting beyond noise.

    The job's own is kept unless every run of the best is better than every run of it.

    Args:
        trials: as `tune` returns them.
        own: the job's setting.
        goal_ms: the goal.
    """
    best = trials[0]
    ours = next(t for t in trials if t.setting == own)
    if best is not ours and best.merits(goal_ms)[0] > ours.merits(goal_ms)[-1]:
        return best, True
    return ours, False
