"""The control bits that the kernel's headers do not name, and unknown bits."""

from kvmpy.x86.flags import CR0, CR4, EFER, RFLAGS, may_be_rflags


def test_efer_bits_by_the_manuals() -> None:
    intel = {"SCE": 0, "LME": 8, "LMA": 10, "NXE": 11}
    amd = {"SVME": 12, "LMSLE": 13, "FFXSR": 14, "TCE": 15, "MCOMMIT": 17}
    amd |= {"INTWB": 18, "UAIE": 20, "AIBRSE": 21}
    assert {bit.name: bit.bit_length() - 1 for bit in EFER} == intel | amd


def test_unknown_bits_are_kept() -> None:
    for flags in (CR0, CR4, EFER, RFLAGS):
        value = flags(1 << 62 | 1)
        assert int(value) == 1 << 62 | 1
        assert int(value | 2) == 1 << 62 | 3
        assert int(value & ~int(flags(1))) == 1 << 62


def test_iopl_is_a_field_of_two_bits() -> None:
    assert RFLAGS.IOPL == 0x3000
    assert (RFLAGS(0x1002) & RFLAGS.IOPL) >> 12 == 1


def test_what_rflags_can_be() -> None:
    assert all(may_be_rflags(word) for word in (2, 0x3202, 0x246, 0x10006))
    assert not any(
        may_be_rflags(word) for word in (0, 0x3200, 0x8002, 0x401002 | 1 << 5, 1 << 32 | 2)
    )
