"""`twotower inspect`: look at a log before anyone trains, or at a new one after that.

    twotower inspect --config JOB.yaml
    twotower inspect --config JOB.yaml --against PREPARED --data.interactions=new_day.parquet

    run_dir/
      inspection/  inspection.json, index.html
      drift/       the same files, of a log compared with --against

With --against, exit code 3 says that something is past a limit of the section `inspect:`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from twotower.errors import UserError
from twotower.files import atomic_directory, write_json
from twotower.job import Job
from twotower.show import console, facts, long_work, table

if TYPE_CHECKING:
    from twotower.data.prepared import PreparedDataset

DRIFTED = 3
COLORS = {"suspected leak": "red", "stops prepare": "yellow", "note": "cyan"}


def inspect(job: Job, against: str | None) -> int:
    """Inspect the job's log and write the page; returns the exit code, 3 for drift.

    Raises:
        UserError: when the log cannot be read, or there is no prepared dataset at `against`.
    """
    from twotower.data.inspect.inspection import inspect_log
    from twotower.data.inspect.page import render

    dataset = None if against is None else _prepared_at(Path(against))
    target = job.path("inspection" if dataset is None else "drift")
    with long_work("inspect") as report, atomic_directory(target) as partial:
        found = inspect_log(job.data, job.inspect, partial / "scratch", dataset, report)
        report("drawing", 1.0)
        write_json(partial / "inspection.json", found)
        (partial / "index.html").write_text(render(job.name, found), encoding="utf-8")
    _show(found)
    console.print(f"page: {target / 'index.html'}", markup=False)
    return DRIFTED if found.get("drift", {}).get("flags") else 0


def _prepared_at(path: Path) -> PreparedDataset:
    """Open the dataset at `path` or at `path`/prepared."""
    from twotower.data.prepared import PreparedDataset

    for place in (path, path / "prepared"):
        if (place / "prepared.json").is_file():
            return PreparedDataset(place)
    raise UserError(
        f"{path}: no prepared dataset (--against): name a folder `prepared`, or the run_dir that "
        "holds one; `twotower prepare` makes it"
    )


def _show(found: dict[str, Any]) -> None:
    from twotower.data.inspect.words import count, moment, share

    counts, time, popular = found["counts"], found["time"], found["popularity"]
    history, days = found["histories"]["per_user"], time["events_a_day"]
    facts("inspect", {
        "events": counts["events"],
        "users, items": f"{count(counts['users'])}, {count(counts['items'])} "
                        f"(with events {count(counts['active_users'])}, "
                        f"{count(counts['active_items'])})",
        "time": f"{moment(time['first'])} to {moment(time['last'])}, "
                f"{count(time['empty_days'])} of {count(time['days'])} days empty",
        "events a day": f"median {count(days['median'])}, from {count(days['min'])} "
                        f"to {count(days['max'])}",
        "events a user": f"median {count(history['median'])}, p90 {count(history['p90'])}, "
                         f"most {count(history['max'])}",
        "popularity": f"top 1% of items {share(popular['top_1_percent'])} of events, "
                      f"Gini {popular['gini']:.2f}",
        "repeats": f"{count(counts['repeats'])} of a user and item, "
                   f"{count(counts['duplicates'])} at the same moment",
        "bad rows": counts["bad_rows"],
    })  # fmt: skip
    if "drift" in found:
        _show_drift(found["drift"])
    else:
        _show_split(found["split"])
        _show_features(found)
    for f in found["findings"]:
        color = COLORS[f["kind"]]
        text = f"[{color}]{f['kind']}[/{color}] [bold]{escape(f['subject'])}[/bold]: "
        console.print(text + escape(f["text"]))
    for reason in found["bad_rows"]:
        console.print(f"[yellow]bad row[/yellow] {escape(reason)}")


def _show_split(split: dict[str, Any]) -> None:
    from twotower.data.inspect.words import count, moment, share

    rows = [
        [name, count(p["events"]), moment(p["first"], days=True), moment(p["last"], days=True),
         *([share(p["unseen_users"]), share(p["unseen_items"])] if name != "train" else "--")]
        for name, p in split["parts"].items()
    ]  # fmt: skip
    columns = ["part", ">events", "from", "to", ">users unseen", ">items unseen"]
    table(f"split: {split['kind']}", columns, rows)


def _show_features(found: dict[str, Any]) -> None:
    from twotower.data.inspect.words import count, share

    told = found.get("gains", {}).get("features", {})
    rows = []
    for f in found["features"]:
        gain = told.get(f["name"]) if f["tower"] == "query" else None
        known = "rows" in f
        rows.append([
            f["name"], f["tower"], f["kind"], f["source"] or "-",
            share(f["missing"] / max(1, f["rows"])) if known else "-",
            count(f["distinct"]) if known else "-", share(gain["gain"]) if gain else "-",
        ])  # fmt: skip
    table(
        "features (gain: what it tells of the item)",
        ["feature", "tower", "kind", "source", ">missing", ">distinct", ">gain"], rows,
    )  # fmt: skip


def _show_drift(drift: dict[str, Any]) -> None:
    from twotower.data.inspect.drift import moved
    from twotower.data.inspect.words import share

    rows = []
    for f in drift["features"]:
        said = moved(f) if "psi" in f else "the id itself"
        rows.append([
            f["name"], f"{f['psi']:.3f}" if "psi" in f else "-",
            share(f["unseen"]["now"]) if "unseen" in f else "-",
            escape(f"not compared: {f['not_compared']}" if "not_compared" in f else said),
        ])  # fmt: skip
    ratio, unseen = drift["volume"]["ratio"], drift["unseen"]
    table("drift", ["feature", ">index", ">unseen", "moved most"], rows)
    facts("against training", {
        "events a day": "-" if ratio is None else f"{ratio:.2f} times",
        "unseen, of events": f"users {share(unseen['users'])}, items {share(unseen['items'])}",
    })  # fmt: skip
    for subject, text in drift["flags"]:
        console.print(f"[red]drift[/red] [bold]{escape(subject)}[/bold]: {escape(text)}")
    if not drift["flags"]:
        console.print("[green]no drift[/green] past a limit of the section inspect")
