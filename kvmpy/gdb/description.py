"""The registers as gdb sees them: one target description of an amd64 processor.

`org.gnu.gdb.i386.core`, `.sse` and `.segments` are gdb's (GDB manual, G.5.7 "i386 Features"), the
feature `kvmpy.system` is ours: hidden parts of segments, tables, control registers. A register's
number is its place in `REGISTERS`.
"""

from functools import lru_cache
from typing import Final, NamedTuple

__all__ = ["NUMBERS", "REGISTERS", "RIP", "RSP", "Register", "target_xml"]


class Register(NamedTuple):
    """One register: where it belongs (`group`) and how gdb shows it (`type`)."""

    name: str
    bits: int
    type: str
    feature: str
    group: str

    @property
    def size(self) -> int:
        """Its bytes in packets."""
        return self.bits // 8


_CORE, _SSE = "org.gnu.gdb.i386.core", "org.gnu.gdb.i386.sse"
_SEGMENTS, _SYSTEM = "org.gnu.gdb.i386.segments", "kvmpy.system"
_GENERAL = (
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rbp",
    "rsp",
    *(f"r{n}" for n in range(8, 16)),
)
_POINTERS: Final = ("rbp", "rsp")
_CONTROL_WORDS = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs")

REGISTERS: Final = (
    *(
        Register(name, 64, "data_ptr" if name in _POINTERS else "int64", _CORE, "general")
        for name in _GENERAL
    ),
    Register("rip", 64, "code_ptr", _CORE, "general"),
    Register("eflags", 32, "i386_eflags", _CORE, "general"),
    *(Register(name, 32, "int32", _CORE, "selector") for name in SEGMENTS),
    *(Register(f"st{n}", 80, "i387_ext", _CORE, "float") for n in range(8)),
    *(Register(name, 32, "int", _CORE, "float") for name in _CONTROL_WORDS),
    *(Register(f"xmm{n}", 128, "vec128", _SSE, "vector") for n in range(16)),
    Register("mxcsr", 32, "i386_mxcsr", _SSE, "vector"),
    Register("fs_base", 64, "int64", _SEGMENTS, "base"),
    Register("gs_base", 64, "int64", _SEGMENTS, "base"),
    *(Register(f"{name}_base", 64, "int64", _SYSTEM, "base") for name in SEGMENTS[:4]),
    *(Register(name, 32, "int32", _SYSTEM, "selector") for name in ("tr", "ldt")),
    *(Register(f"{name}_base", 64, "int64", _SYSTEM, "base") for name in ("tr", "ldt")),
    *(Register(f"{name}_base", 64, "int64", _SYSTEM, "table") for name in ("gdt", "idt")),
    *(Register(f"{name}_limit", 32, "int32", _SYSTEM, "table") for name in ("gdt", "idt")),
    # Plain numbers: to a type of flags gdb refuses to assign an int ("Invalid cast").
    *(
        Register(name, 64, "int64", _SYSTEM, "control")
        for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
    ),
)
"""Every register, in the order of the packets g and G."""

NUMBERS: Final = {register.name: number for number, register in enumerate(REGISTERS)}
RIP: Final = NUMBERS["rip"]
RSP: Final = NUMBERS["rsp"]

_EFLAGS = {
    "": 1, "CF": 0, "PF": 2, "AF": 4, "ZF": 6, "SF": 7, "TF": 8, "IF": 9, "DF": 10, "OF": 11,
    "NT": 14, "RF": 16, "VM": 17, "AC": 18, "VIF": 19, "VIP": 20, "ID": 21,
}  # fmt: skip
_MXCSR = dict(zip(("IE", "DE", "ZE", "OE", "UE", "PE", "DAZ", "IM", "DM", "ZM", "OM", "UM", "PM"),
                  range(13), strict=True)) | {"FZ": 15}  # fmt: skip
_VEC128 = """<vector id="v4f" type="ieee_single" count="4"/>
<vector id="v2d" type="ieee_double" count="2"/>
<vector id="v16i8" type="int8" count="16"/>
<vector id="v8i16" type="int16" count="8"/>
<vector id="v4i32" type="int32" count="4"/>
<vector id="v2i64" type="int64" count="2"/>
<union id="vec128">
<field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/>
<field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/>
<field name="v4_int32" type="v4i32"/><field name="v2_int64" type="v2i64"/>
<field name="uint128" type="uint128"/>
</union>"""


def _flags(name: str, size: int, bits: dict[str, int]) -> str:
    fields = "".join(f'<field name="{n}" start="{b}" end="{b}"/>' for n, b in bits.items())
    return f'<flags id="{name}" size="{size}">{fields}</flags>'


def _types(feature: str) -> str:
    if feature == _CORE:
        return _flags("i386_eflags", 4, _EFLAGS)
    if feature == _SSE:
        return _VEC128 + _flags("i386_mxcsr", 4, _MXCSR)
    return ""


@lru_cache(maxsize=1)
def target_xml() -> bytes:
    """The description as XML, in ASCII."""
    parts = [
        '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd">',
        '<target version="1.0"><architecture>i386:x86-64</architecture>',
    ]
    for feature in (_CORE, _SSE, _SEGMENTS, _SYSTEM):
        parts.append(f'<feature name="{feature}">{_types(feature)}')
        parts += [
            f'<reg name="{one.name}" bitsize="{one.bits}" type="{one.type}" regnum="{number}"'
            + (f' group="{one.group}"/>' if one.group in ("float", "vector") else "/>")
            for number, one in enumerate(REGISTERS)
            if one.feature == feature
        ]
        parts.append("</feature>")
    return "\n".join([*parts, "</target>"]).encode("ascii")
