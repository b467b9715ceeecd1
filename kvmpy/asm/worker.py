"""The worker process: encodes instructions with Keystone and decodes them with Capstone.

It is run by its path, apart from the package, so that it loads neither kvmpy nor the
compiled module. Keystone may hang, crash or eat memory on odd text; here it takes nothing
with it. Standard input is a socket. Each request is a line of JSON, [seconds, items] with
items of [bits, text, displacement]; each item is answered by a line of its own, in order,
so that the parent can tell at which one the worker died. An answer is [code in hexadecimal,
message, decoded]; `decoded` is [mnemonic, operands] or null.

A `displacement` that is not null asks for an address form that Keystone cannot be made to
emit: the text has [rbp + 0x7fffffff] or [ebp + index*scale + 0x7fffffff], and the base is
taken out of the code (Intel SDM Vol. 2 tables 2-2 and 2-3: mod 00 with base 101 means
a displacement without a base).
"""

import json
import os
import resource
import signal
import sys
from typing import Any

_ADDRESS_SPACE = 2 << 30
"""Bytes of address space the worker may use: Keystone has loops that allocate."""

_LARGE = b"\xff\xff\xff\x7f"
"""The displacement 0x7fffffff of a request whose base is to be taken out."""


def main(search_path: list[str]) -> None:
    """Serve requests until the parent closes its end."""
    sys.path[:] = search_path
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(0), "wb", 0) as answers:
        engine = _start(answers)
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
        for line in requests if engine else ():
            seconds, items = json.loads(line)
            # If the parent dies while Keystone hangs, nobody is left to kill this process.
            signal.setitimer(signal.ITIMER_REAL, seconds)
            for item in items:
                answers.write(json.dumps(engine.serve(*item)).encode() + b"\n")
            signal.setitimer(signal.ITIMER_REAL, 0)


def _start(answers: Any) -> Any:
    """Load both libraries and report what went wrong, or nothing."""
    try:
        engine = Engine()
    except Exception as error:  # any failure to load is reported, whatever it is
        answers.write(json.dumps(f"{type(error).__name__}: {error}").encode() + b"\n")
        return None
    answers.write(b"null\n")
    return engine


class Engine:
    """Keystone and Capstone for 16-, 32- and 64-bit code."""

    def __init__(self) -> None:
        import capstone
        import keystone

        self._keystone_error = keystone.KsError
        self._assemblers = {
            16: keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_16),
            32: keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_32),
            64: keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_64),
        }
        self._disassemblers = {
            16: capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_16),
            32: capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32),
            64: capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64),
        }
        for disassembler in self._disassemblers.values():
            disassembler.detail = True

    def serve(self, bits: int, text: str, displacement: int | None) -> list[Any]:
        """Encode one instruction and decode it again."""
        try:
            code, _ = self._assemblers[bits].asm(text, 0, as_bytes=True)
        except self._keystone_error as error:
            return [None, str(error).split(" (KS_")[0], None]
        if not code:
            return [None, "Keystone makes no code of it", None]
        if displacement is not None:
            code = self._without_base(bits, code, displacement)
        return [code.hex(), "", self._decode(bits, code)]

    def _disassemble(self, bits: int, code: bytes) -> Any:
        decoded = next(self._disassemblers[bits].disasm(code, 0, 1), None)
        return decoded if decoded is not None and decoded.size == len(code) else None

    @staticmethod
    def _without_base(bits: int, code: bytes, displacement: int) -> bytes:
        """Replace base and displacement of the only memory operand."""
        at = code.find(_LARGE)
        # 64-bit requests have no index and so no SIB byte; 16-bit requests have one.
        modrm = at - (1 if bits == 64 else 2)
        if modrm < 1:
            return b""
        sib = code[modrm + 1 : at] or b"\x25"
        number = (displacement & 0xFFFFFFFF).to_bytes(4, "little")
        return code[:modrm] + bytes([code[modrm] & 0x38 | 4]) + sib + number + code[at + 4 :]

    def _decode(self, bits: int, code: bytes) -> list[Any] | None:
        """Mnemonic and operands as Capstone reads them; None where it does not."""
        decoded = self._disassemble(bits, code)
        if decoded is None:
            return None
        return [decoded.mnemonic, [_operand(decoded, each) for each in decoded.operands]]


def _operand(decoded: Any, operand: Any) -> list[Any]:
    """["r", name], ["i", value, size] or ["m", segment, base, index, scale, disp, size]."""
    if operand.type == 1:
        return ["r", decoded.reg_name(operand.reg)]
    if operand.type == 2:
        return ["i", operand.imm, operand.size or decoded.imm_size or 1]
    memory = operand.mem
    names = [
        decoded.reg_name(register) if register else ""
        for register in (memory.segment, memory.base, memory.index)
    ]
    return ["m", *names, memory.scale, memory.disp, operand.size]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
