"""A 16550A serial port, as a PC has it at 0x3f8 (COM1).

Source: National Semiconductor (now TI) PC16550D data sheet, June 1995, SNLS378B; the section
numbers below are its. What a virtual line changes against the chip:

- No time passes on the line. A byte written to THR is at the output when the write returns,
  so THRE and TEMT always read 1; the receiver's character timeout (4 characters' time) has
  elapsed whenever fewer bytes wait than the trigger level asks for.
- Baud rate, word length and parity make no difference: all 8 bits go through. There is no
  break, no parity or framing error, and no DMA.
- Host input is never lost, as if the sender were held back in time: see `receiver.py`. Only
  bytes that are looped back can overrun, and only those does clearing the FIFO drop.
- The modem lines say that the other side is there: CTS, DSR and DCD are on, RI is off.
"""

from collections.abc import Callable

from ..bus import ones
from .receiver import FIFO_SIZE, Receiver
from .state import packed, unpacked
from .words import moved, register

__all__ = ["PORT", "SIZE", "Serial16550A"]

PORT = 0x3F8
SIZE = 8

# Interrupt enable (8.7)
_IER_RECEIVED, _IER_THRE, _IER_LINE, _IER_MODEM, _IER_ALL = 0x01, 0x02, 0x04, 0x08, 0x0F
# Interrupt identification (8.6), highest priority first
_IIR_LINE, _IIR_RECEIVED, _IIR_TIMEOUT, _IIR_THRE, _IIR_MODEM = 0x06, 0x04, 0x0C, 0x02, 0x00
_IIR_NONE, _IIR_FIFOS = 0x01, 0xC0
# FIFO control (8.5)
_FCR_ENABLE, _FCR_CLEAR_RECEIVER, _FCR_TRIGGER = 0x01, 0x02, 0xC0
_TRIGGER_LEVELS = (1, 4, 8, 14)  # by FCR bits 7 and 6
# Line control (8.1) and line status (8.4)
_LCR_DLAB = 0x80
_LSR_DATA_READY, _LSR_OVERRUN, _LSR_THRE, _LSR_TEMT = 0x01, 0x02, 0x20, 0x40
# Modem control (8.8) and modem status (8.9)
_MCR_DTR, _MCR_RTS, _MCR_OUT1, _MCR_OUT2, _MCR_LOOP, _MCR_ALL = 0x01, 0x02, 0x04, 0x08, 0x10, 0x1F
_MSR_DELTA, _MSR_LINES = 0x0F, 0xF0
_MSR_CTS, _MSR_DSR, _MSR_RI, _MSR_DCD = 0x10, 0x20, 0x40, 0x80
_MSR_CONNECTED = _MSR_CTS | _MSR_DSR | _MSR_DCD
_LOOPED_LINES = (
    (_MCR_RTS, _MSR_CTS),
    (_MCR_DTR, _MSR_DSR),
    (_MCR_OUT1, _MSR_RI),
    (_MCR_OUT2, _MSR_DCD),
)
_STATE = ("_divisor", "_ier", "_fcr", "_lcr", "_mcr", "_scr", "_thre_pending", "_msr", "_line")
_RESET_DIVISOR = 12  # 9600 baud from a PC's 1.8432 MHz; the chip itself starts with any value


