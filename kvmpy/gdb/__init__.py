"""A server of GDB's remote serial protocol: debugging a guest from outside of it.

packets      framing: bytes to packets and back             pure
stub         the commands: a packet to its answer           asks a `Target`
target       what the commands ask of a guest
control      running the vCPUs, and why one stopped
breakpoints  what is in the guest's memory and registers meanwhile
traps        debug events that KVM gives to ring 3's kernel
server       sockets
"""

from kvmpy.gdb.server import serve

__all__ = ["serve"]
