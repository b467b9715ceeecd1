"""Exports of records, from records made up: no KVM is needed."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy import ConfigError, HostError
from kvmpy.abi import ffi
from kvmpy.bus import Bus, FunctionDevice
from kvmpy.devices import DebugConsole, KeyboardReset, Serial16550A
from kvmpy.devices.ports import known_port
from kvmpy.trace import exports, html, jsonl, perfetto, text
from kvmpy.trace.diff import parting
from kvmpy.trace.names import Names, name_of
from kvmpy.trace.record import FIELDS, RECORD_SIZE, Raw, Record, unpack
from kvmpy.trace.split import Summary, followed

u64 = st.integers(0, (1 << 64) - 1)
maybe = st.none() | u64
records = st.builds(
    Record,
    cpu=st.integers(0, 255),
    number=u64,
    entered=u64,
    left=u64,
    kind=st.sampled_from(["port-out", "mmio-read", "halt", "interrupted", "exit-63"]),
    address=maybe,
    size=st.integers(0, 8),
    elements=st.integers(0, (1 << 32) - 1),
    value=maybe,
    digest=u64,
    rip=maybe,
    level=st.sampled_from(["C", "Python", "nobody", "caller"]),
    starts=st.booleans(),
    device=st.text(),
    text=st.text(),
)


def record(number: int = 0, **facts) -> Record:
    """The exit number `number`: 100 ns in KVM_RUN, and 50 ns more to serve it."""
    values = {
        "cpu": 0,
        "number": number,
        "entered": 1000 + 150 * number,
        "left": 1100 + 150 * number,
        "kind": "port-out",
        "address": 0x42,
        "size": 1,
        "elements": 1,
        "value": number,
        "digest": 0,
        "rip": 0x1000,
        "level": "Python",
        "starts": number == 0,
        "device": "bell",
        "text": f"bell <- {number:#x}",
        **facts,
    }
    return Record(**values)


def test_the_layout_is_that_of_c() -> None:
    fields = [(name, field.offset) for name, field in ffi.typeof("struct kvmpy_record").fields]
    np = pytest.importorskip("numpy")
    dtype = np.dtype(list(FIELDS))
    assert [(name, dtype.fields[name][1]) for name in dtype.names] == fields
    assert dtype.itemsize == RECORD_SIZE == ffi.sizeof("struct kvmpy_record") == 64
    one = ffi.new("struct kvmpy_record *", tuple(range(1, 13)))
    assert unpack(memoryview(ffi.buffer(one)), 0) == Raw(*range(1, 13))
    assert len(Raw._fields) == len(FIELDS)


# JSON lines -----------------------------------------------------------------------------------


@given(st.lists(records, max_size=5), st.integers(0, 1 << 40))
def test_json_lines_come_back_as_they_were(tmp_path: Path, some: list[Record], lost: int) -> None:
    path = tmp_path / "trace.jsonl"
    exports.save(some, path, lost)
    assert list(jsonl.read(path)) == some
    last = json.loads(path.read_text().splitlines()[-1])
    assert last == {"end": {"records": len(some), "dropped": lost}}


def test_a_trace_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(list(jsonl.lines([record(0), record(1)]))[:2]) + "\n")
    assert list(jsonl.read(path)) == [record(0)]


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_trace_that_was_cut_off_in_a_line_is_read_up_to_the_line_before(
    tmp_path: Path, kept: int
) -> None:
    path = tmp_path / "trace.jsonl"
    head, first, second, end = jsonl.lines([record(0), record(1)], 7)
    file = jsonl.TraceFile(path)
    path.write_text("\n".join([head, first, second[:kept]]))
    assert list(file) == [record(0)]
    assert (file.records, file.dropped, file.cut) == (1, 0, True)
    path.write_text("\n".join([head, first, second[:kept], end]) + "\n")
    with pytest.raises(ConfigError, match="line 3: no record"):  # not the last line
        list(file)
    path.write_text("\n".join([head, first, '{"cpu": 1}']))
    with pytest.raises(ConfigError, match="line 3: no record"):  # whole, but for its newline
        list(file)
    path.write_text("\n".join([head, first, second, end]))
    assert list(file) == [record(0), record(1)]
    next(iter(file))  # a reading that does not come to the end changes nothing
    assert (file.records, file.dropped, file.cut) == (2, 7, False)


def test_what_has_no_lines_is_not_read_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="/dev/zero: it is not a regular file"):
        list(jsonl.read(Path("/dev/zero")))
    path = tmp_path / "trace.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="no trace"):
        list(jsonl.read(path))
    with path.open("r+b") as file:
        file.write(jsonl.first_line().encode() + b"\n")
    with pytest.raises(ConfigError, match="line 2: no record: it is longer than 64 KiB"):
        list(jsonl.read(path))


_GOOD = jsonl.as_line(record())


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([], "no trace"),
        (["{}"], "no trace"),
        (["[" * 100_000], "no trace"),
        (['{"kvmpy-trace": 99}'], "no trace"),
        ([jsonl.first_line(), "hello"], "line 2"),
        ([jsonl.first_line(), _GOOD, "[1]"], "line 3: no record: it is no object"),
        ([jsonl.first_line(), "{}"], "no 'cpu'"),
        ([jsonl.first_line(), _GOOD.replace('"kind": "port-out"', '"kind": 7')], "'kind' is 7"),
        ([jsonl.first_line(), _GOOD.replace('"cpu": 0', '"cpu": true')], "'cpu' is True"),
        ([jsonl.first_line(), _GOOD.replace('"cpu": 0', '"cpu": 1.5')], "'cpu' is 1.5"),
        ([jsonl.first_line(), _GOOD.replace('"cpu": 0', '"cpu": -1')], "'cpu' is -1"),
        ([jsonl.first_line(), _GOOD.replace('"rip": 4096', f'"rip": {1 << 64}')], "'rip' is 184"),
        ([jsonl.first_line(), _GOOD.replace('"cpu"', '"x": 1, "cpu"')], "it has 'x'"),
        ([jsonl.first_line(), '{"end": 1}'], "'end' is 1"),
        ([jsonl.first_line(), '{"end": {"records": 0, "dropped": -1}}'], "'dropped' is -1"),
        ([jsonl.first_line(), '{"end": {"records": 0}}'], "no 'dropped'"),
        ([jsonl.first_line(), "[" * 60_000], "line 2: no record: it is nested"),
        ([jsonl.first_line(), "[" * 100_000], "line 2: no record: it is longer"),
    ],
)
def test_what_is_no_trace_is_refused_with_the_line(tmp_path: Path, lines, named: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join([*lines, ""]))
    with pytest.raises(ConfigError, match=re.escape(named)):
        list(jsonl.read(path))
    path.write_bytes(b"\xff\xfe" + bytes(100))
    with pytest.raises(ConfigError, match=r"no text|no trace"):
        list(jsonl.read(path))
    with pytest.raises(ConfigError, match="No such file"):
        list(jsonl.read(tmp_path / "nope"))


# Perfetto, text, the page ---------------------------------------------------------------------

SOME = [
    *(record(at) for at in range(3)),
    record(3, level="C", kind="mmio-read", address=0x2000000, text="<b>&bell -> 0x1"),
    record(4, kind="interrupted", address=None, value=None, level="caller", text=""),
    record(5, kind="halt", address=None, value=None, level="caller", device="", text=""),
    record(0, cpu=1, entered=1010, left=1500),
    record(9, starts=True, value=None, text="bell -> ?"),
]


def test_chrome_trace_events_have_what_the_format_asks_for() -> None:
    found = json.loads("\n".join(perfetto.lines(SOME, 3)))
    assert found["otherData"] == {"dropped": 3}
    events = found["traceEvents"]
    threads = {one["tid"]: one["args"]["name"] for one in events if one["name"] == "thread_name"}
    assert threads == {0: "vCPU 0", 1: "vCPU 1"}
    for one in events:
        assert {"ph", "name", "pid", "tid"} <= set(one)
        assert one["ph"] in ("M", "X", "i")
        if one["ph"] != "M":
            assert one["ts"] >= 1
            assert isinstance(one["cat"], str)
        if one["ph"] == "X":
            assert one["dur"] >= 0
    slices = [one for one in events if one["ph"] == "X"]
    assert sum(one["cat"] == "KVM_RUN" for one in slices) == len(SOME)
    (first,) = [one for one in slices if one["name"] == "bell <- 0x0" and one["tid"] == 0]
    assert (first["ts"], first["dur"], first["cat"]) == (1.1, 0.05, "Python device")
    assert first["args"]["address"] == "0x42"
    assert json.loads("\n".join(perfetto.lines([])))["traceEvents"]


def test_the_split_adds_up() -> None:
    gaps = {(one.cpu, one.number): gap for one, gap in followed(SOME)}
    assert gaps[0, 0] == gaps[0, 3] == 50
    assert gaps[0, 5] is None  # the run ended there
    assert gaps[0, 9] is gaps[1, 0] is None
    summary = Summary(SOME)
    assert summary.times["in KVM_RUN"] == sum(one.inside for one in SOME)
    assert summary.times["Python device"] == 150
    assert summary.times["C loop"] == summary.times["signals"] == 50
    assert summary.times["caller, or tracing"] == SOME[-1].entered - SOME[5].left
    assert (summary.exits, summary.interrupted, summary.records) == (7, 1, 8)
    assert summary.accesses["port-out", 0x42, "bell"] == 5
    assert summary.outside["port-out", 0x42, "bell"] == 150


def test_a_gap_of_dropped_records_is_nobodys_time() -> None:
    assert [gap for _, gap in followed([record(0), record(2), record(3)])] == [None, 50, None]


def test_text() -> None:
    lines = list(text.lines(SOME, 7))
    assert "bell <- 0x1" in lines[2]
    assert lines[2].split()[0] == "0.000000"
    assert "7 records dropped" in "\n".join(lines)
    assert any("Python device" in one for one in lines)
    assert list(text.lines([]))
    assert [text.duration(ns) for ns in (0, 999, 1000, 1_500_000, 2 * 10**9)] == [
        "0 ns",
        "999 ns",
        "1.00 us",
        "1.50 ms",
        "2.00 s",
    ]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_of_very_many_records_the_page_shows_a_sample_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(html, "_MOST", 2000)
    records = [record(number) for number in range(4500)]
    whole = "\n".join(html.lines(records))
    assert "one block of 1,000 records in 3, since there are 4,500." in whole
    assert "2,000 exits in" in whole  # blocks 0 and 3
    assert "The first 1,000 of 4,500." in whole
    # Between the blocks is nobody's time: of 2,000 records, all but two were served for 50 ns.
    assert f">{text.duration(1998 * 50)}<" in whole
    assert "A sample" not in "\n".join(html.lines(records[:2000]))


def test_the_page_needs_nothing_else_and_believes_no_name() -> None:
    whole = "\n".join(html.lines(iter(SOME), 7))
    page = _Page()
    page.feed(whole)
    assert page.links == []
    assert not {"script", "link", "img", "iframe", "b"} & set(page.tags)
    assert "url(" not in whole and "@import" not in whole
    assert page.tags.count("svg") == 1
    for shown in ("7 records dropped", "<b>&bell -> 0x1", "vCPU 1", "Where the time went"):
        assert shown in page.text
    assert "\n".join(html.lines([]))


@pytest.mark.parametrize("form", sorted(exports.FORMS))
def test_a_full_disk_is_the_hosts_fault_and_no_path_the_callers(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"trace{form}"
    path.symlink_to("/dev/full")
    with pytest.raises(HostError, match="No space left"):
        exports.save([record(at) for at in range(1000)], path)
    with pytest.raises(ConfigError, match="No such file"):
        exports.save([], tmp_path / "nope" / path.name)


def test_an_ending_says_the_form(tmp_path: Path) -> None:
    for ending in exports.FORMS:
        exports.save(SOME, tmp_path / f"trace{ending}")
    with pytest.raises(ConfigError, match=re.escape(".txt, .jsonl, .json, .html")):
        exports.save(SOME, tmp_path / "trace.xml")
    with pytest.raises(ConfigError, match="cannot write"):
        exports.save(SOME, tmp_path / "nope" / "trace.txt")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to look at the page with")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "trace.html"
    many = [record(at, text=f"bell <- {at:#x}") for at in range(3000)]
    exports.save([*many, record(0, cpu=1)], page)
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync"]
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--no-first-run", "--dump-dom"]
    command += [f"--disable-{what}" for what in quiet]
    command += [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, timeout=50, check=True).stdout.decode()
    assert dom.count("<svg") == 1
    assert "vCPU 1" in dom
    assert dom.count("<tr>") > 1000
    assert "What this cannot tell" in dom


# Names ----------------------------------------------------------------------------------------


def raw(address: int, value: int | None = 0x41, *, write: bool = True, **facts) -> Raw:
    flags = write | (2 if value is not None else 0)
    values = {"reason": 2, "size": 1, "level": 2, "elements": 1, **facts}
    numbers = {"number": 0, "entered": 1, "left": 2, "rip": 0, "digest": 0}
    return Raw(address=address, value=value or 0, flags=flags, **numbers, **values)


@pytest.fixture
def names() -> Names:
    ports = Bus("port", 1 << 16)
    ports.attach(0x3F8, 8, Serial16550A(lambda data: None))
    ports.attach(0xE9, 1, DebugConsole(lambda data: None))
    ports.attach(0x64, 1, KeyboardReset(lambda: None))
    ports.attach(0x500, 4, FunctionDevice(lambda offset, size, value: 0), "mine")
    return Names(lambda port, address: ports.find(address) if port else None)


@pytest.mark.parametrize(
    ("one", "said", "level"),
    [
        (raw(0x3F8), "serial THR <- 'A'", "Python"),
        (raw(0x3F8, write=False), "serial RBR -> 'A'", "Python"),
        (raw(0x3F8, None, write=False), "serial +0x0 -> ?", "Python"),
        (raw(0x3FA, 1), "serial FCR <- 0x01", "Python"),
        (raw(0x3FA, 1, write=False), "serial IIR -> 0x01", "Python"),
        (raw(0x3FD, 0x60, write=False), "serial LSR -> 0x60", "Python"),
        (raw(0xE9, 10), "debug console <- '\\n'", "Python"),
        (raw(0xE9, 0xE9, write=False), "debug console -> 0xe9", "Python"),
        (raw(0x64, 0xFE), "keyboard controller command <- 0xfe", "Python"),
        (raw(0x502, 7, size=2), "mine +0x2 <- 0x0007", "Python"),
        (raw(0x21, 0xFF, write=False), "PIC mask -> 0xff", "nobody"),
        (raw(0x1234, 1), "nobody <- 0x01", "nobody"),
        (raw(0xCF9, 6, level=0), "PCI config address +0x1 <- 0x06", "caller"),
        (raw(0xE9, 0x41, elements=5), "debug console <- 'A' and 4 more", "Python"),
        (raw(0xD0000000, 1, reason=6, size=4), "nobody <- 0x00000001", "nobody"),
    ],
)
def test_what_an_access_is_called(names: Names, one: Raw, said: str, level: str) -> None:
    found = names.record(3, one)
    assert (found.text, found.level, found.cpu) == (said, level, 3)


def test_the_divisor_latch_changes_what_the_first_two_registers_are(names: Names) -> None:
    said = [
        names.record(0, raw(address, value)).text
        for address, value in ((0x3FB, 0x83), (0x3F8, 1), (0x3F9, 0), (0x3FB, 3), (0x3F8, 0x42))
    ]
    assert said[0] == "serial LCR <- 0x83"
    assert said[1:3] == ["serial DLL <- 0x01", "serial DLM <- 0x00"]
    assert said[4] == "serial THR <- 'B'"


def test_names_of_addresses() -> None:
    assert known_port(0x20) == "PIC command"
    assert known_port(0x42) == "PIT counter +0x2"
    assert known_port(0x1234) == ""
    assert name_of(lambda port, address: None, "port-in", 0xA1) == "PIC 2 mask"
    assert name_of(lambda port, address: None, "mmio-read", 0xA1) == "nobody"
    assert name_of(lambda port, address: None, "halt", 0) == ""


# Two traces -----------------------------------------------------------------------------------


def compare(one: list[Record], other: list[Record]):
    return parting(lambda: one, lambda: other)


def test_the_same_exits_at_other_times_are_the_same() -> None:
    one = [record(at) for at in range(20)]
    later = [record(at)._replace(entered=at, left=at, level="C", device="x") for at in range(20)]
    later.insert(7, record(7, kind="interrupted", address=None))
    assert compare(one, later) is None
    assert compare([], []) is None


@given(st.integers(0, 19), st.sampled_from(["value", "address", "size", "rip", "kind", "digest"]))
def test_the_first_difference_is_found_with_what_came_before(at: int, field: str) -> None:
    one = [record(number) for number in range(20)]
    other = list(one)
    other[at] = other[at]._replace(**{field: "port-in" if field == "kind" else 0x77})
    found = compare(one, other)
    assert found is not None
    assert (found.exit, found.differing) == (at, (field,))
    assert found.before == tuple(one[max(0, at - 5) : at])
    assert (found.one[0], found.other[0]) == (one[at], other[at])


def test_a_trace_that_ends_before_the_other_parts_there() -> None:
    one = [record(at) for at in range(5)]
    found = compare(one, one[:3])
    assert found is not None
    assert (found.exit, found.one, found.other) == (3, (one[3], one[4]), ())


def test_a_rip_that_one_host_does_not_know_is_no_difference() -> None:
    assert compare([record(rip=None)], [record()]) is None


def test_vcpus_are_compared_one_by_one() -> None:
    zero = [record(at) for at in range(4)]
    one = [record(at, cpu=1) for at in range(4)]
    assert compare([*zero, *one], [*one, *zero]) is None
    found = compare([*zero, *one], [*zero, *one[:2], one[2]._replace(value=9), one[3]])
    assert found is not None
    assert (found.cpu, found.exit) == (1, 2)


# What docs/tracing.md says ---------------------------------------------------------------------

DOCS = (Path(__file__).parent.parent / "docs" / "tracing.md").read_text()


def test_the_documented_layout_is_the_real_one() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| `(\w+)` \|", DOCS, re.MULTILINE)
    fields = ffi.typeof("struct kvmpy_record").fields
    found = [(field.offset, ffi.sizeof(field.type), name) for name, field in fields]
    assert [(int(offset), int(size), name) for offset, size, name in rows] == found
