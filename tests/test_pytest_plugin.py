"""The plugin for tests on guests, as those who use it would: a test file, and pytest run on it."""

import subprocess
import sys
import textwrap

import pytest

import kvmpy.pytest

pytest_plugins = ["pytester"]

HEADER = """
import threading

import pytest
from kvmpy import Machine, assemble

CODE = '''
mov al, 'h'
out 0xe9, al
mov edi, 0x20000
inc dword ptr [rdi]
mov eax, [rdi]
out 0xf4, eax
hlt
'''

class Number:
    name = "number"
    value = 5

    def read(self, offset, size):
        self.value += 1
        return self.value

    def write(self, offset, size, value):
        self.value = value

    def save_state(self):
        return bytes([self.value])

    def load_state(self, state):
        (self.value,) = state

def prepared(code=CODE):
    machine = Machine("1M")
    machine.load(assemble(code, mode="long", at=0x1000))
    return machine
"""
GUEST = """
made = []

@pytest.fixture(scope="module")
def kvmpy_guest():
    machine = prepared()
    yield machine
    assert machine.vm.closed  # at the module's end, by the plugin

def check(machine):
    made.append(machine)
    assert machine.console == b""
    assert machine.run(timeout=10).value == 1
    assert machine.console == b"h"
"""


def run(pytester: pytest.Pytester, text: str) -> pytest.RunResult:
    pytester.makepyfile(HEADER + text)
    options = ("-p", "kvmpy.pytest", "-p", "no:cacheprovider", "-W", "error::ResourceWarning")
    return pytester.runpytest_inprocess(*options)


@pytest.mark.usefixtures("kvm_host")
def test_one_machine_starts_anew_for_each_test(pytester: pytest.Pytester) -> None:
    text = """
@pytest.mark.parametrize("number", range(3))
def test_it(kvmpy_machine, number):
    check(kvmpy_machine)
    kvmpy_machine.memory.write(0x30000, b"noise")
    kvmpy_machine.stop()  # waits for the next run

def test_it_was_the_same_one(kvmpy_machine):
    assert kvmpy_machine.memory.read(0x30000, 5) == bytes(5)
    check(kvmpy_machine)
    assert len(made) == 4 and len(set(map(id, made))) == 1
"""
    run(pytester, GUEST + text).assert_outcomes(passed=4)


@pytest.mark.usefixtures("kvm_host")
def test_a_machine_that_was_spoilt_is_replaced(pytester: pytest.Pytester) -> None:
    text = """
def close(machine):
    machine.close()

def leave_view(machine):
    made.append(machine.memory.view)

def close_with_view(machine):
    machine.__exit__(ValueError, ValueError(), None)

def add_device(machine):
    machine.on_port(0x33)(lambda offset, size, value: 1)

def add_memory(machine):
    machine.vm.add_memory(0x100000, 0x1000)

def remove_memory(machine):
    machine.vm.remove_memory(next(iter(machine.memory)))

def run_on(machine):
    machine.load(assemble("again: jmp again", mode="long", at=0x1000), entry=0x1000)
    thread = threading.Thread(target=machine.run, args=(20,))
    thread.start()
    while not machine.cpus[0].loop.running:
        pass

SPOIL = (close, leave_view, close_with_view, add_device, add_memory, remove_memory, run_on)

@pytest.mark.parametrize("spoil", SPOIL, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("time", range(2))
def test_it(kvmpy_machine, spoil, time):
    check(kvmpy_machine)
    spoil(kvmpy_machine)

def test_last(kvmpy_machine):
    check(kvmpy_machine)
    assert [claim.base for claim in kvmpy_machine.dispatch.ports].count(0x33) == 0
"""
    run(pytester, GUEST + text).assert_outcomes(passed=15)


@pytest.mark.usefixtures("kvm_host")
def test_snapshots_images_and_devices_of_ones_own(pytester: pytest.Pytester) -> None:
    text = """
@pytest.fixture(scope="module")
def kvmpy_attach():
    return lambda machine: machine.attach_port(0x30, 1, Number())

@pytest.fixture(scope="module", params=["snapshot", "machine", "image"])
def kvmpy_guest(request, kvmpy_attach):
    if request.param == "image":
        yield "hello_long"
        return
    machine = prepared("in al, 0x30\\nout 0xf4, al\\nhlt")
    kvmpy_attach(machine)
    if request.param == "machine":
        yield machine
    else:
        with machine:
            yield machine.snapshot()

@pytest.mark.parametrize("time", range(2))
def test_it(kvmpy_machine, time, request):
    result = kvmpy_machine.run(timeout=10)
    if "image" in request.node.name:
        assert kvmpy_machine.console
    else:
        assert result.value == 6
    kvmpy_machine.close()  # the next one is new, and has the device as well
"""
    run(pytester, text).assert_outcomes(passed=6)


