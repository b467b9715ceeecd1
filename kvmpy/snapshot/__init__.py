"""Snapshots: a machine's memory and state at one moment, to go back to and to make copies from.

It works on a machine's parts (memory regions, vCPUs, the VM) and never on `Machine` itself.
"""

from kvmpy.snapshot.config import Attached
from kvmpy.snapshot.cpu import CpuState, VmState, load_cpu, load_vm, save_cpu, save_vm
from kvmpy.snapshot.diff import Difference
from kvmpy.snapshot.image import Image
from kvmpy.snapshot.pages import capture, put_back
from kvmpy.snapshot.snapshot import Config, Snapshot, same_shape
from kvmpy.snapshot.spawn import Plan

__all__ = [
    "Attached",
    "Config",
    "CpuState",
    "Difference",
    "Image",
    "Plan",
    "Snapshot",
    "VmState",
    "capture",
    "load_cpu",
    "load_vm",
    "put_back",
    "same_shape",
    "save_cpu",
    "save_vm",
]
