"""What is refused before any worker starts, because there its message would be hard to read."""

import pickle
import sys
from multiprocessing import process
from typing import Any

from kvmpy.errors import ConfigError

__all__ = ["GUARD", "WORKER", "check_function", "check_main"]

WORKER = "kvmpy.map worker"
"""The name of worker processes."""

GUARD = 'a script that calls kvmpy.map needs `if __name__ == "__main__":` around what it does'


def check_main() -> None:
    """Raise ConfigError in a process that is only importing the main module."""
    # multiprocessing.spawn looks at the same, when it is too late for a clear word.
    me = process.current_process()
    if getattr(me, "_inheriting", False):
        if me.name == WORKER:  # the parent says so, once, and not each worker as well
            raise SystemExit(1)
        raise ConfigError(
            f"a worker process imports the main module, which starts workers: {GUARD}"
        )


def check_function(name: str, function: Any) -> None:
    """Raise ConfigError for a function that a worker process could not import."""
    if function is None:
        return
    what = f"{name}={getattr(function, '__qualname__', function)}"
    try:
        pickle.dumps(function)
    except Exception as error:  # anything that __reduce__ may raise
        advice = "define it at the top level of a module"
        if hasattr(function, "__self__"):  # a method goes with its object
            advice = "make its object in a function at the top level of a module, and give that"
        raise ConfigError(
            f"{what} cannot be sent to a worker process ({error}): {advice}"
        ) from None
    main = sys.modules["__main__"]
    there = getattr(main, "__spec__", None) or getattr(main, "__file__", None)
    if getattr(function, "__module__", None) == "__main__" and not there:
        raise ConfigError(
            f"{what} was defined where worker processes cannot import it: "
            "define it in a module, not in an interactive session"
        )
