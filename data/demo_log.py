"""A synthetic log with something to learn and something to see.

    twotower demo-log --output data/demo

Planted in it: tastes (a user likes a few sub-genres, each of a genre), popularity skew (Zipf within
a sub-genre), drift (half of the users move to another sub-genre half-way, and items fade with age),
side features that tell part of the truth (genre, tags, price, day of release, a text vector; age,
country) and cold items, released in the last tenth of the time and so unknown to training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.data.demo_truth import STRAY_SHARE, TASTE_SHARES, DemoTruth
from twotower.errors import UserError
from twotower.files import atomic_directory, recover

GENRES = ("action", "comedy", "drama", "history", "nature", "science", "sport", "travel")
SUBGENRES = 5
DAYS = 60
TEXT_WIDTH = 16
FIRST_DAY_S = 1_735_689_600  # 2025-01-01
FILES = ("interactions.parquet", "users.parquet", "items.parquet")
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class DemoLogConfig:
    """Size of the synthetic log."""

    output: str = "runs/demo-log"
    """Folder that is written: interactions, users and items as Parquet."""
    users: int = 4000
    """Number of users."""
    items: int = 2000
    """Number of items."""
    events: int = 120_000
    """Events drawn; those that repeat an item of the user, about a quarter, are left out."""
    seed: int = 0
    """The same seed gives the same files."""

    def validate(self) -> None:
        """Refuse sizes that leave nothing to learn.

        Raises:
            UserError: naming the option.
        """
        least = {"users": 10, "items": 2 * len(GENRES) * SUBGENRES, "events": 100, "seed": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise UserError(f"{name} must be >= {minimum}, got {getattr(self, name)}")


def write_demo_log(config: DemoLogConfig) -> tuple[dict[str, int], bool]:
    """Write the log, unless the very same one is there already.

    A log left untouched keeps its files' times, by which `twotower prepare` knows what it has read.

    Returns:
        The log's counts, and whether anything was written.

    Raises:
        UserError: when a size is too small, or the output holds other files.
    """
    config.validate()
    output = Path(config.output)
    recover(output)
    if output.exists() and (
        not output.is_dir() or any(p.name not in FILES for p in output.iterdir())
    ):
        raise UserError(f"{output}: holds other files: choose an empty folder for --output")
    rng = np.random.default_rng(config.seed)
    items, users, truth = _world(config, rng)
    events = _events(config.events, items, truth, rng)
    files = dict(zip(FILES, map(_parquet, (events, users, items)), strict=True))
    counts = {"events": events.num_rows, "users": config.users, "items": config.items,
              "cold items": int((truth.release_N > 0.9).sum())}  # fmt: skip
    if all(_holds(output / name, content) for name, content in files.items()):
        return counts, False
    with atomic_directory(output) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
    return counts, True


def demo_truth(config: DemoLogConfig) -> DemoTruth:
    """Return what the log of a configuration is drawn from.

    User `n` of the log is at place n - 1 of the truth, item `item-n` at place n.
    """
    return _world(config, np.random.default_rng(config.seed))[2]


def event_time(seconds: Array) -> Array:
    """Return timestamps of the log, in seconds since 1970, as shares of its days."""
    return np.asarray((seconds - FIRST_DAY_S) / (DAYS * 86_400))


def _world(config: DemoLogConfig, rng: np.random.Generator) -> tuple[pa.Table, pa.Table, DemoTruth]:
    """Draw items, users and what events follow from; events are drawn behind them."""
    items, of_items = _items(config.items, rng)
    users, of_users = _users(config.users, rng)
    return items, users, DemoTruth(**of_items, **of_users)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def _holds(file: Path, content: bytes) -> bool:
    return file.is_file() and file.read_bytes() == content


def _items(count: int, rng: np.random.Generator) -> tuple[pa.Table, dict[str, Array]]:
    subs = len(GENRES) * SUBGENRES
    sub = rng.permutation(np.arange(count) % subs)
    release = np.where(rng.random(count) < 0.08, rng.uniform(0.9, 0.98, count), 0.0)
    release = np.where(
        (release == 0) & (rng.random(count) < 0.3), rng.uniform(0, 0.85, count), release
    )
    popularity = (1 + rng.permutation(count) // subs) ** -0.9
    centre = rng.normal(size=(subs, TEXT_WIDTH))
    text = (centre[sub] + 0.7 * rng.normal(size=(count, TEXT_WIDTH))).astype(np.float32)
    genre = [GENRES[s // SUBGENRES] for s in sub]
    # One tag is the sub-genre's, up to two are noise.
    noise = rng.integers(0, 60, size=(count, 2))
    tags = [
        [f"tag-{s}", *(f"noise-{n}" for n in noise[i, : i % 3])] for i, s in enumerate(sub)
    ]  # fmt: skip
    table = pa.table({
        "item_id": [f"item-{i:06d}" for i in range(count)],
        "title": [f"{genre[i].title()} story {i}" for i in range(count)],
        "genre": genre,
        "tags": tags,
        "price": np.round(rng.lognormal(2 + (sub % 7) / 7, 0.4), 2),
        "released": np.round(FIRST_DAY_S / 86_400 + release * DAYS, 2),
        "text": pa.FixedSizeListArray.from_arrays(pa.array(text.ravel()), TEXT_WIDTH),
    })  # fmt: skip
    return table, {"sub_N": sub, "release_N": release, "popularity_N": popularity}


def _users(count: int, rng: np.random.Generator) -> tuple[pa.Table, dict[str, Array]]:
    subs = len(GENRES) * SUBGENRES
    # Sub-genres of one country are liked more there.
    country = rng.integers(0, 6, count)
    favourite = np.empty((count, 3), np.int64)
    for place in range(3):
        near = (country * 7 + rng.integers(0, 8, count)) % subs
        favourite[:, place] = np.where(rng.random(count) < 0.4, near, rng.integers(0, subs, count))
    moves = rng.random(count) < 0.5
    later = favourite.copy()
    later[moves, 0] = rng.integers(0, subs, int(moves.sum()))
    table = pa.table({
        "user_id": np.arange(1, count + 1),
        "country": [f"c{c}" for c in country],
        "age": pa.array(np.clip(rng.normal(30 + (favourite[:, 0] % 5) * 6, 6), 13, 90).round()),
    })  # fmt: skip
    return table, {"favourite_U3": favourite, "later_U3": later}


def _events(count: int, items: pa.Table, truth: DemoTruth, rng: np.random.Generator) -> pa.Table:
    num_users, num_items = len(truth.favourite_U3), len(truth.sub_N)
    activity = rng.lognormal(0, 0.7, num_users)
    user = rng.choice(num_users, count, p=activity / activity.sum())
    time = np.sort(rng.random(count))
    place = rng.choice(3, count, p=TASTE_SHARES)
    taste = truth.tastes(user, time)[np.arange(count), place]
    item = np.full(count, -1)
    for s in range(truth.sub_N.max() + 1):
        members, todo = np.flatnonzero(truth.sub_N == s), np.flatnonzero(taste == s)
        for part in np.array_split(todo, 60):  # narrow in time: weights change slowly
            if not len(part):
                continue
            weight = truth.weights(members, time[part].mean())
            if weight.any():  # else nothing of the sub-genre is out yet, and nothing happens
                item[part] = members[_sample(weight, len(part), rng)]
    stray = np.flatnonzero(rng.random(count) < STRAY_SHARE)
    item[stray] = _sample(truth.stray_weights(), len(stray), rng)
    keep = (item >= 0) & (time >= truth.release_N[item])
    # Nobody sees an item twice; an event without an item is no one's.
    pair = np.where(item >= 0, user * num_items + item, -1)
    keep &= np.isin(np.arange(count), np.unique(pair, return_index=True)[1])
    seconds = (FIRST_DAY_S + time[keep] * DAYS * 86_400).astype(np.int64)
    ids = items["item_id"].combine_chunks()
    device = rng.choice(["phone", "tablet", "web"], int(keep.sum()), p=(0.6, 0.1, 0.3))
    return pa.table({
        "user_id": user[keep] + 1,
        "item_id": ids.take(pa.array(item[keep])),
        "timestamp": seconds,
        "device": device,
    })  # fmt: skip


def _sample(weight: Array, count: int, rng: np.random.Generator) -> Array:
    bounds = np.cumsum(weight)
    return np.asarray(np.searchsorted(bounds, rng.random(count) * bounds[-1], side="right"))
