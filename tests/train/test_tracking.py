"""Tracking never stops what it tracks: without a network, without a mode, without a bundle."""

import os
import socket
import subprocess
import sys

import pytest

from twotower.errors import UserError
from twotower.train.config import TrackingConfig

UNREACHABLE = """
import sys
from pathlib import Path
from twotower.train.config import TrackingConfig
from twotower.train.summary import is_tracked
from twotower.train.tracking import log_bundle, wandb_logger

config, here = TrackingConfig(), Path.cwd()
assert config.mode() == "online"
run = wandb_logger(here, config, "name", {"seed": 0}).experiment
assert run.settings.mode == "offline"
run.finish()
log_bundle(here, here / "bundles" / "1", config, run.id, {})
assert not is_tracked(here, 1), "there is no such bundle"
bundle = here / "bundles" / "2"
bundle.mkdir(parents=True)
(bundle / "manifest.json").write_text("{}")
log_bundle(here, bundle, config, run.id, {"recall@10": 0.5})
assert is_tracked(here, 2) and not is_tracked(here, 1)
"""


def test_without_a_network_a_run_and_its_bundle_are_tracked_offline(tmp_path) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {
            "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "1",
            "WANDB_BASE_URL": f"http://127.0.0.1:{taken.getsockname()[1]}",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", UNREACHABLE], cwd=tmp_path, env=environment, check=False,
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("twotower: warning: ")]
    offline, missing = (
        [line for line in warnings if words in line]
        for words in ("W&B is not reached, so this run is tracked offline", "was not tracked")
    )
    assert len(offline) == 3, "once a run"
    assert len(missing) == 1
    assert "bundles/1" in missing[0]
    assert "next `twotower export` tries again" in missing[0]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) >= 2


@pytest.mark.parametrize(
    ("config", "key", "given", "expected"),
    [
        ("auto", "", "", "offline"),
        ("auto", "x", "", "online"),
        ("auto", "x", "offline", "offline"),
        ("auto", "", "online", "online"),
        ("online", "x", "disabled", "disabled"),
        ("online", "x", "dryrun", "offline"),
        ("offline", "x", "", "offline"),
        ("off", "x", "online", "disabled"),
    ],
)
def test_the_environment_goes_before_the_job(config, key, given, expected, monkeypatch) -> None:
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", given)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert TrackingConfig(wandb=config).mode() == expected


def test_an_unknown_mode_in_the_environment_is_explained(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(UserError, match=r"WANDB_MODE must be one of online.*got 'onlin'"):
        TrackingConfig().validate()
    TrackingConfig(wandb="off").validate()
