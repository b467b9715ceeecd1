"""The packet layer and the stub, without KVM and without sockets; hostile bytes included."""

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import AddressError, ConfigError, HostError, UnsupportedError
from kvmpy.gdb.address import Address, listen, parse_address
from kvmpy.gdb.description import NUMBERS, REGISTERS, target_xml
from kvmpy.gdb.packets import PACKET_SIZE, Event, Link, escape, frame, unescape
from kvmpy.gdb.stops import Action, Stop
from kvmpy.gdb.stub import Detach, Kill, NoAcks, Resume, Stub


def events(link: Link, *chunks: bytes) -> list[Event]:
    return [event for chunk in chunks for event in link.feed(chunk)]


# Packets ----------------------------------------------------------------------------------------


@given(st.binary())
def test_what_is_escaped_can_be_framed_and_comes_back(data: bytes) -> None:
    escaped = escape(data)
    assert not set(b"$#*") & set(escaped)
    assert unescape(escaped) == data
    assert events(Link(), frame(escaped)) == [Event("packet", escaped)]


@given(st.binary(max_size=400), st.lists(st.integers(0, 400)))
def test_it_does_not_matter_how_the_bytes_are_cut(data: bytes, cuts: list[int]) -> None:
    stream = frame(b"m0,4") + data + b"#00" + frame(b"g") + b"\x03"
    places = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    chunks = [stream[a:b] for a, b in pairwise(places)]
    whole, parts = Link(), Link()
    assert events(whole, stream) == events(parts, *chunks)


def test_a_bad_checksum_is_refused_and_a_good_one_acknowledged() -> None:
    link = Link()
    assert events(link, b"$g#68") == []
    assert link.take() == b"-"
    assert events(link, b"$g#zz$g#67") == [Event("packet", b"g")]
    assert link.take() == b"-+"
    link.acks = False  # then the transport is trusted
    assert events(link, b"$g#00") == [Event("packet", b"g")]
    assert link.take() == b""


def test_an_interrupt_is_one_only_between_packets() -> None:
    assert events(Link(), b"\x03$X0,1:\x03#" + b"%02x" % (sum(b"X0,1:\x03") & 255)) == [
        Event("interrupt"),
        Event("packet", b"X0,1:\x03"),
    ]


def test_a_packet_that_was_cut_off_gives_way_to_the_next() -> None:
    assert events(Link(), b"$m100,1" + frame(b"?")) == [Event("packet", b"?")]


def test_the_last_packet_is_sent_again_when_gdb_asks_for_it() -> None:
    link = Link()
    link.send(b"OK")
    assert link.take() == b"$OK#9a"
    events(link, b"-" * 10_000)
    assert link.take() == b"$OK#9a"  # once for what came at once
    events(link, b"+")
    assert link.take() == b""


def test_a_packet_of_any_length_takes_no_more_than_one_of_the_most() -> None:
    link = Link()
    for _ in range(100):
        assert events(link, b"$" + b"x" * 10_000 + b"y" * 10_000) == []
        assert events(link, b"z" * 30_000) == []
        assert len(link._data) <= PACKET_SIZE
    assert events(link, b"#00") == [Event("long")]
    assert events(link, frame(b"x" * PACKET_SIZE)) == [Event("packet", b"x" * PACKET_SIZE)]


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_no_bytes_break_the_link(chunks: list[bytes]) -> None:
    link = Link()
    link.send(b"T05")
    for event in events(link, *chunks):
        assert event.kind in ("packet", "interrupt", "long")
    assert len(link.take()) <= 10 * (200 + 7)
    list(link.feed(b"$##00"))
    assert events(link, frame(b"g"))[-1:] == [Event("packet", b"g")]


# The description ----------------------------------------------------------------------------------


def test_the_description_is_xml_that_agrees_with_the_registers() -> None:
    root = ElementTree.fromstring(target_xml())
    found = root.iter("reg")
    listed = {
        (r.get("name"), int(r.get("regnum") or -1), int(r.get("bitsize") or 0)) for r in found
    }
    assert listed == {(one.name, n, one.bits) for n, one in enumerate(REGISTERS)}
    assert [one.name for one in REGISTERS[:18]] == [
        *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
        *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "eflags"),
    ]
    fields = {one.get("name") for one in root.iter("field")}
    assert {"ZF", "IF", "ID", "DAZ"} <= fields


# The stub -----------------------------------------------------------------------------------------