class Serial16550A:
    """The register set of a 16550A; 8 ports, each a byte wide.

    `output` gets each byte that the guest sends, at once. `feed` gives the guest bytes to
    receive; besides, `source` is asked for more whenever the guest looks for input (RBR, IIR
    or LSR) and none is buffered: it returns what there is, b"" for nothing, and must not wait.
    `interrupt` is called with the level of the interrupt line each time that it changes; as
    on a PC, MCR bit OUT2 connects the line, and loopback mode disconnects it.

    A 2- or 4-byte access is split into bytes at consecutive offsets, lowest first, as a PC's
    bus does; bytes past the last register read as ones and are dropped when written.
    """

    name = "serial"

    def __init__(
        self,
        output: Callable[[bytes], object],
        source: Callable[[], bytes] | None = None,
        interrupt: Callable[[bool], object] | None = None,
    ) -> None:
        self.output = output
        self.interrupt = interrupt
        self._receiver = Receiver(source)
        self._divisor = _RESET_DIVISOR
        self._ier = self._fcr = self._lcr = self._mcr = self._scr = 0
        self._thre_pending = False
        self._msr = _MSR_CONNECTED
        self._line = False

    def feed(self, data: bytes) -> None:
        """Append bytes for the guest to receive."""
        self._receiver.feed(data)
        self._update_line()

    def describing(self) -> Callable[[int, int, int, bool], str]:
        """Accesses in words, from a reset on; DLAB says what the first two registers are."""
        return _Words().describe

    def save_state(self) -> bytes:
        """The registers and what waits to be received, as JSON."""
        registers = {name: getattr(self, name) for name in _STATE}
        return packed({**registers, "receiver": self._receiver.save()})

    def load_state(self, state: bytes) -> None:
        """Take what `save_state` gave."""
        values = unpacked(state)
        for name in _STATE:
            setattr(self, name, values[name])
        self._receiver.load(values["receiver"])

    def read(self, offset: int, size: int) -> int:
        """Read `size` registers from `offset` on, with the side effects of each."""
        if size == 1 and offset < SIZE:  # nearly every access: not worth a loop
            return _REGISTERS[offset][0](self)
        value = 0
        for index in range(size):
            inside = offset + index < SIZE
            byte = _REGISTERS[offset + index][0](self) if inside else ones(1)
            value |= byte << 8 * index
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write `size` registers from `offset` on."""
        if size == 1 and offset < SIZE:
            _REGISTERS[offset][1](self, value)
            return
        for index in range(min(size, SIZE - offset)):
            _REGISTERS[offset + index][1](self, value >> 8 * index & 0xFF)

    # Offset 0: receiver buffer and transmitter holding register, or the divisor's low byte

    def _read_data(self) -> int:
        if self._lcr & _LCR_DLAB:
            return self._divisor & 0xFF
        self._receiver.poll()
        byte = self._receiver.take()
        self._update_line()
        return byte

    def _write_data(self, value: int) -> None:
        if self._lcr & _LCR_DLAB:
            self._divisor = self._divisor & 0xFF00 | value
            return
        if self._mcr & _MCR_LOOP:
            self._receiver.loop_back(value)
        else:
            self.output(value.to_bytes())
        if self._ier & _IER_THRE:
            # THR fills and empties: an edge-triggered controller must see the line fall and rise.
            self._thre_pending = False
            self._update_line()
            self._thre_pending = True
        self._update_line()

    # Offset 1: interrupt enable, or the divisor's high byte

    def _read_ier(self) -> int:
        return self._divisor >> 8 if self._lcr & _LCR_DLAB else self._ier

    def _write_ier(self, value: int) -> None:
        if self._lcr & _LCR_DLAB:
            self._divisor = self._divisor & 0x00FF | value << 8
            return
        newly = value & ~self._ier
        self._ier = value & _IER_ALL
        if newly & _IER_THRE:
            self._thre_pending = True  # THR is empty: enabling asks at once
        elif not value & _IER_THRE:
            self._thre_pending = False
        self._update_line()

    # Offset 2: interrupt identification when read, FIFO control when written

    def _read_iir(self) -> int:
        self._poll()
        cause = self._cause()
        if cause == _IIR_THRE:
            self._thre_pending = False  # 8.6: reading it as the cause clears it
            self._update_line()
        return cause | (_IIR_FIFOS if self._fcr & _FCR_ENABLE else 0)

    def _write_fcr(self, value: int) -> None:
        new = value & (_FCR_ENABLE | _FCR_TRIGGER) if value & _FCR_ENABLE else 0
        if (new ^ self._fcr) & _FCR_ENABLE or (new and value & _FCR_CLEAR_RECEIVER):
            self._receiver.clear()
        self._fcr = new
        self._receiver.depth = FIFO_SIZE if new else 1
        self._update_line()

    # Offsets 3, 7 and 4: line control, scratch and modem control

    def _read_lcr(self) -> int:
        return self._lcr

    def _write_lcr(self, value: int) -> None:
        self._lcr = value

    def _read_scr(self) -> int:
        return self._scr

    def _write_scr(self, value: int) -> None:
        self._scr = value

    def _read_mcr(self) -> int:
        return self._mcr

    def _write_mcr(self, value: int) -> None:
        self._mcr = value & _MCR_ALL
        self._receiver.looping = bool(value & _MCR_LOOP)
        lines = _MSR_CONNECTED
        if value & _MCR_LOOP:
            lines = sum(status for control, status in _LOOPED_LINES if value & control)
        changed = lines ^ self._msr & _MSR_LINES
        changed &= ~(lines & _MSR_RI)  # 8.9: of RI only the end of a ring is noted
        self._msr = lines | self._msr & _MSR_DELTA | changed >> 4
        self._update_line()

    # Offsets 5 and 6: line and modem status; writing is for factory tests (8.4) and ignored

    def _read_lsr(self) -> int:
        self._poll()
        value = _LSR_THRE | _LSR_TEMT
        if self._receiver.waiting():
            value |= _LSR_DATA_READY
        if self._receiver.overrun:
            value |= _LSR_OVERRUN
            self._receiver.overrun = False
            self._update_line()
        return value

    def _read_msr(self) -> int:
        value = self._msr
        self._msr &= ~_MSR_DELTA
        self._update_line()
        return value

    def _ignore(self, value: int) -> None:
        pass

    def _poll(self) -> None:
        if self._receiver.poll():
            self._update_line()

    def _cause(self) -> int:
        """The identification of the interrupt of the highest priority (8.6)."""
        if self._ier & _IER_LINE and self._receiver.overrun:
            return _IIR_LINE
        if self._ier & _IER_RECEIVED and (waiting := self._receiver.waiting()):
            level = _TRIGGER_LEVELS[self._fcr >> 6]  # without FIFOs FCR is 0: level 1
            return _IIR_RECEIVED if waiting >= level else _IIR_TIMEOUT
        if self._thre_pending:
            return _IIR_THRE
        if self._ier & _IER_MODEM and self._msr & _MSR_DELTA:
            return _IIR_MODEM
        return _IIR_NONE

    def _update_line(self) -> None:
        connected = self._mcr & (_MCR_OUT2 | _MCR_LOOP) == _MCR_OUT2
        level = connected and self._cause() != _IIR_NONE
        if level != self._line:
            self._line = level
            if self.interrupt is not None:
                self.interrupt(level)


_REGISTERS = (  # by offset: how it is read, how it is written
    (Serial16550A._read_data, Serial16550A._write_data),
    (Serial16550A._read_ier, Serial16550A._write_ier),
    (Serial16550A._read_iir, Serial16550A._write_fcr),
    (Serial16550A._read_lcr, Serial16550A._write_lcr),
    (Serial16550A._read_mcr, Serial16550A._write_mcr),
    (Serial16550A._read_lsr, Serial16550A._ignore),
    (Serial16550A._read_msr, Serial16550A._ignore),
    (Serial16550A._read_scr, Serial16550A._write_scr),
)


class _Words:
    """Says in words what an access was: with DLAB set, offsets 0 and 1 are the divisor."""

    def __init__(self) -> None:
        self._dlab = False

    def describe(self, offset: int, size: int, value: int, write: bool) -> str:
        """One access, of those that come in the guest's order."""
        if size == 1 and offset == 0 and not self._dlab:
            return f"{'THR' if write else 'RBR'} {moved(value, size, write, letter=True)}"
        names = _NAMES | (_WRITTEN if write else {}) | (_DIVISOR if self._dlab else {})
        if write and offset <= _LCR < offset + size:
            self._dlab = bool(value >> 8 * (_LCR - offset) & _LCR_DLAB)
        return register(names, offset, size, value, write)


_LCR = 3
_NAMES = dict(enumerate(("RBR", "IER", "IIR", "LCR", "MCR", "LSR", "MSR", "SCR")))
_WRITTEN = {0: "THR", 2: "FCR"}
_DIVISOR = {0: "DLL", 1: "DLM"}
