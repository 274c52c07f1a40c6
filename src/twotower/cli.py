"""The command `twotower`: one YAML describes a job, one command runs any step of it.

twotower run --config configs/quickstart.yaml
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from types import FrameType
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from rich.markup import escape

from twotower import (
    __version__,
    bundles,
    checkpoints,
    evaluations,
    gateway,
    inspection,
    load_testing,
    serve_tuning,
    serving,
    serving_path,
    steps,
)
from twotower.data.demo_log import DemoLogConfig
from twotower.errors import UserError, did_you_mean
from twotower.job import Job
from twotower.serve.load.config import TuneConfig
from twotower.show import console, facts

CLOSING = "Any key of the YAML can be given on the command line: --train.batch_size=4096."
TRAINING_LIBRARIES = {
    "duckdb", "faiss", "fbgemm_gpu", "lightning", "matplotlib", "onnx", "onnxscript", "optuna",
    "safetensors", "scipy", "torch", "torchrec", "triton", "wandb",
}  # fmt: skip
GATEWAY_LIBRARIES = {
    "aiohttp", "fastapi", "prometheus_client", "pydantic", "redis", "uvicorn", "uvloop",
}  # fmt: skip
RECOMMEND = "Ask the running server for a user's recommendations, without what the user has seen."


def demo_log(config: DemoLogConfig) -> None:
    """Write the synthetic log."""
    from twotower.data.demo_log import write_demo_log

    with console.status("writing the demo log"):
        counts, written = write_demo_log(config)
    if not written:
        there = escape(config.output)
        console.print(f"[bold]demo-log[/bold]: {there} holds this very log, left untouched")
        return
    facts("demo-log", {**counts, "written to": config.output})


def sweep(job: Job, _: Namespace) -> None:
    """Search the settings that validate best."""
    from twotower.sweep.sweep import sweep as search

    search(job)


def export(job: Job, options: Namespace) -> None:
    """Make a bundle and, where it is asked for, the engines of this host's GPU."""
    if options.tensorrt and not job.export.tensorrt.precisions:
        raise UserError(
            "--tensorrt: export.tensorrt.precisions is empty: name those to build, for instance "
            "--export.tensorrt.precisions=[fp16]"
        )
    steps.export(job)
    if options.tensorrt:
        steps.build_engines(job)


def load(job: Job, options: Namespace) -> None:
    """Measure a server's latencies under load."""
    from twotower.load_testing import load as measure

    measure(job, options)


def tune_serving(job: Job, options: Namespace) -> int:
    """Find the best settings of the server; returns the exit code."""
    from twotower.serve_tuning import tune_serving as tune

    return tune(job, options)


def run(job: Job, _: Namespace) -> None:
    """Do every step, then answer for three users from a real server."""
    for step in (steps.prepare, steps.train, steps.evaluate, steps.export):
        step(job)
    serving.show_answers(job)


JOB_COMMANDS: dict[str, tuple[str, Callable[[Job, Namespace], int | None]]] = {
    "run": ("All steps of a job, skipping those whose inputs have not changed.", run),
    "inspect": (
        "Look at a log before training, or compare a new one with what was trained on.",
        lambda job, options: inspection.inspect(job, options.against),
    ),
    "prepare": ("Read a log and write the prepared dataset.", lambda job, _: steps.prepare(job)),
    "train": ("Train the towers, or resume a killed run.", lambda job, _: steps.train(job)),
    "sweep": ("Search the settings that validate best, and write the best job.", sweep),
    "evaluate": (
        "Judge the towers over the whole catalogue, beside two baselines.",
        lambda job, _: steps.evaluate(job),
    ),
    "export": ("Make a bundle, if ONNX agrees with PyTorch.", export),
    "serve": (
        "Serve the last rollout's bundle, else the newest, from Triton until stopped; "
        f"{serving_path.WITHOUT_JOB.format(command='serve')}",
        serving.serve,
    ),
    "rollout": (
        "Have the running server take another bundle, proven first, with no failed request; "
        f"{serving_path.WITHOUT_JOB.format(command='rollout')}",
        serving.rollout,
    ),
    "recommend": (RECOMMEND, serving.recommend),
    "load": ("Measure a server's latencies at given rates, and write a page.", load_testing.load),
    "tune-serving": (
        "Try settings of the server for a latency goal, and write the best section serve; exit "
        "code 1 where none reaches it.",
        serve_tuning.tune_serving,
    ),
    "gateway": ("Answer JSON over HTTP in front of Triton, until stopped.", gateway.gateway),
    "load-store": (
        "Write what the gateway knows of users and popularity from the prepared dataset.",
        gateway.load_store,
    ),
}


