"""Exceptions that go from a worker to who has given out the work."""

import pickle
import traceback

__all__ = ["carried", "portable"]


def carried(error: BaseException) -> BaseException:
    """An exception for another process; its traceback is a note, for that travels."""
    text = "".join(traceback.format_exception(error)).rstrip()
    made = portable(error).with_traceback(None)
    made.add_note(f"in the worker:\n{text}")
    return made


def portable(error: BaseException) -> BaseException:
    """The exception, or one that tells of it if it cannot be pickled there and back."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # anything that its class may raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
