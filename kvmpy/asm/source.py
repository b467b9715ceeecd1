"""Source text to statements: comments, separators, labels. Nothing is interpreted here."""

import re
from typing import NamedTuple

from kvmpy.errors import AssemblyError

__all__ = ["NAME", "SourceStatement", "split_statements"]

NAME = r"[A-Za-z_.$?][\w.$?@]*"
"""What a symbol, a macro or a mnemonic looks like."""

_PIECE = re.compile(
    r"""
    "(?:\\[^\n]|[^"\\\n])*"                  # a string
    | '(?:\\[0-9A-Za-z]+|\\[^\n]|[^'\\\n])'  # a character
    | /\*.*?\*/ | //[^\n]* | \#[^\n]*    # comments
    | [;\n]                        # separators
    | [^"'/\#;\n]+ | .             # anything else
    """,
    re.VERBOSE | re.DOTALL,
)
_LABEL = re.compile(rf"\s*({NAME}|\d+)\s*:(?!:)", re.ASCII)


class SourceStatement(NamedTuple):
    """One statement, without comments: a label with its colon, or anything else.

    `text` is what is to be parsed, `shown` is what a listing or an error shows of it.
    """

    line: int
    text: str
    shown: str


def split_statements(source: str) -> list[SourceStatement]:
    """Cut the source at newlines and semicolons, drop comments, set labels apart.

    Each line gives at least one statement, so that a listing can show them all; the text
    of a line without one is empty. Raises AssemblyError for a string, a character or a
    comment that does not end.
    """
    lines = source.split("\n")
    rows: list[list[str]] = [[""]]
    for match in _PIECE.finditer(source):
        piece = match.group()
        if piece == "\n":
            rows.append([""])
        elif piece == ";":
            rows[-1].append("")
        elif piece.startswith("/*"):
            rows[-1][-1] += " "
            rows.extend([""] for _ in range(piece.count("\n")))
        elif piece in ('"', "'") or source.startswith("/*", match.start()):
            what = "comment" if piece == "/" else "string" if piece == '"' else "character"
            raise AssemblyError(f"this {what} does not end", len(rows), lines[len(rows) - 1])
        elif not piece.startswith(("//", "#")):
            rows[-1][-1] += piece
    statements: list[SourceStatement] = []
    for number, (row, line) in enumerate(zip(rows, lines, strict=True), 1):
        statements += _split_row(number, row, line.rstrip())
    return statements


def _split_row(number: int, row: list[str], line: str) -> list[SourceStatement]:
    """The statements of one line; each shows its own text where there are several."""
    texts = [text.strip() for text in row if text.strip()]
    if len(texts) <= 1:
        return _split_labels(SourceStatement(number, texts[0] if texts else "", line))
    split = [_split_labels(SourceStatement(number, text, text)) for text in texts]
    return [statement for statements in split for statement in statements]


def _split_labels(statement: SourceStatement) -> list[SourceStatement]:
    """A label gets a statement of its own, which shows nothing unless it stands alone."""
    number, text, shown = statement
    labels = []
    while match := _LABEL.match(text):
        labels.append(f"{match.group(1)}:")
        text = text[match.end() :].strip()
    if labels and not text:
        last = labels.pop()
        text = last
    return [SourceStatement(number, label, "") for label in labels] + [
        SourceStatement(number, text, shown)
    ]