def build_parser(command_line: Sequence[str] | None = None) -> ArgumentParser:
    """Return the parser of all commands.

    Args:
        command_line: what will be parsed; of a job's commands that it does not name, the arguments
            are left out, which take a tenth of a second each. None for all.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="twotower",
        description=(
            "Two-tower retrieval, from an event log to live traffic. Start with: "
            "twotower demo-log; twotower run --config configs/quickstart.yaml"
        ),
        exit_on_error=False,
        version=__version__,
    )
    commands_ = parser.add_subcommands(required=True, dest="command")
    demo = ArgumentParser(
        description="Write a synthetic log: tastes, popularity skew, drift, cold items.",
        exit_on_error=False,
    )
    demo.add_class_arguments(DemoLogConfig)
    commands_.add_subcommand("demo-log", demo, help=demo.description)
    setup = ArgumentParser(
        description="Make the small environment that the local Triton server runs in.",
        exit_on_error=False,
    )
    commands_.add_subcommand("setup-server", setup, help=setup.description)
    tools = ArgumentParser(description="Look at a checkpoint, or rewrite it.", exit_on_error=False)
    commands_.add_subcommand("checkpoint", tools, help=tools.description)
    checkpoints.add_commands(tools, ArgumentParser)
    items = ArgumentParser(
        description="Compare the indexes that a bundle could have, or update its items.",
        exit_on_error=False,
    )
    bundles.add_index_arguments(items)
    commands_.add_subcommand("index", items, help=items.description)
    look = ArgumentParser(description="Look at a bundle.", exit_on_error=False)
    commands_.add_subcommand("bundle", look, help=look.description)
    bundles.add_bundle_commands(look, ArgumentParser)
    proof = ArgumentParser(
        description="Prove that ONNX Runtime and Triton answer a bundle's golden queries as eager "
        "PyTorch did; exit code 1 where they do not.",
        exit_on_error=False,
    )
    bundles.add_verify_arguments(proof)
    commands_.add_subcommand("verify", proof, help=proof.description)
    repository = ArgumentParser(
        description="Write a bundle as a model repository for a Triton server of one's own.",
        exit_on_error=False,
    )
    bundles.add_render_arguments(repository)
    commands_.add_subcommand("render", repository, help=repository.description)
    pair = ArgumentParser(
        description="Compare two evaluations on the same queries: what differs, and by chance?",
        exit_on_error=False,
    )
    evaluations.add_arguments(pair)
    commands_.add_subcommand("compare", pair, help=pair.description)
    for name, (text, _) in JOB_COMMANDS.items():
        command = ArgumentParser(description=f"{text} {CLOSING}", exit_on_error=False)
        commands_.add_subcommand(name, command, help=text)
        if command_line is not None and name not in command_line:
            continue
        if name == "rollout":
            _add_rollout_arguments(command)
        if command_line is not None and serving_path.names_path(command_line):
            serving_path.add_arguments(command, name)
            continue
        command.add_argument("--config", action="config", help="YAML file of the job.")
        command.add_class_arguments(Job)
        if name == "recommend":
            _add_recommend_arguments(command)
        if name == "export":
            command.add_argument(
                "--tensorrt", action="store_true",
                help="Also build the TensorRT engines of export.tensorrt.precisions for this "
                "host's GPU, as the bundle's build_engine.py does elsewhere.",
            )  # fmt: skip
        if name == "load":
            load_testing.add_load_arguments(command)
        if name == "tune-serving":
            load_testing.add_options(command, TuneConfig)
        if name == "inspect":
            command.add_argument(
                "--against", type=str, default=None,
                help="Prepared dataset, or run_dir that holds one, to compare the log with; exit "
                "code 3 past the limits of the section inspect.",
            )  # fmt: skip
    return parser


def _add_rollout_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--to", type=int, default=None, help="Version to serve; the newest bundle without it."
    )
    parser.add_argument(
        "--back", action="store_true", help="Serve the version before the last rollout."
    )
    parser.add_argument(
        "--new-schema", action="store_true",
        help="Accept features that differ from those served: clients must send them at once.",
    )  # fmt: skip


def _add_recommend_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--user", type=str, required=True, help="User id; an unknown one is fine.")
    parser.add_argument(
        "-k", "--k", type=int, default=None, help="Number of items; serve.default_k without it."
    )
    # Text, not lists: read as YAML, the ids 318, 007 and no would be other ones.
    parser.add_argument(
        "--history", type=str, default=None,
        help="Item ids, oldest first, instead of the log's: --history=[a,b].",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", type=str, default="", help="Further item ids to leave out: --exclude=[a,b]."
    )
    parser.add_argument(
        "--url", type=str, default=None, help="Triton's gRPC address; the served job's by default."
    )


def keys_of(cls: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of a configuration dataclass, those of list entries included."""
    found = []
    hints = get_type_hints(cls)
    for f in fields(cls):
        found.append(prefix + f.name)
        for inner in (hints[f.name], *get_args(hints[f.name])):
            if is_dataclass(inner):
                found += keys_of(inner, f"{prefix}{f.name}.")
    return found


