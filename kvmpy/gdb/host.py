"""What the host's KVM has to debug with, as far as probes can tell."""

from dataclasses import dataclass

from kvmpy.probe import probe

__all__ = ["Host", "probe_host"]


@dataclass(frozen=True, slots=True)
class Host:
    """Whether int3 is reported to the host, in ring 0 and in 64-bit ring 3; likewise single steps
    and breakpoints by debug registers; and watchpoints.
    """

    int3: bool
    int3_ring3: bool
    step: bool
    step_ring3: bool
    hardware: bool
    hardware_ring3: bool
    watch: bool


def probe_host() -> Host:
    """Ask the host's KVM, once per process."""
    return Host(
        *(
            probe(name).answer == "yes"
            for name in (
                "software-breakpoint",
                "software-breakpoint-ring3",
                "single-step",
                "single-step-ring3",
                "breakpoint",
                "breakpoint-ring3",
                "watchpoint",
            )
        )
    )
