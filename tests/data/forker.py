"""`twotower prepare` as a process of its own, forked from an interpreter that has imported it.

Most of what a fresh interpreter would do before the work begins is importing; a hundred runs of the
command are affordable so.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FORKER = """
import json, os, sys
import duckdb, twotower.data.prepare.prepare, twotower.data.prepared
from twotower.cli import main
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    # Its group is there before its number is known.
    os.setpgid(pid, pid)
    if not pid:
        os.chdir(order["cwd"])
        for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        exec(order["before"])
        sys.argv = ["twotower", "prepare", "--config", "job.yaml", *order["arguments"]]
        try:
            main()
        except SystemExit as exit:
            os._exit(exit.code or 0)
        os._exit(9)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Forker:
    """Runs `twotower prepare`, killed after a while or not.

    Attributes:
        pid: of the newest run.
    """

    def __init__(self) -> None:
        self.pid: int | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def prepare(
        self, cwd: Path, run: str = "run", after: float | None = None, before: str = ""
    ) -> tuple[int, float]:
        """Return the signal or exit code, and how long it had a half-made dataset.

        Args:
            cwd: where the job is.
            run: its run_dir.
            after: seconds of that work after which it is killed.
            before: code that the process runs first.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"cwd": str(cwd), "arguments": [f"--run_dir={run}"], "before": before}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        self.pid = pid = int(self.process.stdout.readline())
        while _alive(pid) and not (cwd / run / "prepared.partial").exists():
            time.sleep(0.002)
        began = time.monotonic()
        while _alive(pid) and (cwd / run / "prepared.partial").exists():
            if after is not None and time.monotonic() - began >= after:
                os.killpg(pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        seconds = time.monotonic() - began
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline())), seconds

    def close(self) -> None:
        """End the interpreter."""
        self.process.communicate()


def _alive(pid: int) -> bool:
    """Whether the forker has not yet seen the process end."""
    return Path(f"/proc/{pid}").exists()
