"""A guest one instruction at a time: what each did, and the mode switches on the way."""

from kvmpy.stepping.step import Change, MemoryValue, Step
from kvmpy.stepping.stepper import trace_instructions
from kvmpy.stepping.transitions import Transition

__all__ = ["Change", "MemoryValue", "Step", "Transition", "trace_instructions"]
