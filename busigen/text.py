"""Text from elsewhere, made safe to print: file names, records and messages may hold anything."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text without characters that would break a line, command a terminal, or reorder what stands beside them.

    Letters of all scripts stay. All that Unicode does not count as printable is shown as ``repr`` writes it: C0
    and C1 controls, separators of lines, marks of direction, and bytes of a file name that are no UTF-8.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
