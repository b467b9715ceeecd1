"""The part of a machine that shows what is in it."""

from typing import TYPE_CHECKING

from kvmpy.running import Running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmpy.machineview import MachineView
    from kvmpy.stepping import Step

__all__ = ["Viewing"]


class Viewing(Running):
    """Views of the state, and single steps; what they need is loaded when they are used."""

    symbols: dict[str, int]

    @property
    def view(self) -> "MachineView":
        """Views of the first vCPU and of memory: registers, tables, page walks, code, bytes."""
        from kvmpy.machineview import MachineView

        return MachineView(self.vm, self.layout, self.dispatch, self.symbols, self.vm.vcpus[0])

    def trace_instructions(
        self,
        count: int | None = None,
        until: int | str | None = None,
        timeout: float | None = None,
        cpu: int = 0,
    ) -> "Iterator[Step]":
        """Run a vCPU one instruction at a time, and say of each what it did.

        It ends after `count` steps, before the instruction at `until` (a linear address, or one of
        `symbols`), after `timeout` seconds, or with the guest; the last step's `outcome` says how.
        Devices are served. Where this host cannot step ring-3 code, it runs natively up to its next
        exit, as one step. Raises UnsupportedError where the host cannot step at all.
        """
        from kvmpy.stepping import trace_instructions

        return trace_instructions(
            self, self.symbols, count=count, until=until, timeout=timeout, cpu=cpu
        )