def explain(message: str) -> str:
    """Turn jsonargparse's message into one line with a suggestion for a misspelt key."""
    text = re.sub(r"\n\s*Problem with given class_path '[^']*':", ":", message.strip())
    text = re.sub(r"Expected a <class '(\w+)'>. Got value: (.*)", r"expected \1, got '\2'", text)
    text = re.sub(r"Parser key \"([^\"]+)\"", r"\1", text)
    text = re.sub(r"\s*\n\s*", " ", text)
    keys = keys_of(Job) + [f.name for f in fields(DemoLogConfig)]
    found = re.search(r"(?:unrecognized arguments: --|not accept option ')([\w.-]+)", text)
    if found and found[1] in [*keys, "config"] and serving_path.names_path(sys.argv[1:]):
        of_serve = "; beside PATH, --config of serve holds the section serve alone"
        return f"'{found[1]}' is of a job, but PATH says what is served: give one of them{of_serve}"
    if found := re.search(r"unrecognized arguments: --([\w.-]+)", text):
        return f"unknown option --{found[1]}{did_you_mean(found[1], keys)}"
    if found := re.search(
        r"(Group '([^']+)'|Subcommand '[^']+') does not accept option '(.+)'", text
    ):
        name = f"{found[2]}.{found[3]}" if found[2] else found[3]
        return f"unknown key '{name}'{did_you_mean(name, keys)}"
    if found := re.match(r"([\w.]+):.* Option '([^']+)' is not accepted", text):
        near = [k.removeprefix(f"{found[1]}.") for k in keys if k.startswith(f"{found[1]}.")]
        return f"unknown key '{found[2]}' in {found[1]}{did_you_mean(found[2], near)}"
    if found := re.match(r"([\w.]+): .* the following arguments are required: ([\w, ]+) - ", text):
        return f"{found[1]} also needs {found[2]}"
    if "interactions" in text and "are required" in text and "--config" not in sys.argv:
        or_path = " or, to serve without one, PATH" if sys.argv[1] in serving_path.COMMANDS else ""
        text += f": give a job with --config JOB.yaml (see configs/quickstart.yaml){or_path}"
    return text


def dispatch(arguments: list[str]) -> int:
    """Parse, build and run one command; returns its exit code."""
    parser = build_parser(arguments)
    chosen = parser.parse_args(arguments)
    without_job = serving_path.names_path(arguments)
    if without_job and chosen.command == "serve":
        chosen = parser.parse_args(serving_path.with_settings(arguments, chosen.serve))
    options = parser.instantiate(chosen)
    name, options = options.command, options[options.command]
    if name == "demo-log":
        demo_log(DemoLogConfig(**{f.name: options[f.name] for f in fields(DemoLogConfig)}))
        return 0
    if name == "setup-server":
        serving.setup_server()
        return 0
    if name == "checkpoint":
        return checkpoints.run(options)
    if name == "index":
        return bundles.index(options)
    if name == "bundle":
        return bundles.inspect(options)
    if name == "verify":
        from twotower.verification import verify  # and with it ONNX Runtime

        return verify(options)
    if name == "render":
        return bundles.render(options)
    if name == "compare":
        return evaluations.compare(options)
    if without_job:
        return serving_path.COMMANDS[name](options) or 0
    job = Job(**{f.name: options[f.name] for f in fields(Job)})
    job.validate()
    return JOB_COMMANDS[name][1](job, options) or 0


def main() -> None:
    """Run the command; a mistake of the user's is one line and exit code 2."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = dispatch(sys.argv[1:])
    except ArgumentError as error:
        code = _refuse(explain(str(error.message)))
    except UserError as error:
        code = _refuse(str(error))
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in TRAINING_LIBRARIES | GATEWAY_LIBRARIES:
            raise
        extra = "twotower[train], on a machine without a GPU as `make install` does"
        code = _refuse(
            f"this command needs {error.name}, which the base install leaves out: install "
            f"{extra if library in TRAINING_LIBRARIES else 'twotower[gateway]'}"
        )
    except BrokenPipeError:
        code = 1
    except OSError as error:
        if error.filename is None:
            raise
        code = _refuse(
            f"{error.filename}: {error.strerror}: check the path, its rights and the disk's space"
        )
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules:
        # gloo's threads may abort the interpreter's orderly exit after all work is done.
        os._exit(code)
    sys.exit(code)


def _terminated(number: int, _: FrameType | None) -> None:
    # Not print, which may be what the signal has interrupted.
    os.write(2, b"twotower: stopped by SIGTERM: give the same command to go on\n")
    raise SystemExit(128 + number)


def _refuse(message: str) -> int:
    print(f"twotower: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
