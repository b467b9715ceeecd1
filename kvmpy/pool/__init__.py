"""Many runs at once: one prepared guest, run for many inputs by the workers of any executor."""

from kvmpy.pool.mapping import map

__all__ = ["map"]