class Fake:
    """A guest of two vCPUs with 64 KiB of memory."""

    physical = False
    count = 2

    def __init__(self) -> None:
        self.ram = bytearray(0x10000)
        self.values = [[bytes(one.size) for one in REGISTERS] for _ in range(2)]
        self.points: dict[tuple[int, int], int] = {}
        self.commands: list[str] = []

    def describe(self, cpu: int) -> str:
        return f"fake {cpu}"

    def read_register(self, cpu: int, number: int) -> bytes:
        return self.values[cpu][number]

    def write_registers(self, cpu: int, values: dict[int, bytes]) -> None:
        for number, value in values.items():
            if len(value) != REGISTERS[number].size:
                raise ConfigError("the wrong size")
            self.values[cpu][number] = value

    def read_memory(self, cpu: int, address: int, size: int) -> bytes:
        assert size <= PACKET_SIZE
        return bytes(self.ram[address : address + size])

    def write_memory(self, cpu: int, address: int, data: bytes) -> None:
        if address + len(data) > len(self.ram):
            raise AddressError("not there")
        self.ram[address : address + len(data)] = data

    def insert(self, cpu: int, kind: int, address: int, size: int) -> None:
        if kind:
            raise UnsupportedError("no #hardware*")
        self.points[kind, address] = size

    def remove(self, kind: int, address: int) -> None:
        self.points.pop((kind, address), None)

    def monitor(self, cpu: int, command: str) -> str:
        self.commands.append(command)
        return f"{command}!\n"


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def stub(fake: Fake) -> Stub:
    return Stub(fake)


def test_registers_of_each_vcpu(stub: Stub, fake: Fake) -> None:
    whole = sum(one.size for one in REGISTERS)
    reply = stub.handle(b"g")
    assert isinstance(reply, bytes)
    assert len(reply) == 2 * whole
    assert stub.handle(b"Hg2") == b"OK"
    assert stub.handle(b"P0=efbeadde00000000") == b"OK"
    assert stub.handle(b"p0") == b"efbeadde00000000"
    assert fake.values[0][0] == bytes(8)
    assert stub.handle(b"P0=ef").startswith(b"E.")  # type: ignore[union-attr]
    assert stub.handle(b"G" + b"01" * whole) == b"OK"
    assert fake.values[1][NUMBERS["efer"]] == b"\1" * 8
    assert stub.handle(b"p%x" % len(REGISTERS)) == b"E01"


def test_memory(stub: Stub, fake: Fake) -> None:
    assert stub.handle(b"M100,3:616263") == b"OK"
    assert stub.handle(b"X103,4:" + escape(b"}#$*")) == b"OK"
    assert fake.ram[0x100:0x107] == b"abc}#$*"
    assert stub.handle(b"m100,4") == b"6162637d"
    assert stub.handle(b"m10000,4") == b"E0e"
    assert stub.handle(b"mffffffffffffffff,ffffffffffffffff") == b"E0e"
    assert len(stub.handle(b"m0,ffffffff")) <= PACKET_SIZE  # type: ignore[arg-type]
    assert stub.handle(b"Mffff,2:0000") == b"E0e"
    assert stub.handle(b"M100,5:00") == b"E01"
    assert stub.handle(b"X0,0:") == b"OK"


def test_breakpoints_that_the_host_lacks(stub: Stub, fake: Fake) -> None:
    assert stub.handle(b"Z0,1000,1") == b"OK"
    assert fake.points == {(0, 0x1000): 1}
    assert stub.handle(b"z0,1000,1") == b"OK"
    assert not fake.points
    assert stub.handle(b"Z1,1000,1") == b"E.no 'hardware'"
    assert stub.handle(b"Z2,1000,4") == b""  # gdb can watch without us
    assert stub.handle(b"Z5,1000,4") == b""


def test_what_resumes(stub: Stub) -> None:
    every = {0: Action("c"), 1: Action("c")}
    assert stub.handle(b"c") == Resume(every)
    assert stub.handle(b"vCont;c") == Resume(every)
    assert stub.handle(b"vCont;s:2;c") == Resume({1: Action("s"), 0: Action("c")})
    assert stub.handle(b"vCont;r10,20:1") == Resume({0: Action("r", 0x10, 0x20)})
    assert stub.handle(b"vCont;C05:2") == Resume({1: Action("c")})
    assert stub.handle(b"s") == Resume({0: Action("s")})
    assert stub.handle(b"Hc2") == b"OK"
    assert stub.handle(b"c") == Resume({1: Action("c")})
    assert stub.handle(b"S05") == Resume({1: Action("s")})
    assert stub.handle(b"c1234") == Resume({1: Action("c")})
    assert stub.target.read_register(1, NUMBERS["rip"]) == b"\x34\x12" + bytes(6)
    assert stub.handle(b"D") == Detach()
    assert stub.handle(b"k") == Kill(b"")
    assert stub.handle(b"vKill;1") == Kill(b"OK")
    assert stub.handle(b"QStartNoAckMode") == NoAcks()


