"""Build kvmpy._native with cffi in API mode; setup.py names this file."""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent

ffibuilder = FFI()
ffibuilder.cdef((HERE / "cdef.h").read_text())
ffibuilder.set_source(
    "kvmpy._native",
    '#include "calls.h"\n#include "pages.h"',
    # Relative to setup.py, as setuptools wants them.
    sources=["csrc/loop.c", "csrc/kick.c", "csrc/calls.c", "csrc/raise.c", "csrc/pages.c"],
    include_dirs=["csrc"],
    depends=["csrc/loop.h", "csrc/calls.h", "csrc/pages.h", "csrc/cdef.h"],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    libraries=["rt", "pthread"],
    py_limited_api=True,
)
