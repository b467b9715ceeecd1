"""x86 CPU state as data: registers, segments, descriptors, page tables, exceptions.

Nothing here knows KVM's file descriptors: the classes mirror the structures of the KVM API
and the tables of the architecture, and turn them into bytes and back.
"""
