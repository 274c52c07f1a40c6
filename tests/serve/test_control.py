"""The socket that commands reach a server by, and what a rollout accepts of another schema."""

import socket
import stat
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from twotower.errors import UserError
from twotower.serve.config import ServeConfig
from twotower.serve.control import SOCKET, command, control_socket
from twotower.serve.health import Health
from twotower.serve.rollout import read_choice, refuse_new_schema

from .tiny import spec


def act(request, say) -> str:
    for step in request["steps"]:
        say(step)
    if "fails" in request:
        raise UserError("not today")
    return "done so"


def test_a_command_hears_each_step_and_the_outcome(tmp_path) -> None:
    folder = tmp_path / ("long" * 40)  # beyond what the system takes as a socket's name
    folder.mkdir()
    heard: list[str] = []
    with control_socket(folder, act):
        assert stat.S_IMODE((folder / SOCKET).stat().st_mode) == 0o600
        assert command(folder, {"steps": ["a", "b\n"]}, heard.append) == "done so"
        assert heard == ["a", "b\n"]
        with pytest.raises(UserError, match="not today"):
            command(folder, {"steps": [], "fails": True}, heard.append)
        with pytest.raises(UserError, match="steps"):
            command(folder, {}, heard.append)
    with pytest.raises(UserError, match="no server of this job is running"):
        command(folder, {"steps": []}, heard.append)
    (folder / SOCKET).touch()  # of a killed server
    with pytest.raises(UserError, match="no server of this job is running"):
        command(folder, {"steps": []}, heard.append)
    with control_socket(folder, act):
        assert command(folder, {"steps": []}, heard.append) == "done so"


def test_nonsense_does_not_end_the_socket(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # for a short name
    with control_socket(tmp_path, act):
        for noise in (b"", b"\n", b"\xff\n", b"[]\n", b"x" * 100_000, b'{"steps": 3}\n'):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(SOCKET)
                connection.sendall(noise)
        assert command(tmp_path, {"steps": []}, print) == "done so"


USER, BAG = spec("user", "id", "int64"), spec("bag", "ids", "string", 5)
TIMES = replace(spec("bag_times", "times", "int64", 5), of="bag")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ([USER, BAG], None),
        ([USER, replace(BAG, length=9)], None),
        ([USER, BAG, TIMES], None),
        ([USER], "no feature 'bag'"),
        ([USER, BAG, spec("age", "number", "float32")], "a new feature 'age'"),
        ([USER, replace(BAG, length=4)], "'bag' has the length 4, not 5"),
        ([replace(USER, dtype="string"), BAG], "'user' is id of string, not id of int64"),
        ([replace(USER, kind="ids"), BAG], "'user' is ids of int64, not id of int64"),
    ],
)
def test_a_schema_that_running_clients_do_not_fit_is_refused(query, words) -> None:
    old = SimpleNamespace(version=1, query=[USER, BAG], item_id_dtype="int64")
    new = SimpleNamespace(version=2, query=query, item_id_dtype="int64")
    bundles = [SimpleNamespace(manifest=manifest) for manifest in (old, new)]
    if words is None:
        refuse_new_schema(*bundles)
    else:
        with pytest.raises(UserError, match=words):
            refuse_new_schema(*bundles)
    new.item_id_dtype = "string"
    with pytest.raises(UserError, match="item ids of type string, not int64"):
        refuse_new_schema(*bundles)


def test_a_choice_that_no_rollout_wrote_is_refused(tmp_path) -> None:
    file = tmp_path / "rollout.json"
    assert read_choice(file) is None
    for text in ("", "{", "[]", '{"serve": 1}', '{"serve": "x", "before": 1}'):
        file.write_text(text)
        with pytest.raises(UserError, match="not what a rollout writes"):
            read_choice(file)


def test_health_is_an_answer_that_is_fresh() -> None:
    health = Health(ServeConfig(probe_interval_s=0.05, probe_timeout_s=0.05))
    assert health.reason() == "starting"
    health.answered(0.001)
    assert health.reason() is None
    time.sleep(0.15)
    assert health.reason().startswith("no golden query answered for 0.")
    health.answered(0.001)
    health.failed("no answer")
    assert health.reason() == "golden query failed: no answer"
    health.answered(0.001)
    health.leave()
    health.answered(0.001)
    assert health.reason() == "stopping"
