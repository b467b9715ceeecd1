"""The header comment of an assembly guest."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.boot.header import GuestHeader, parse_header
from kvmpy.errors import ImageError
from kvmpy.modes import MODES

FULL = r"""# echo - sends back what it is sent
#
# Reads the serial port: polled, without interrupts.
# Note: a line of prose with a colon, and one of URLs http://example.org/
# mode: real
# ring: 0
# load: 0x8000
# memory: 1M
# input: "ab\n"
# input: b"\xff\x00"
# output: 'ab\n'
# output: "\xff"
# exit: 3
        mov al, 1
# mode: long
"""


def test_a_full_header() -> None:
    assert parse_header(FULL, "echo.S") == GuestHeader(
        title="sends back what it is sent",
        mode="real",
        ring=0,
        load=0x8000,
        memory=1 << 20,
        input=b"ab\n\xff\x00",
        output=b"ab\n\xff",
        exit_status=3,
    )


@pytest.mark.parametrize("mode", MODES)
def test_each_mode(mode: str) -> None:
    assert parse_header(f"# g - t\n# mode: {mode}", "g.S").mode == mode


@pytest.mark.parametrize("source", ["", "nop\n# mode: real\n", "\n# mode: real\n"])
def test_no_header_is_all_defaults(source: str) -> None:
    assert parse_header(source, "g.S") == GuestHeader()


def test_an_empty_output_differs_from_none() -> None:
    assert parse_header('# g - t\n# output: ""', "g.S").output == b""


def test_a_first_line_without_a_dash_is_the_title() -> None:
    assert parse_header("# just a title", "g.S").title == "just a title"


def test_crlf_lines() -> None:
    header = parse_header('# g - t\r\n# mode: real\r\n# output: "x"\r\n', "g.S")
    assert (header.title, header.mode, header.output) == ("t", "real", b"x")


def test_text_beyond_latin_1_is_utf_8() -> None:
    assert parse_header('# g - t\n# output: "→é"', "g.S").output == "→é".encode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mode: 64-bit", "mode '64-bit' is unknown: use one of real, protected16"),
        ("ring: 1", "ring '1' is not one"),
        ("load: 7c00", "'7c00' is not an address"),
        ("load: -1", "is not between"),
        ("memory: 1Q", "'1Q' is not a size"),
        ("memory: 0", "at least one byte"),
        ("output: hello", "'hello' is not a string"),
        ("output: 5", "'5' is not a string"),
        ('output: "unclosed', "is not a string"),
        ("output: __import__('os')", "is not a string"),
        ("output: " + "(" * 500, "is not a string"),
        ("exit: 256", "exit '256' is not a status"),
        ("exit: -1", "is not a status"),
        ("ouput: 'x'", "unknown key 'ouput': did you mean 'output'"),
        ("moed: real", "did you mean 'mode'"),
    ],
)
def test_bad_values_name_file_and_line(line: str, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse_header(f"# g - t\n#\n# {line}\n", "g.S")
    assert str(caught.value).startswith("g.S: line 3: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["mode: real", "ring: 3", "load: 1", "memory: 1M", "exit: 1"])
def test_a_key_given_twice(key: str) -> None:
    with pytest.raises(ImageError, match=r"line 3: \w+ is given twice"):
        parse_header(f"# g - t\n# {key}\n# {key}\n", "g.S")


@given(st.binary(max_size=40))
def test_any_bytes_can_be_an_output(data: bytes) -> None:
    assert parse_header(f"# g - t\n# output: {data!r}\n", "g.S").output == data


@given(st.text(st.characters(max_codepoint=255), max_size=40))
def test_any_latin_1_string_can_be_an_output(text: str) -> None:
    header = parse_header(f"# g - t\n# output: {text!a}\n", "g.S")
    assert header.output == text.encode("latin-1")


KEYS = st.sampled_from(["mode", "ring", "load", "memory", "input", "output", "exit", "exti"])
LINES = st.lists(st.tuples(KEYS, st.text(max_size=20)), max_size=5)


@settings(max_examples=50)
@given(LINES)
def test_anything_after_a_key_is_a_header_or_an_image_error(lines: list[tuple[str, str]]) -> None:
    source = "# g - t\n" + "\n".join(f"# {key}: {value}" for key, value in lines)
    try:
        parse_header(source, "g.S")
    except ImageError as error:
        assert "\n" not in str(error)
