"""The small devices; what each must answer is in the source that its module names."""

import pytest

from kvmpy.devices import (
    DebugConsole,
    DebugExit,
    KeyboardReset,
    PostCode,
    PowerOff,
    ResetControl,
    console,
    debugexit,
    exit_status,
    post,
    power,
    reset,
)

SIZES = [1, 2, 4]


class Calls(list):
    """A callable that records the arguments of each call."""

    def __call__(self, *arguments):
        self.append(arguments)


def test_devices_are_where_a_pc_has_them():
    assert (console.PORT, console.FIRMWARE_PORT, console.SIZE) == (0xE9, 0x402, 1)
    assert (debugexit.PORT, debugexit.SIZE) == (0xF4, 4)
    assert (post.PORT, post.SIZE) == (0x80, 1)
    assert (power.PORT, power.SIZE) == (0x604, 2)
    assert (reset.KEYBOARD_PORT, reset.CONTROL_PORT, reset.SIZE) == (0x64, 0xCF9, 1)


def test_each_device_has_a_name_of_its_own():
    devices = [DebugConsole, DebugExit, KeyboardReset, PostCode, PowerOff, ResetControl]
    assert len({device.name for device in devices}) == len(devices)


def test_console_gives_each_byte_to_the_output_at_once():
    output = Calls()
    device = DebugConsole(output)
    for byte in b"A\n\x00\xff":
        device.write(0, 1, byte)
    assert output == [(b"A",), (b"\n",), (b"\x00",), (b"\xff",)]


@pytest.mark.parametrize(("size", "value"), [(2, 0x4241), (4, 0x4443_4241)])
def test_console_is_one_port_wide(size, value):
    output = Calls()
    DebugConsole(output).write(0, size, value)
    assert output == [(b"A",)]


@pytest.mark.parametrize(("size", "value"), [(1, 0xE9), (2, 0xFFE9), (4, 0xFFFF_FFE9)])
def test_console_says_that_it_is_there(size, value):
    assert DebugConsole(Calls()).read(0, size) == value


@pytest.mark.parametrize("size", SIZES)
def test_debug_exit_hands_over_the_value(size):
    on_exit = Calls()
    device = DebugExit(on_exit)
    assert device.read(0, size) == 0
    assert on_exit == []
    value = (1 << 8 * size) - 2
    device.write(0, size, value)
    assert on_exit == [(value,)]


@pytest.mark.parametrize(
    ("value", "status"), [(0, 1), (1, 3), (0x10, 33), (0x7F, 255), (0x80, 1), (0xFFFF_FFFF, 255)]
)
def test_exit_status_is_qemus(value, status):
    assert exit_status(value) == status


def test_post_codes_are_kept():
    device = PostCode()
    assert device.last is None
    for code in (0x01, 0xAA, 0x1234):
        device.write(0, 1 if code < 256 else 2, code)
    assert list(device.codes) == [0x01, 0xAA, 0x34]
    assert (device.last, device.count) == (0x34, 3)
    assert [device.read(0, size) for size in SIZES] == [0xFF, 0xFFFF, 0xFFFF_FFFF]


def test_post_codes_are_bounded():
    device = PostCode()
    for code in range(5000):
        device.write(0, 1, code & 0xFF)
    assert device.count == 5000
    assert list(device.codes) == [code & 0xFF for code in range(5000 - 4096, 5000)]


def test_power_off_at_the_one_write_that_asks_for_it():
    on_power_off = Calls()
    device = PowerOff(on_power_off)
    others = [(0, 2, 0), (0, 2, 0x2001), (0, 2, 0x3400), (0, 1, 0x20), (1, 1, 0x20)]
    for access in [*others, (0, 4, 0x2000), (1, 2, 0x2000)]:
        device.write(*access)
    assert on_power_off == []
    assert [device.read(0, size) for size in SIZES] == [0, 0, 0]
    device.write(0, 2, 0x2000)
    assert on_power_off == [()]


def test_keyboard_controller_resets_at_the_commands_that_pulse_the_reset_line():
    resetting = []
    for command in range(256):
        on_reset = Calls()
        KeyboardReset(on_reset).write(0, 1, command)
        if on_reset:
            resetting.append(command)
    assert resetting == [0xF0, 0xF2, 0xF4, 0xF6, 0xF8, 0xFA, 0xFC, 0xFE]


def test_keyboard_controller_is_ready_for_a_command():
    device = KeyboardReset(Calls())
    assert device.read(0, 1) == 0
    assert device.read(0, 2) == 0xFF00


def test_reset_control_register_reads_back():
    on_reset = Calls()
    device = ResetControl(on_reset)
    assert device.read(0, 1) == 0
    device.write(0, 1, 0xFB)
    assert device.read(0, 1) == 0x0A
    assert device.read(0, 4) == 0xFFFF_FF0A
    assert on_reset == []


@pytest.mark.parametrize("value", [0x04, 0x06, 0x0E])
def test_reset_control_resets_when_the_bit_is_set_and_starts_anew(value):
    on_reset = Calls()
    device = ResetControl(on_reset)
    device.write(0, 1, 0x02)
    device.write(0, 1, value)
    assert on_reset == [()]
    assert device.read(0, 1) == 0
    device.write(0, 1, value)
    assert len(on_reset) == 2
