#!/usr/bin/env python3
"""Writes the training text of the example model from Debian's package r-cran-janeaustenr.

The package holds Jane Austen's six novels as an R data set; Rscript (r-base-core, which the package
depends on) reads it. The output is plain ASCII: one paragraph a line, one empty line between
paragraphs, and one NUL byte after each chapter, which the model knows as end of text.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess

# One form feed starts each novel, so that Python need not know their titles.
R_PROGRAM = r"""
suppressMessages(library(janeaustenr))
books <- austen_books()
for (book in levels(books$book)) {
  cat("\f")
  cat(enc2utf8(books$text[books$book == book]), sep = "\n")
}
"""

ASCII = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a3": "L",
        "_": "",  # the transcription's mark for italics
    }
)

CHAPTER = re.compile(r"^(?=chapter [0-9ivxlc]+\.?$)", re.IGNORECASE | re.MULTILINE)

# Headings and closing lines of the printed volumes, which would teach the model only where they end.
FURNITURE = re.compile(r"the end|finis|volume [ivx]+|\[end volume .*", re.IGNORECASE)


def read_novels() -> list[str]:
    result = subprocess.run(
        ["Rscript", "--vanilla", "-e", R_PROGRAM], check=True, capture_output=True, encoding="utf-8"
    )
    return result.stdout.split("\f")[1:]


def keep(paragraph: str) -> bool:
    return paragraph != "" and FURNITURE.fullmatch(paragraph) is None


def clean(novel: str) -> str:
    novel = novel.translate(ASCII)
    # A modern publisher's note closes one novel, and transcribers' notes stand in brackets: neither
    # is Austen's.
    novel = novel.split("A NOTE ON THE TEXT")[0]
    novel = re.sub(r"\[At this point.*?\]", "", novel, flags=re.DOTALL)
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n[ \t]*\n", novel))
    text = "\n\n".join(paragraph for paragraph in paragraphs if keep(paragraph))
    return text.encode("ascii").decode("ascii")  # raises where a character was missed


def chapters(novel: str) -> list[str]:
    """The chapters; what stands before the first one (title, year) is dropped."""
    return [chapter.strip() + "\n" for chapter in CHAPTER.split(novel)[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=pathlib.Path, help="text file to write")
    args = parser.parse_args()

    documents = [chapter for novel in read_novels() for chapter in chapters(clean(novel))]
    data = "".join(document + "\0" for document in documents).encode("ascii")
    args.output.write_bytes(data)
    print(f"{args.output}: {len(documents)} chapters, {len(data)} bytes")


if __name__ == "__main__":
    main()
