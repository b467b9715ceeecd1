"""What a notebook shows of a run and of its trace: well-formed, harmless, and not endless."""

from collections.abc import Iterator
from html.parser import HTMLParser

import pytest

from kvmpy import Machine, assemble

pytestmark = pytest.mark.usefixtures("kvm_host")


class Page(HTMLParser):
    """Takes HTML apart: its tags, which have to match, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine("1M") as made:
        yield made


def test_a_result(machine: Machine) -> None:
    machine.load(assemble("mov eax, 0xc0ffee; out 0x10, al; out 0xe9, al; hlt", at=0x1000))
    result = machine.run(timeout=1.0)
    page = Page(result._repr_html_())
    assert str(result) in page.text
    assert "\nport-out\n2\n" in page.text and "\nhalt\n1\n" in page.text
    assert "0000000000c0ffee" in page.text
    assert "\nport 0x10: 1 write\n" in page.text  # what nobody claimed
    assert repr(result).startswith("Result(outcome='halt'")


def test_what_a_guest_says_is_harmless(machine: Machine) -> None:
    machine.load(assemble("mov al, '<'; out 0xe9, al; mov al, '&'; out 0xe9, al; hlt", at=0x1000))
    machine.trace.start()
    machine.run(timeout=1.0)
    html = machine.trace._repr_html_()
    page = Page(html)
    assert "debug console <- '<'" in page.text and "debug console <- '&'" in page.text
    assert "'<'" not in html and "'&'" not in html
    assert set(page.tags) == {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td"}
    assert repr(machine.trace).startswith("<Trace recording, 3 records")


def test_a_long_trace_has_its_ends(machine: Machine) -> None:
    guest = "mov ecx, 100; next: mov al, cl; out 0x80, al; dec ecx; jnz next; hlt"
    machine.load(assemble(guest, at=0x1000))
    machine.trace.start()
    machine.run(timeout=1.0)
    page = Page(machine.trace._repr_html_())
    assert page.tags.count("tr") < 60
    assert "69 more" in page.text  # of 101, 32 are shown
    assert page.text.count("\nport-out\n") == 31 and page.text.count("\nhalt\n") == 1
    machine.trace.clear()
    assert "0 exits" in Page(machine.trace._repr_html_()).text
