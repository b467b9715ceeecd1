"""Page walks: hand-made tables of each mode, the rights, and KVM's own walk as the judge."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy import KVM, AddressError
from kvmpy.views.linear import linear_reader, read_linear
from kvmpy.views.pages import page_walk, reader
from kvmpy.views.ranges import page_map
from kvmpy.views.state import Processor
from kvmpy.x86 import paging
from kvmpy.x86.flags import CR0, CR4, EFER
from kvmpy.x86.segments import Segment
from kvmpy.x86.state import CPUIDEntry, SpecialRegisters

PAGES = 16
SIZE = PAGES * 4096
LONG = {"cr0": int(CR0.PE | CR0.PG | CR0.WP), "cr4": int(CR4.PAE)}
LONG["efer"] = int(EFER.LMA | EFER.LME | EFER.NXE)


class Ram:
    def __init__(self, size=SIZE):
        self.data = bytearray(size)

    def read(self, address, length):
        end = address + length
        return bytes(self.data[address:end]) if address >= 0 and end <= len(self.data) else None

    def put(self, address, *values, size=8):
        for at, value in enumerate(values):
            packed = value.to_bytes(size, "little")
            self.data[address + at * size : address + (at + 1) * size] = packed


def long_special(**more):
    return SpecialRegisters(**{**LONG, "cr3": 0x1000, **more})


def four(ram, leaf, *, upper=7, index=0):
    """PML4 at 0x1000, PDPT at 0x2000, PD at 0x3000, PT at 0x4000; the page at `index`."""
    ram.put(0x1000, 0x2000 | upper)
    ram.put(0x2000, 0x3000 | 7)
    ram.put(0x3000, 0x4000 | 7)
    ram.put(0x4000 + 8 * index, leaf)


def test_four_levels_to_a_page():
    ram = Ram()
    four(ram, 0x5000 | 7, index=3)
    walk = page_walk(ram.read, long_special(), 0x3123)
    assert (walk.mode, walk.end, walk.physical, walk.page_size) == ("4-level", "page", 0x5123, 4096)
    assert [entry.name for entry in walk.entries] == ["PML4", "PDPT", "PD", "PT"]
    assert walk.entries[3].address == 0x4018 and walk.entries[3].value == 0x5007
    assert walk.in_ram and walk.writable and walk.user and walk.executable and walk.allowed
    ram.put(0x4018, (1 << 40) | 7)
    far = page_walk(ram.read, long_special(), 0x3123)
    assert far.physical == (1 << 40) + 0x123 and not far.in_ram and far.allowed


def test_five_levels_and_their_canonical_form():
    ram = Ram()
    special = long_special(cr4=int(CR4.PAE | CR4.LA57), cr3=0x6000)
    four(ram, 0x5000 | 7)
    linear = 0x7 << 48
    ram.put(0x6000 + 8 * 7, 0x1000 | 7)
    walk = page_walk(ram.read, special, linear)
    assert walk.mode == "5-level" and walk.entries[0].name == "PML5" and walk.physical == 0x5000
    assert page_walk(ram.read, special, 1 << 56).end == "not canonical"
    assert page_walk(ram.read, long_special(), linear).end == "not canonical"
    assert page_walk(ram.read, long_special(), 0xFFFF_8000_0000_0000).end == "not present"
    assert "#GP" in page_walk(ram.read, long_special(), 1 << 47).why


@pytest.mark.parametrize("address", [-1, 1 << 64])
def test_what_is_no_address(address):
    with pytest.raises(AddressError, match="64-bit"):
        page_walk(Ram().read, long_special(), address)


@pytest.mark.parametrize(
    ("table", "name", "size"), [(0x2000, "PDPT", 1 << 30), (0x3000, "PD", 2 << 20)]
)
def test_large_pages_and_their_reserved_bits(table, name, size):
    ram = Ram()
    four(ram, 0)
    ram.put(table, 4 * size | 0x87 | 1 << 12)  # bit 12 is PAT there
    walk = page_walk(ram.read, long_special(), 0x12345)
    assert walk.page_size == size and walk.physical == 4 * size + 0x12345
    assert walk.entries[-1].large and walk.entries[-1].name == name
    ram.put(table, 4 * size | 0x87 | 1 << 13)
    walk = page_walk(ram.read, long_special(), 0x12345, "write")
    assert walk.end == "reserved bit" and walk.entries[-1].problem == "reserved bit 13 set"
    assert walk.error_code == 0b1011 and not walk.allowed


def test_a_processor_without_pages_of_1_gib():
    ram = Ram()
    four(ram, 0x5000 | 7)
    ram.put(0x2000, 0x87)
    assert page_walk(ram.read, long_special(), 0).physical == 0
    walk = page_walk(ram.read, long_special(), 0, gigabyte_pages=False)
    assert walk.entries[-1].problem == "reserved bit 7 set" and walk.error_code == 9
    (one,) = page_map(ram.read, long_special(), gigabyte_pages=False).ranges
    assert one.problem and one.size == 1 << 30
    leaves = [CPUIDEntry(0x8000_0008, eax=0x3030), CPUIDEntry(0x8000_0001, edx=1 << 26)]
    assert Processor.of(leaves) == (48, True) and Processor.of([]) == (36, False)


def test_reserved_bits_of_entries():
    ram = Ram()
    four(ram, 0x5000 | 7)
    ram.put(0x1000, 0x2000 | 0x87)  # no large pages at the PML4
    assert page_walk(ram.read, long_special(), 0).entries[-1].problem == "reserved bit 7 set"
    four(ram, 0x5000 | 7 | 1 << 63)
    assert page_walk(ram.read, long_special(), 0).end == "page"
    without = long_special(efer=int(EFER.LMA | EFER.LME))
    assert page_walk(ram.read, without, 0).entries[-1].problem == "reserved bit 63 set"
    four(ram, 0x5000 | 7 | 1 << 46)
    assert page_walk(ram.read, long_special(), 0).end == "page"
    assert page_walk(ram.read, long_special(), 0, physical_bits=46).end == "reserved bit"
    ram.put(0x4000, 0x5000 | 6 | 1 << 51)  # not present comes first
    assert page_walk(ram.read, long_special(), 0, physical_bits=46).end == "not present"


def test_tables_outside_of_ram():
    ram = Ram()
    four(ram, 0)
    ram.put(0x2000, 0x7777_0000 | 7)
    walk = page_walk(ram.read, long_special(), 0x20_0000)
    assert walk.end == "outside RAM" and walk.entries[-1].address == 0x7777_0008
    assert walk.entries[-1].value is None and walk.error_code is None and "PD entry" in walk.why
    gone = page_walk(ram.read, long_special(cr3=1 << 40), 0)
    assert gone.end == "outside RAM" and len(gone.entries) == 1


RIGHTS = [
    # leaf, cpl, access, special, allowed, error code
    (0x7, 3, "write", {}, True, None),
    (0x5, 3, "write", {}, False, 0b111),
    (0x5, 0, "write", {}, False, 0b011),
    (0x5, 0, "write", {"cr0": int(CR0.PE | CR0.PG)}, True, None),
    (0x3, 3, "read", {}, False, 0b101),
    (0x3, 3, "fetch", {}, False, 0b10101),
    (0x7 | 1 << 63, 3, "fetch", {}, False, 0b10101),
    (0x7 | 1 << 63, 0, "fetch", {}, False, 0b10001),
    (0x7, 0, "fetch", {"cr4": int(CR4.PAE | CR4.SMEP)}, False, 0b10001),
    (0x7, 3, "fetch", {"cr4": int(CR4.PAE | CR4.SMEP)}, True, None),
    (0x3, 0, "fetch", {"cr4": int(CR4.PAE | CR4.SMEP)}, True, None),
    (0x7, 0, "read", {"cr4": int(CR4.PAE | CR4.SMAP)}, False, 0b001),
    (0x7, 0, "write", {"cr4": int(CR4.PAE | CR4.SMAP)}, False, 0b011),
    (0x7, 0, "fetch", {"cr4": int(CR4.PAE | CR4.SMAP)}, True, None),
    (0x7, 3, "read", {"cr4": int(CR4.PAE | CR4.SMAP)}, True, None),
]


@pytest.mark.parametrize(("leaf", "cpl", "access", "more", "allowed", "code"), RIGHTS)
def test_rights(leaf, cpl, access, more, allowed, code):
    ram = Ram()
    four(ram, 0x5000 | leaf)
    walk = page_walk(ram.read, long_special(**more), 0, access, cpl=cpl)
    assert (walk.allowed, walk.error_code) == (allowed, code), walk.why
    assert ("#PF" in walk.why) is not allowed


def test_rights_are_those_of_all_levels():
    ram = Ram()
    four(ram, 0x5000 | 7, upper=1 | 1 << 63)
    walk = page_walk(ram.read, long_special(), 0)
    assert (walk.writable, walk.user, walk.executable) == (False, False, False)


def test_rflags_ac_lifts_smap():
    ram = Ram()
    four(ram, 0x5000 | 7)
    special = long_special(cr4=int(CR4.PAE | CR4.SMAP))
    assert page_walk(ram.read, special, 0, ac=True).allowed


def test_the_ring_is_that_of_ss():
    ram = Ram()
    four(ram, 0x5000 | 3)
    user = long_special(ss=Segment.data(0x2B, dpl=3))
    assert page_walk(ram.read, user, 0).cpl == 3 and not page_walk(ram.read, user, 0).allowed
    assert page_walk(ram.read, long_special(), 0).cpl == 0


def test_two_levels():
    ram = Ram()
    special = SpecialRegisters(cr0=int(CR0.PE | CR0.PG), cr3=0x1018, efer=int(EFER.NXE))
    ram.put(0x1000 + 4 * 1, 0x2000 | 7, size=4)
    ram.put(0x2000 + 4 * 0x3FF, 0x3000 | 5, size=4)
    walk = page_walk(ram.read, special, 0x7F_F123)
    assert (walk.mode, walk.physical, walk.writable) == ("2-level", 0x3123, False)
    assert page_walk(ram.read, special, 0xABCD_007F_F123).physical == 0x3123  # wraps
    # A large page only with CR4.PSE; bits 20..13 are 39..32 of its address.
    special.cr4 = int(CR4.PSE)
    ram.put(0x1000, 0x40_0000 | 0x83 | 3 << 13, size=4)
    walk = page_walk(ram.read, special, 0x12345)
    assert walk.physical == 3 << 32 | 0x41_2345 and walk.page_size == 4 << 20
    assert page_walk(ram.read, special, 0, physical_bits=33).end == "reserved bit"
    ram.put(0x1000, 0x40_0000 | 0x83 | 1 << 21, size=4)
    assert page_walk(ram.read, special, 0).end == "reserved bit"
    special.cr4 = 0
    assert page_walk(ram.read, special, 0).entries[0].large is False


def test_pae():
    ram = Ram()
    special = SpecialRegisters(cr0=int(CR0.PE | CR0.PG), cr4=int(CR4.PAE), cr3=0x1020)
    ram.put(0x1020 + 8 * 3, 0x2000 | 1)  # no rights there: those below decide
    ram.put(0x2000 + 8 * 0x1FF, 0x3000 | 7)
    ram.put(0x3000 + 8 * 0x1FF, 0x4000 | 7)
    walk = page_walk(ram.read, special, 0xFFFF_F008)
    assert (walk.mode, walk.physical, len(walk.entries)) == ("PAE", 0x4008, 3)
    assert walk.writable and walk.user and walk.executable
    ram.put(0x1020 + 8 * 3, 0x2000 | 3)  # R/W is reserved in a PDPTE
    assert page_walk(ram.read, special, 0xFFFF_F008).end == "reserved bit"
    ram.put(0x1020 + 8 * 3, 0x2000 | 1)
    ram.put(0x3000 + 8 * 0x1FF, 0x4000 | 7 | 1 << 55)  # ignored in long mode, reserved here
    assert page_walk(ram.read, special, 0xFFFF_F008).end == "reserved bit"


def test_without_paging():
    walk = page_walk(Ram().read, SpecialRegisters(), 0x1_0000_1234)
    assert (walk.end, walk.physical, walk.in_ram) == ("no paging", 0x1234, True)
    assert not page_walk(Ram().read, SpecialRegisters(), SIZE).in_ram


def test_reading_linear_addresses_ends_where_the_mapping_does():
    ram = Ram()
    four(ram, 0x5000 | 7)
    ram.put(0x4008, 0x9000 | 7)
    ram.data[0x5FFE:0x6000], ram.data[0x9000:0x9002] = b"ab", b"cd"
    special = long_special()
    assert read_linear(ram.read, special, 0xFFE, 4) == b"abcd"
    assert len(read_linear(ram.read, special, 0xFFE, 1 << 20)) == 0x1002
    assert linear_reader(ram.read, special)(0x1FFF, 2) is None
    assert linear_reader(ram.read, special)((1 << 64) - 1, 1) is None


# Random tables: an entry leads to some page of a small RAM, or a little beside it.
entries = st.builds(
    lambda page, flags, high: page << 12 | flags | high,
    st.integers(0, PAGES + 1),
    st.sampled_from([7, 7, 7, 3, 5, 1, 0, 0x87, 0x83, 0x27, 0x67, 0xE7]),
    st.sampled_from([0] * 12 + [1 << 63, 1 << 51, 1 << 20, 1 << 30, 5 << 52]),
)
indices = st.integers(0, 3)
linears = st.builds(
    lambda a, b, c, d, offset: a << 39 | b << 30 | c << 21 | d << 12 | offset,
    *[indices] * 4,
    st.integers(0, 4095),
)
tables = st.lists(st.lists(entries, min_size=4, max_size=4), min_size=PAGES, max_size=PAGES)


def fill(ram, rows):
    for page, row in enumerate(rows):
        ram.put(page * 4096, *row)


@given(tables, linears, st.integers(0, PAGES - 1))
@settings(max_examples=100, deadline=None)
def test_as_the_other_walker_walks(rows, linear, root):
    """kvmpy.x86.paging has a walk of its own, which knows no reserved bits."""
    ram = Ram((PAGES + 2) * 4096)
    fill(ram, rows)
    walk = page_walk(ram.read, long_special(cr3=root << 12), linear)
    other = paging.walk(
        lambda at: struct.unpack("<Q", ram.read(at, 8) or bytes(8))[0], root << 12, linear
    )
    seen = [(entry.address, entry.value or 0) for entry in walk.entries]
    assert seen == [(level.address, level.entry) for level in other.levels][: len(seen)]
    if walk.end == "page":
        assert (walk.physical, walk.page_size) == (other.physical, other.page_size)
        flags = paging.PageFlags
        assert walk.writable == bool(other.flags & flags.WRITE)
        assert walk.user == bool(other.flags & flags.USER)
        assert walk.executable == (not other.flags & flags.NX)
    elif walk.end != "reserved bit":
        assert other.physical is None


@pytest.fixture(scope="module")
def translating():
    """A vCPU in long mode whose RAM is all tables."""
    with KVM() as kvm, kvm.create_vm() as vm:
        ram = vm.add_memory(0, SIZE)
        vcpu = vm.create_vcpu()
        leaves = kvm.get_supported_cpuid()
        vcpu.set_cpuid2(leaves)
        kind = Processor.of(leaves)._asdict()
        special = vcpu.get_sregs()
        special.cs, special.cr3 = Segment.code64(8), 0
        special.cr0, special.cr4, special.efer = LONG["cr0"], LONG["cr4"], LONG["efer"]
        special.ss = Segment.data(16)
        vcpu.set_sregs(special)
        yield ram, vcpu, kind


@given(tables, linears, st.integers(0, PAGES - 1))
@settings(max_examples=80, deadline=None)
def test_as_kvm_translates(translating, rows, linear, root):
    """KVM_TRANSLATE looks at no rights, but at reserved bits."""
    ram, vcpu, kind = translating
    for page, row in enumerate(rows):
        ram.write(page * 4096, struct.pack("<4Q", *row))
    special = vcpu.get_sregs()
    special.cr3 = root << 12
    vcpu.set_sregs(special)
    walk = page_walk(reader(ram.read), special, linear, **kind)
    assert vcpu.translate(linear).physical == walk.physical, walk
