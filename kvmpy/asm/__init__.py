"""The assembler: Intel-syntax text in, bytes with symbols and a listing out.

`assemble` is the whole of it; the dialect is written down in guests/README.md. The
front end (statements, expressions, directives, branches) is Python; plain instructions
are encoded by Keystone in a worker process of its own. Both are imported on first use.
"""

from kvmpy.asm.program import ListingLine, Program

__all__ = ["ListingLine", "Program", "assemble"]


def assemble(source: str, mode: str = "long", at: int = 0, timeout: float = 2.0) -> Program:
    """Assemble `source` to a flat image that runs at the guest address `at`.

    `mode` is what the processor is in at the first instruction: "real" or "protected16"
    (16-bit code), "protected" (32-bit) or "long" (64-bit); `.code16`, `.code32` and
    `.code64` switch inside the source. `timeout` is in seconds, for the whole source; the
    start of the worker process, once per program, is not counted.

    Raises AssemblyError with the line and its text for source that cannot be assembled
    (a hang or a crash of Keystone included), ConfigError for a mode, an address or a
    timeout that means nothing.
    """
    from kvmpy.asm.assembler import assemble_source

    return assemble_source(source, mode, at, timeout)
