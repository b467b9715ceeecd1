"""What pyproject.toml cannot say: the compiled module, and that its ABI is CPython's stable one."""

from setuptools import setup

setup(
    cffi_modules=["csrc/build.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