def test_stop_replies(stub: Stub) -> None:
    reply = stub.stopped(Stop(1, 5, "swbreak"))
    assert reply.startswith(b"T0510:")
    assert reply.endswith(b";thread:2;swbreak:;")
    assert stub.handle(b"?") == reply
    assert stub.handle(b"qC") == b"QC2"
    assert stub.stopped(Stop(0, 5, "awatch", 0x1234)).endswith(b"thread:1;awatch:1234;")
    assert stub.stopped(Stop(0, 11)).startswith(b"T0b")


def test_queries(stub: Stub, fake: Fake) -> None:
    assert b"qXfer:features:read+" in stub.handle(b"qSupported:swbreak+")  # type: ignore[operator]
    document, at = b"", 0
    while True:
        part = stub.handle(b"qXfer:features:read:target.xml:%x,100" % at)
        assert isinstance(part, bytes)
        document += unescape(part[1:])
        at = len(document)
        if part[:1] == b"l":
            break
    assert document == target_xml()
    assert stub.handle(b"qXfer:features:read:other.xml:0,10") == b"E00"
    assert stub.handle(b"qfThreadInfo") == b"m1,2"
    assert stub.handle(b"qsThreadInfo") == b"l"
    assert stub.handle(b"T2") == b"OK"
    assert stub.handle(b"T3") == b"E01"
    assert stub.handle(b"qThreadExtraInfo,2") == b"fake 1".hex().encode()
    assert stub.handle(b"qRcmd," + b"help me".hex().encode()) == b"help me!\n".hex().encode()
    assert stub.handle(b"Qqemu.PhyMemMode:1") == b"OK"
    assert fake.physical and stub.handle(b"qqemu.PhyMemMode") == b"1"
    assert stub.handle(b"vMustReplyEmpty") == b""
    assert stub.handle(b"") == b""


COMMAND = st.sampled_from(b"?gGpPmMXHTZzcCsSvDkqQ!RiI\x00\xff".hex(" ").split())
NUMBER = st.one_of(
    st.integers(0, (1 << 64) - 1).map(lambda n: b"%x" % n),
    st.sampled_from([b"", b"-1", b"0", b"f" * 16, b"f" * 17, b"f" * 300, b"0x10", b"1_0", b" 1"]),
)
WORDS = st.sampled_from([
    *(b"Cont", b"Cont?", b"Kill", b"Supported", b"Xfer:features:read:target.xml", b"Rcmd", b"C"),
    *(b"ThreadExtraInfo", b"fThreadInfo", b"StartNoAckMode", b"qemu.PhyMemMode", b"g", b"c", b"r"),
])  # fmt: skip
PIECE = st.one_of(NUMBER, WORDS, st.sampled_from([b",", b":", b";", b"=", b"}"]), st.binary())


@given(COMMAND, st.lists(PIECE, max_size=12))
def test_no_packet_breaks_the_stub(command: str, pieces: list[bytes]) -> None:
    stub = Stub(Fake())
    answer = stub.handle(bytes.fromhex(command) + b"".join(pieces))
    if isinstance(answer, Resume):
        assert answer.actions.keys() <= {0, 1}
    if isinstance(answer, bytes):
        assert not set(b"$#") & set(answer)
        assert len(answer) <= 2 * PACKET_SIZE
    assert isinstance(stub.handle(b"?"), bytes)


# Addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address", "target"),
    [
        ("1234", Address("127.0.0.1", 1234), ":1234"),
        (1234, Address("127.0.0.1", 1234), ":1234"),
        (":1234", Address("127.0.0.1", 1234), ":1234"),  # nobody else can get in unasked
        ("0.0.0.0:5", Address("0.0.0.0", 5), "0.0.0.0:5"),
        ("[::1]:5", Address("::1", 5), "[::1]:5"),
        ("unix:/run/x", Address("", 0, "/run/x"), "/run/x"),
    ],
)
def test_addresses(text: str | int, address: Address, target: str) -> None:
    assert parse_address(text) == address
    assert address.target == target


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "65536", "1:2:x", "unix:", "host:", "\uff19", "unix:a\0"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="gdb address"):
        parse_address(text)


def test_a_taken_port_is_told(tmp_path) -> None:
    first, where = listen(Address("127.0.0.1", 0))
    with first, pytest.raises(HostError, match=f"127.0.0.1:{where.port}: Address already in use"):
        listen(where)
    path = Address("", 0, str(tmp_path / "socket"))
    first, _ = listen(path)
    with first, pytest.raises(HostError, match="already in use"):
        listen(path)
    again, _ = listen(path)  # nobody is there any more
    again.close()
    path.unlink()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HostError, match="already in use"):
        listen(Address("", 0, str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(HostError, match="unix:/nonexistent/x: No such file"):
        listen(Address("", 0, "/nonexistent/x"))
    with pytest.raises(HostError, match="too long"):
        listen(Address("", 0, "/tmp/" + "x" * 200))
