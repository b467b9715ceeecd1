"""Build kvmpy._native with cffi in API mode; setup.py names this file."""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent

ffibuilder = FFI()
ffibuilder.cdef((HERE / "cdef.h").read_text())
ffibuilder.set_source(
    "kvmpy._native",
    '#include "pages.h"\n#include "reset.h"\n#include "record.h"',
    # Relative to setup.py, as setuptools wants them.
    sources=[
        f"csrc/{name}.c" for name in ("loop", "kick", "calls", "raise", "pages", "reset", "record")
    ],
    include_dirs=["csrc"],
    depends=[f"csrc/{name}.h" for name in ("loop", "calls", "pages", "reset", "record", "cdef")],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    libraries=["rt", "pthread"],
    py_limited_api=True,
)
