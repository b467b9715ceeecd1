"""What the host's KVM really does, found by running guests of a few bytes.

KVM_CHECK_EXTENSION tells what KVM offers, not what works: a KVM that runs ring 0 by emulation has
gaps that no capability names. So each probe runs a small guest, with a deadline, and looks at how
it ends. An answer is found once per process:

    if probe("single-step").answer != "yes":
        pytest.skip(probe("single-step").detail)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from kvmpy import probeguests as guests
from kvmpy.errors import ConfigError, KvmpyError, UnsupportedError
from kvmpy.exits import PortIn, PortOut

__all__ = ["PROBES", "Finding", "Probe", "probe", "probe_all"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a probe found: `answer` is "yes", "no", "hangs" or "unknown".

    `detail` is what was probed, and unless the answer is yes, why it is not.
    """

    name: str
    answer: str
    detail: str


class Probe(NamedTuple):
    """What is probed, in words, and the function that finds it out."""

    subject: str
    ask: Callable[[], guests.Answer]


_NOPS: Final = b"\x90\x90\x90"  # nop; nop; nop
# mov [DATA], al; nop
_STORE: Final = b"\x88\x04\x25" + guests.DATA.to_bytes(4, "little") + b"\x90"
_ADDPS: Final = b"\x0f\x58\xc0"  # addps xmm0, xmm0
_POPCNT: Final = b"\xb9\xff\0\0\0" + b"\xf3\x0f\xb8\xc1"  # mov ecx, 255; popcnt eax, ecx
_INT3, _INT40, _INT80 = b"\xcc", b"\xcd\x40", b"\xcd\x80"  # int3; int 0x40; int 0x80
_OUTSB, _INSB = b"\xf3\x6e", b"\xf3\x6c"  # rep outsb; rep insb
# pushfd; push cs; call the next instruction; add dword [esp], 5; iretd, to what follows it
_IRETD: Final = b"\x9c\x0e" + b"\xe8\0\0\0\0" + b"\x83\x04\x24\x05" + b"\xcf"

_at_third = partial(guests.stops, _NOPS, breakpoints={guests.CODE + 2: "x"})
_at_store = partial(guests.stops, _STORE, breakpoints={guests.DATA: "w1"})
_at_int3 = partial(guests.stops, _INT3, software_breakpoints=True)
_stepping = partial(guests.stops, _NOPS, single_step=True)

PROBES: Final[dict[str, Probe]] = {
    "native-ring3": Probe("native 64-bit code in ring 3", partial(guests.native, "long", 3)),
    "native-ring0": Probe("native 64-bit code in ring 0", partial(guests.native, "long", 0)),
    "native-real": Probe("native code in real mode", partial(guests.native, "real", 0)),
    "32-bit-paging": Probe("32-bit paging (CR0.PG without EFER.LME)", guests.paging32),
    "single-step": Probe("single-stepping ring-0 code", partial(_stepping, 0, 1, 2)),
    "single-step-ring3": Probe("single-stepping ring-3 code", partial(_stepping, 3, 1, 2)),
    "breakpoint": Probe("hardware breakpoints in ring 0", partial(_at_third, 0, 2)),
    "breakpoint-ring3": Probe("hardware breakpoints in ring 3", partial(_at_third, 3, 2)),
    "watchpoint": Probe("hardware watchpoints in ring 0", partial(_at_store, 0, len(_STORE) - 1)),
    "software-breakpoint": Probe("int3 in ring 0 reported to the host", partial(_at_int3, 0, 0)),
    "software-breakpoint-ring3": Probe(
        "int3 in ring 3 reported to the host", partial(_at_int3, 3, 0)
    ),
    "vmcall": Probe("the CPU's hypercall instruction in ring 0", guests.hypercall),
    "ring0-sse": Probe("SSE arithmetic in ring 0", partial(guests.passes, _ADDPS)),
    "ring0-popcnt": Probe("POPCNT in ring 0", partial(guests.passes, _POPCNT, rax=8)),
    "ring0-int3": Probe("int3 in ring 0", partial(guests.interrupts, _INT3, 3)),
    "ring0-int": Probe("int n in ring 0", partial(guests.interrupts, _INT40, 0x40)),
    "real-int": Probe("int 0x40 in real mode", partial(guests.interrupts, _INT40, 0x40, "real")),
    "real-int-high": Probe(
        "int 0x80 in real mode", partial(guests.interrupts, _INT80, 0x80, "real")
    ),
    "iret32": Probe("IRET in 32-bit protected mode", partial(guests.passes, _IRETD, "protected")),
    "syscall": Probe("SYSCALL from ring 3 to ring 0", guests.syscall),
    "string-output": Probe(
        "one exit for many bytes of REP OUTS", partial(guests.string, _OUTSB, PortOut)
    ),
    "string-input": Probe(
        "one exit for many bytes of REP INS", partial(guests.string, _INSB, PortIn)
    ),
    "virtual-tsc": Probe("a TSC of the guest's own in ring 3", guests.tsc),
}
"""Every probe by name."""

_found: dict[str, Finding] = {}


def probe(name: str) -> Finding:
    """Run a probe of `PROBES`, or give what it found before.

    What the host lacks is an answer, not an exception: without a usable KVM it is "unknown",
    and then asked again the next time. Raises ConfigError for a name that is not in the table.
    """
    if name not in PROBES:
        raise ConfigError(f"no probe is named {name!r}; use one of {', '.join(PROBES)}")
    if name in _found:
        return _found[name]
    subject, ask = PROBES[name]
    try:
        answer, why = ask()
    except (ConfigError, UnsupportedError) as error:  # KVM refuses a state, or lacks an ioctl
        answer, why = "no", str(error)
    except (KvmpyError, OSError) as error:
        return Finding(name, "unknown", f"{subject}: {error}")
    _found[name] = Finding(name, answer, f"{subject}: {why}" if why else subject)
    return _found[name]


def probe_all() -> tuple[Finding, ...]:
    """What all probes find, in the order of the table."""
    return tuple(probe(name) for name in PROBES)
