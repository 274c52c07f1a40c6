"""`twotower serve PATH` and `twotower rollout PATH`: a host with a bundle and nothing else.

    twotower serve bundles/3                # this bundle
    twotower serve bundles                  # the last rollout's, else the newest
    twotower rollout bundles [--to 3 | --back]
    twotower serve repository               # of `twotower render --target=cpu`, as it is

The settings are those of the job that made what is served, then of --config (a YAML of the section
`serve` alone, as `twotower tune-serving` writes it), then of the command line.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twotower.serve.config import ServeConfig
from twotower.serve.source import find_source
from twotower.serve.supervisor import serve_forever
from twotower.serving import rollout_in

# Of those that take no value.
FLAGS = {"-h", "--help", "--print_config", "--back", "--new-schema"}
SERVED = (
    "Bundle, folder of bundles named by their versions, or model repository of `twotower render "
    "--target=cpu`."
)
WITHOUT_JOB = "without a job, see `twotower {command} PATH --help`."
WORK_DIR = (
    "Folder of the server: its log, the repository that Triton loads, and the socket of `twotower "
    "rollout`; PATH.server beside PATH without it."
)


def names_path(arguments: Sequence[str]) -> bool:
    """Whether a command line of `serve` or `rollout` has a PATH: a word that is no option's."""
    return bool(arguments) and arguments[0] in COMMANDS and any(
        not word.startswith("-")
        and (not before.startswith("-") or "=" in before or before in FLAGS)
        for before, word in itertools.pairwise(arguments)
    )  # fmt: skip


def add_arguments(parser: Any, command: str) -> None:
    """Add the arguments of a command that has a PATH, but for those of `rollout` with a job too."""
    parser.add_argument("path", type=str, help=SERVED)
    parser.add_argument("--work-dir", type=str, default=None, help=WORK_DIR)
    if command == "serve":
        parser.add_argument(
            "--config", action="config", help="YAML file of the section `serve` alone."
        )
        parser.add_class_arguments(ServeConfig, "serve")


def with_settings(arguments: list[str], options: Any) -> list[str]:
    """Return the command line of `serve`, with the settings of the bundle's own job before all.

    Raises:
        UserError: when there is nothing at the path that can be served.
    """
    settings = find_source(Path(options.path)).settings(work_dir(options))
    return [arguments[0], f"--config={json.dumps({'serve': settings})}", *arguments[1:]]


def work_dir(options: Any) -> Path:
    """Return the server's directory."""
    if options.work_dir is not None:
        return Path(options.work_dir)
    path = Path(options.path).resolve()
    return path.with_name(f"{path.name}.server")


def serve(options: Any) -> None:
    """Serve what lies at the path until SIGTERM or Ctrl-C."""
    options.serve.validate()
    serve_forever(find_source(Path(options.path)), options.serve, work_dir(options))


def rollout(options: Any) -> None:
    """Have the server that was started on the path take another bundle, or go back."""
    rollout_in(work_dir(options), options)


COMMANDS = {"serve": serve, "rollout": rollout}