@pytest.mark.usefixtures("kvm_host")
def test_the_example_of_the_documentation_works(pytester: pytest.Pytester) -> None:
    first, *_ = (kvmpy.pytest.__doc__ or "").partition("`kvmpy_guest` gives")
    example = textwrap.dedent(first[first.index("    @pytest.fixture") :])
    text = """
class MyDevice(Number):
    value = 6

def test_close(kvmpy_machine):
    kvmpy_machine.close()  # the next one is new, and has the device as well

"""
    run(pytester, text + example + "\n" + example.replace("test_it", "test_again")).assert_outcomes(
        passed=3
    )


@pytest.mark.usefixtures("kvm_host")
def test_devices_that_a_given_machine_has_are_not_attached_twice(pytester: pytest.Pytester) -> None:
    text = """
@pytest.fixture(scope="module")
def kvmpy_attach():
    def attach(machine):
        machine.attach_port(0x31, 1, Number())
        machine.attach_port(0x30, 1, Number())
        machine.attach_mmio(0x80000000, 16, Number())
    return attach

first = Number()

@pytest.fixture(scope="module", params=[1, 2, "standard"])
def kvmpy_guest(request):
    if request.param == "standard":
        return prepared()
    machine = prepared()
    machine.attach_port(0x30, request.param, first)
    return machine

def test_it(kvmpy_machine, request):
    ports = kvmpy_machine.dispatch.ports
    assert (ports.find(0x30).device is first) == ("1" in request.node.name)
    assert ports.find(0x31) and kvmpy_machine.dispatch.mmio.find(0x80000000)
"""
    result = run(pytester, text)
    result.assert_outcomes(passed=2, errors=1)  # another claim there is an error as ever
    result.stdout.fnmatch_lines(["*OverlapError*"])


@pytest.mark.usefixtures("kvm_host")
def test_devices_that_nobody_can_attach_again_are_named(pytester: pytest.Pytester) -> None:
    text = """
@pytest.fixture(scope="module")
def kvmpy_guest():
    machine = prepared()
    machine.on_port(0x33)(lambda offset, size, value: 1)
    return machine

def test_close(kvmpy_machine):
    kvmpy_machine.close()

def test_it(kvmpy_machine):
    pass
"""
    result = run(pytester, text)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*no device at port 0x33*kvmpy_attach*"])


@pytest.mark.usefixtures("kvm_host")
def test_a_failed_test_shows_the_guest(pytester: pytest.Pytester) -> None:
    text = """
def test_it(kvmpy_machine):
    check(kvmpy_machine)
    kvmpy_machine.cpus[0].get_regs()
    assert False

def test_closed(kvmpy_machine):
    with kvmpy_machine:
        assert False

def test_good(kvmpy_machine):
    check(kvmpy_machine)
"""
    result = run(pytester, GUEST + text)
    result.assert_outcomes(passed=1, failed=2)
    lines = ["*- kvmpy guest -*", "console:", "h", "vCPU 0:", "*rax 0x0000000000000001 *rbx*"]
    lines += ["*rip 0x???????????????? rflags*"]
    result.stdout.fnmatch_lines(lines)
    result.stdout.fnmatch_lines(["*no registers: vCPU 0 is closed", "the machine is closed"])
    assert str(result.stdout).count("kvmpy guest -") == 2


@pytest.mark.usefixtures("kvm_host")
def test_what_is_no_guest_is_refused_in_a_line(pytester: pytest.Pytester) -> None:
    text = """
class TestNone:
    def test_it(self, kvmpy_machine):
        pass

class TestOther:
    @pytest.fixture(scope="module")
    def kvmpy_guest(self):
        return 7

    def test_it(self, kvmpy_machine):
        pass
"""
    result = run(pytester, text)
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*define a fixture kvmpy_guest*"])
    result.stdout.fnmatch_lines(["*kvmpy_guest gave 7: give a Machine*"])


@pytest.mark.parametrize("require", ["", "1"])
def test_without_kvm_tests_skip_or_fail_and_say_why(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, require: str
) -> None:
    monkeypatch.setenv("KVMPY_REQUIRE_KVM", require)
    pytester.makeconftest("import kvmpy\nkvmpy.KVM.__init__.__defaults__ = ('/dev/none',)\n")
    text = """
@pytest.fixture(scope="module")
def kvmpy_guest():
    return prepared()

def test_it(kvmpy_machine):
    pass
"""
    pytester.makepyfile(HEADER + text)
    result = pytester.runpytest_subprocess("-p", "kvmpy.pytest", "-rs", "-p", "no:cacheprovider")
    result.assert_outcomes(**({"errors": 1} if require else {"skipped": 1}))
    result.stdout.fnmatch_lines(["*/dev/none*"])
    assert ("KVMPY_REQUIRE_KVM is set" in str(result.stdout)) == bool(require)


def test_it_is_loaded_by_nobody_unless_asked_for() -> None:
    code = "import sys, kvmpy, pytest; pytest.main(['--co', '-q', '/dev/null']); "
    code += "sys.exit('kvmpy.pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/", timeout=60).returncode == 0
