"""Views of a machine as it is now."""

from kvmpy.dispatch import Dispatch
from kvmpy.errors import ConfigError
from kvmpy.modes import Layout
from kvmpy.vcpu import VCPU
from kvmpy.views.memorymap import MemoryMapView, memory_map
from kvmpy.views.pages import reader
from kvmpy.views.state import Processor, StateView
from kvmpy.vm import VM
from kvmpy.x86.registers import Registers
from kvmpy.x86.state import SpecialRegisters

__all__ = ["MachineView"]


class MachineView(StateView):
    """Views of one vCPU of a machine and of its memory, each as it is when it is asked for."""

    def __init__(
        self, vm: VM, layout: Layout, dispatch: Dispatch, symbols: dict[str, int], cpu: VCPU
    ) -> None:
        super().__init__(reader(vm.memory.read), Registers(), SpecialRegisters(), symbols=symbols)
        self._vm, self._layout, self._dispatch, self._cpu = vm, layout, dispatch, cpu

    def _regs(self) -> Registers:
        return self._cpu.get_regs()

    def _sregs(self) -> SpecialRegisters:
        return self._cpu.get_sregs()

    def _processor(self) -> Processor:
        return Processor.of(self._cpu.get_cpuid2())

    def memory_map(self) -> MemoryMapView:
        """RAM and its slots, what kvmpy keeps in it, and who answers at ports and addresses."""
        dispatch = self._dispatch
        return memory_map(self._vm.memory, self._layout, dispatch.mmio, dispatch.ports)

    def cpu(self, index: int) -> "MachineView":
        """The views of another vCPU; ConfigError where there is none of that number."""
        cpus = self._vm.vcpus
        if not 0 <= index < len(cpus):
            raise ConfigError(f"there is no vCPU {index}: this machine has {len(cpus)}")
        symbols = dict(self._symbols or {})
        return MachineView(self._vm, self._layout, self._dispatch, symbols, cpus[index])
