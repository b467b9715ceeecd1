"""What a process costs: `import kvmpy`, and `kvmpy run hello_long` from start to end.

With byte code cached, as it is from a program's second start on, also where the environment
turns caching off: the cache is a directory of this run's own.
"""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import kvmpy
from benchmarks.stats import Prepared, Row, compare, interleave

__all__ = ["measure_process"]

ROOT = Path(kvmpy.__file__).parent.parent
PASS = ("-c", "pass")
IMPORT = ("-c", "import kvmpy")
MACHINE = ("-c", "from kvmpy import Machine")
HELLO = ("-m", "kvmpy", "run", "hello_long")
DEADLINE = 30


class Failed(Exception):
    """The process did not do what it was to do; the message is its last line."""


def _run(arguments: tuple[str, ...], environment: dict[str, str]) -> float:
    """Milliseconds from the start of a Python process to its end."""
    command = [sys.executable, *arguments]
    start = time.perf_counter_ns()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    taken = (time.perf_counter_ns() - start) / 1e6
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise Failed(f"status {done.returncode}: {lines[-1]}")
    return taken


def _prepared(arguments: tuple[str, ...], environment: dict[str, str]) -> Prepared:
    return nullcontext(partial(_run, arguments, environment))


def measure_process(rounds: int) -> list[Row]:
    """Import and a whole run of a guest, beside `python -c pass`."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        commands = {"pass": PASS, "import": IMPORT, "machine": MACHINE, "hello": HELLO}
        missing = ""
        for name, arguments in list(commands.items()):
            try:
                _run(arguments, environment)
            except Failed as failure:
                if name != "hello":
                    raise
                missing = f"not available: {failure}"
                del commands[name]
        samples = interleave(
            rounds,
            1,
            {
                name: partial(_prepared, arguments, environment)
                for name, arguments in commands.items()
            },
        )
    floor = samples["pass"]
    rows = [
        compare("import kvmpy", "difference", "ms", 30, samples["import"], floor),
        compare("from kvmpy import Machine", "difference", "ms", None, samples["machine"], floor),
    ]
    if missing:
        return [*rows, Row("kvmpy run hello_long", "value", "ms", None, 250, note=missing)]
    return [*rows, compare("kvmpy run hello_long", "value", "ms", 250, samples["hello"], floor)]
