"""What one exception was, and why it was raised."""

from dataclasses import dataclass, replace

from kvmpy.x86.exceptions import EXCEPTIONS

__all__ = ["DOUBLE_FAULT", "GP", "NM", "NP", "PF", "SS", "TS", "UD", "Fault", "selector_error"]

UD, NM, DOUBLE_FAULT, TS, NP, SS, GP, PF = 6, 7, 8, 10, 11, 12, 13, 14


@dataclass(frozen=True, slots=True)
class Fault:
    """One exception: its `cause` (a key of `kvmpy.autopsy.CAUSES`), and `why` in a sentence.

    `vector` is None for what is no exception, such as an instruction that the host cannot
    emulate. `error_code` is None where the exception pushes none, and `address` is the linear
    address that it is about, None where it is about none. `deliberate` says that the guest asked
    for it, as by INT3 or UD2: what is wrong then is that nobody handled it.
    """

    cause: str
    why: str
    vector: int | None = None
    error_code: int | None = None
    address: int | None = None
    deliberate: bool = False

    @property
    def name(self) -> str:
        """The mnemonic with the error code, such as "#PF(0x2)"; empty for no exception."""
        if self.vector is None:
            return ""
        name = EXCEPTIONS.get(self.vector, (f"vector {self.vector}",))[0]
        return name if self.error_code is None else f"{name}({self.error_code:#x})"

    def because(self, cause: str, note: str = "") -> "Fault":
        """The same exception with another cause, and a note on it before the reason."""
        return replace(self, cause=cause, why=f"{note}; {self.why}" if note else self.why)


def selector_error(selector: int) -> int:
    """The error code that names a selector: its RPL is not part of it (SDM Vol.3 6.13)."""
    return selector & 0xFFFC
