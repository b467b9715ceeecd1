"""Any text at all is a Program or an AssemblyError, and soon."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmpy.asm import Program, assemble
from kvmpy.errors import AssemblyError

TEXT = r"""
mov add jmp call lea push ret rep lock int out ljmp nop vaddps fld movsb data32
.byte .quad .ascii .space .fill .org .align .equ .set .rept .endr .macro .endm .text .data
.code16 .code32 .code64 .section .incbin x: 1: 1f 1b x = \a \@
eax rax al r8b ah cr0 st(1) zmm1{k1} es: [rax] [rbx+rcx*4] [x] [rip+x] dword qword ptr offset
short far 0 1 -1 255 0x80000000 0xffffffffffffffff 'A' "a;b" . $ ( ) + - * / % << >> & | ^ ~
, ; # // /* */ : { } é
"""
WORDS = [*TEXT.split(), "\n", "\n", "\0"]


def accepts(source, mode):
    try:
        program = assemble(source, mode, 0x1000, timeout=20)
    except AssemblyError as error:
        assert "\n" not in str(error)
        assert error.line is None or 1 <= error.line <= source.count("\n") + 1
    else:
        assert isinstance(program, Program)
        assert sum(len(line.data) for line in program.listing) == len(program)
        assert program.format_listing()


MODES = st.sampled_from(["real", "protected", "long"])


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80), MODES)
@example("\r\r\n\x0b\x0c\x85\u2028nop", "long")
@example("\ud800", "long")
@example('.ascii "\ud800"', "long")
def test_random_text(source, mode):
    accepts(source, mode)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=16).map(" ".join), MODES)
@example("mov ah , r8b", "long")
def test_random_words(source, mode):
    accepts(source, mode)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["mov", "add", "push", "jmp", "lea", "xchg", "movzx", "imul", "shl", "bogus"]),
    st.lists(st.sampled_from([word for word in WORDS if word not in ";\n"]), max_size=6),
    MODES,
)
def test_random_operands(mnemonic, operands, mode):
    accepts(f"x: {mnemonic} {', '.join(operands)}", mode)
