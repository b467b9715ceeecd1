"""The 16550A, register by register; the numbers are the data sheet's, written out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.devices import Serial16550A, serial

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FCR = IIR
OUT2, LOOP = 0x08, 0x10
NONE, MODEM, THRE, RECEIVED, LINE, TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C


class Port(Serial16550A):
    """A serial port with byte-wide shorthands that records its output and its line."""

    def __init__(self, source=None):
        self.sent = bytearray()
        self.levels = []
        super().__init__(self.sent.extend, source, self.levels.append)

    def get(self, offset):
        return self.read(offset, 1)

    def put(self, offset, value):
        self.write(offset, 1, value)

    def send(self, data):
        for byte in data:
            self.put(DATA, byte)

    def receive(self):
        data = bytearray()
        while self.get(LSR) & 0x01:
            data.append(self.get(DATA))
        return bytes(data)


def test_where_a_pc_has_it():
    assert (serial.PORT, serial.SIZE, Serial16550A.name) == (0x3F8, 8, "serial")


def test_registers_after_reset():
    port = Port()
    assert [port.get(offset) for offset in range(8)] == [0, 0, 0x01, 0, 0, 0x60, 0xB0, 0]
    assert port.levels == []


@pytest.mark.parametrize(
    ("offset", "kept"), [(IER, 0x0F), (LCR, 0xFF), (MCR, 0x1F), (SCR, 0xFF), (LSR, 0), (MSR, 0)]
)
def test_which_bits_a_register_keeps(offset, kept):
    port = Port()
    before = port.get(offset)
    port.put(offset, 0xFF)
    assert port.get(offset) == (kept or before)


def test_output_is_immediate_and_all_eight_bits():
    port = Port()
    for byte in range(256):
        port.put(DATA, byte)
        assert port.sent[-1] == byte
        assert port.get(LSR) == 0x60
    assert port.sent == bytes(range(256))


def test_the_divisor_latch_is_behind_dlab():
    port = Port()
    port.put(LCR, 0x83)
    assert port.read(DATA, 2) == 12
    port.put(DATA, 0x80)
    port.put(IER, 0x25)
    assert port.read(DATA, 2) == 0x2580
    port.put(LCR, 0x03)
    assert port.get(IER) == 0
    assert port.sent == b""
    port.put(IER, 0x05)
    port.put(LCR, 0x83)
    assert port.read(DATA, 2) == 0x2580
    port.put(DATA, 0x01)
    assert port.read(DATA, 2) == 0x2501
    port.put(LCR, 0x03)
    assert port.get(IER) == 0x05


def test_reading_the_divisor_takes_no_input():
    port = Port(source=lambda: pytest.fail("asked"))
    port.put(LCR, 0x80)
    port.get(DATA)
    port.feed(b"x")
    port.get(DATA)
    port.put(LCR, 0x00)
    assert port.get(DATA) == ord("x")


def test_wide_accesses_are_bytes_at_consecutive_offsets():
    port = Port()
    port.write(DATA, 2, 0x0541)
    assert port.sent == b"A"
    assert port.get(IER) == 0x05
    port.write(LCR, 4, 0xFFFF_0B03)
    assert (port.get(LCR), port.get(MCR), port.get(LSR)) == (0x03, 0x0B, 0x60)
    port.feed(b"z")
    assert port.read(DATA, 4) == 0x03_01_05_7A


def test_nothing_is_past_the_last_register():
    port = Port()
    port.write(SCR, 4, 0x1234_5642)
    assert port.read(SCR, 4) == 0xFFFF_FF42
    assert port.read(MSR, 4) == 0xFFFF_42B0
    assert port.get(DATA) == 0


@given(st.lists(st.binary(max_size=40)), st.booleans())
def test_input_keeps_its_order_and_is_never_lost(pieces, fifos):
    port = Port()
    port.put(FCR, 0xC1 if fifos else 0)
    received = b""
    for index, piece in enumerate(pieces):
        port.feed(piece)
        if index % 3 == 0 and port.get(LSR) & 0x01:
            received += bytes([port.get(DATA)])
    received += port.receive()
    assert received == b"".join(pieces)
    assert port.get(LSR) == 0x60


def test_an_empty_receiver_reads_as_zero():
    port = Port()
    port.feed(b"\xff")
    assert port.get(DATA) == 0xFF
    assert port.get(DATA) == 0


def test_clearing_the_fifo_does_not_lose_host_input():
    port = Port()
    port.feed(b"typed ahead")
    port.put(FCR, 0xC7)
    assert port.receive() == b"typed ahead"


def test_the_source_is_asked_only_when_the_guest_looks_and_nothing_waits():
    asked = []
    pieces = [b"ab", b"", b"c"]

    def source():
        asked.append(True)
        return pieces.pop(0) if pieces else b""

    port = Port(source)
    port.put(LCR, 0x03)
    port.send(b"out")
    for offset in (IER, LCR, MCR, MSR, SCR):
        port.get(offset)
    assert len(asked) == 0
    assert port.get(LSR) == 0x61
    assert port.get(LSR) == 0x61
    assert len(asked) == 1
    assert port.get(DATA) == ord("a")
    assert port.get(DATA) == ord("b")
    assert len(asked) == 1
    assert port.get(LSR) == 0x60
    assert port.get(DATA) == ord("c")
    assert len(asked) == 3


def test_the_source_raises_the_interrupt_where_the_guest_polls_iir():
    port = Port(source=lambda: b"x")
    port.put(MCR, OUT2)
    port.put(IER, 0x01)
    assert port.levels == []
    assert port.get(IIR) == RECEIVED
    assert port.levels == [True]


@given(st.binary(max_size=16))
def test_loopback_receives_what_is_sent(data):
    port = Port()
    port.put(FCR, 0x01)
    port.put(MCR, LOOP)
    port.send(data)
    assert port.receive() == data
    assert port.sent == b""
    port.put(MCR, 0)
    port.send(data)
    assert port.sent == data


def test_loopback_keeps_host_input_out():
    """Drivers test the chip with one looped-back byte; input that came early must not break it."""
    port = Port(source=lambda: pytest.fail("asked"))
    port.feed(b"early")
    port.put(MCR, LOOP | 0x0E)
    assert port.get(LSR) == 0x60
    port.put(DATA, 0xAE)
    assert port.get(DATA) == 0xAE
    assert port.get(DATA) == 0
    port.source = None
    port.put(DATA, ord("!"))
    port.put(MCR, 0x0F)
    assert bytes(port.get(DATA) for _ in range(6)) == b"!early"


def test_loopback_overrun_without_fifos_keeps_the_newest():
    port = Port()
    port.put(MCR, LOOP)
    port.send(b"ab")
    assert port.get(LSR) == 0x63
    assert port.get(LSR) == 0x61
    assert port.receive() == b"b"


def test_loopback_overrun_with_fifos_keeps_the_oldest():
    port = Port()
    port.put(FCR, 0x01)
    port.put(MCR, LOOP)
    port.send(bytes(range(16)))
    assert port.get(LSR) == 0x61
    port.send(b"\xff")
    assert port.get(LSR) == 0x63
    assert port.receive() == bytes(range(16))


@pytest.mark.parametrize(("before", "control"), [(0x01, 0x03), (0x01, 0x00), (0x00, 0x01)])
def test_clearing_or_switching_the_fifos_drops_what_was_looped_back(before, control):
    port = Port()
    port.put(FCR, before)
    port.put(MCR, LOOP)
    port.send(b"a")
    port.put(FCR, control)
    assert port.get(LSR) == 0x60


@pytest.mark.parametrize("control", [0x02, 0xC6, 0xFE])
def test_fifo_control_without_the_enable_bit_does_nothing(control):
    port = Port()
    port.put(MCR, LOOP)
    port.send(b"a")
    port.put(FCR, control)
    assert port.get(IIR) == NONE
    assert port.receive() == b"a"


def test_iir_tells_that_the_fifos_are_on():
    port = Port()
    port.put(FCR, 0x07)
    assert port.get(IIR) == 0xC0 | NONE
    port.put(FCR, 0x00)
    assert port.get(IIR) == NONE


@pytest.mark.parametrize(
    ("control", "status"),
    [(0x00, 0x00), (0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80), (0x0A, 0x90)],
)
def test_loopback_connects_the_modem_lines(control, status):
    port = Port()
    port.put(MCR, LOOP | control)
    assert port.get(MSR) & 0xF0 == status


def test_modem_status_notes_changes_until_it_is_read():
    port = Port()
    port.put(MCR, LOOP | 0x0F)
    assert port.get(MSR) == 0xF0  # CTS, DSR and DCD as before; that RI came on is not noted
    port.put(MCR, LOOP)
    assert port.get(MSR) == 0x0F
    assert port.get(MSR) == 0x00
    port.put(MCR, 0)
    assert port.get(MSR) == 0xBB


def test_modem_status_changes_add_up():
    port = Port()
    port.put(MCR, LOOP | 0x03)  # DCD goes
    port.put(MCR, LOOP | 0x02)  # DSR goes
    assert port.get(MSR) == 0x1A


def test_received_data_interrupt_follows_the_data():
    port = Port()
    port.put(MCR, OUT2)
    port.put(IER, 0x01)
    port.feed(b"ab")
    assert port.levels == [True]
    assert port.get(IIR) == RECEIVED
    port.get(DATA)
    assert port.levels == [True]
    port.get(DATA)
    assert port.levels == [True, False]
    assert port.get(IIR) == NONE


@pytest.mark.parametrize(("control", "level"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_trigger_level_and_character_timeout(control, level):
    port = Port()
    port.put(FCR, control)
    port.put(MCR, OUT2)
    port.put(IER, 0x01)
    for count in range(1, 17):
        port.feed(b"x")
        assert port.get(IIR) == 0xC0 | (RECEIVED if count >= level else TIMEOUT)
    for count in range(15, -1, -1):
        port.get(DATA)
        expected = RECEIVED if count >= level else TIMEOUT
        assert port.get(IIR) == 0xC0 | (expected if count else NONE)
    assert port.levels == [True, False]


def test_enabling_the_thre_interrupt_asks_at_once_and_reading_iir_clears_it():
    port = Port()
    port.put(MCR, OUT2)
    port.put(IER, 0x02)
    assert port.levels == [True]
    assert port.get(IIR) == THRE
    assert port.levels == [True, False]
    assert port.get(IIR) == NONE
    port.put(IER, 0x03)
    assert port.get(IIR) == NONE
    port.put(IER, 0x00)
    port.put(IER, 0x02)
    assert port.get(IIR) == THRE


def test_each_byte_sent_is_an_edge_on_the_line():
    port = Port()
    port.put(MCR, OUT2)
    port.put(IER, 0x02)
    port.levels.clear()
    port.send(b"ab")
    assert port.levels == [False, True, False, True]
    assert port.get(IIR) == THRE


def test_disabling_the_thre_interrupt_takes_it_back():
    port = Port()
    port.put(MCR, OUT2)
    port.put(IER, 0x02)
    port.put(IER, 0x00)
    assert port.levels == [True, False]
    port.send(b"a")
    assert port.get(IIR) == NONE


def test_interrupts_come_in_order_of_priority():
    port = Port()
    port.put(IER, 0x0F)
    port.put(MCR, LOOP)  # modem lines change
    port.send(b"ab")  # an overrun, and THR is empty
    assert port.get(IIR) == LINE
    assert port.get(LSR) & 0x02
    assert port.get(IIR) == RECEIVED
    assert port.get(IIR) == RECEIVED
    port.get(DATA)
    assert port.get(IIR) == THRE
    assert port.get(IIR) == MODEM
    port.get(MSR)
    assert port.get(IIR) == NONE
    assert port.levels == []


@pytest.mark.parametrize("source", [0x01, 0x02, 0x04, 0x08])
def test_an_interrupt_that_is_not_enabled_does_not_show(source):
    port = Port()
    port.put(MCR, LOOP)
    port.send(b"ab")
    port.put(IER, 0x0F & ~source)
    cause = {0x01: RECEIVED, 0x02: THRE, 0x04: LINE, 0x08: MODEM}[source]
    answer = {LINE: LSR, RECEIVED: DATA, MODEM: MSR}
    seen = []
    while (current := port.get(IIR)) != NONE:
        seen.append(current)
        if current != THRE:  # which reading IIR has cleared
            port.get(answer[current])
    assert cause not in seen
    assert len(seen) == 3


def test_out2_connects_the_line_and_loopback_disconnects_it():
    port = Port()
    port.put(IER, 0x01)
    port.feed(b"x")
    assert port.levels == []
    port.put(MCR, OUT2)
    assert port.levels == [True]
    port.put(MCR, 0x07)
    assert port.levels == [True, False]
    port.put(MCR, OUT2)
    port.put(MCR, OUT2 | LOOP)
    assert port.levels == [True, False, True, False]


def test_loopback_disconnects_the_line_whatever_the_cause():
    port = Port()
    port.put(MCR, OUT2)
    port.put(IER, 0x02)
    port.put(MCR, OUT2 | LOOP)
    assert port.levels == [True, False]
    assert port.get(IIR) == THRE


@pytest.mark.parametrize(
    ("enable", "offset", "expected"),
    [(0x08, MSR, 0xB3), (0x04, LSR, 0x63), (0x01, DATA, ord("b")), (0x02, IIR, THRE)],
)
def test_reading_the_register_that_tells_the_cause_lowers_the_line(enable, offset, expected):
    port = Port()
    port.put(MCR, LOOP | OUT2)
    port.send(b"ab")  # an overrun
    port.put(IER, enable)
    port.put(MCR, OUT2)  # modem lines change
    assert port.levels == [True]
    assert port.get(offset) == expected
    assert port.levels == [True, False]


def test_clearing_the_fifo_lowers_the_line():
    port = Port()
    port.put(FCR, 0x01)
    port.put(IER, 0x01)
    port.put(MCR, LOOP)
    port.send(b"a")
    port.put(MCR, OUT2)
    assert port.levels == [True]
    port.put(FCR, 0x03)
    assert port.levels == [True, False]


accesses = st.tuples(
    st.integers(0, 7),
    st.sampled_from([1, 2, 4]),
    st.none() | st.integers(0, 0xFFFF_FFFF) | st.binary(max_size=20),
)


@given(st.lists(accesses, max_size=60))
def test_any_accesses_give_answers_that_fit_and_a_line_that_alternates(accesses):
    port = Port()
    for offset, size, value in accesses:
        if value is None:
            assert 0 <= port.read(offset, size) < 1 << 8 * size
        elif isinstance(value, bytes):
            port.feed(value)
        else:
            port.write(offset, size, value % (1 << 8 * size))
        # The line is a function of what the registers show.
        assert port.levels == [index % 2 == 0 for index in range(len(port.levels))]
        raised = bool(port.levels) and port.levels[-1]
        connected = port.get(MCR) & (OUT2 | LOOP) == OUT2
        assert not raised or connected
        assert raised == (connected and not port.get(IIR) & 0x01)
        port.levels[:] = port.levels[-1:] if port.levels[-1:] == [True] else []


@given(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 255))), st.binary(max_size=50))
def test_no_state_loses_output_or_input(writes, data):
    port = Port()
    for offset, value in writes:
        port.put(offset, value)
    port.put(LCR, 0x03)
    port.put(MCR, 0x0B)
    port.feed(data)
    port.send(data)
    assert port.sent == data
    assert port.receive() == data
