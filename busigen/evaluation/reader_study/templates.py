"""The templates of a study's files, and text from elsewhere as they show it."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from busigen.text import printable


def templates() -> Environment:
    """The package's templates. All that goes into one is escaped for HTML, or by the filter ``plain`` for Markdown."""
    loader = PackageLoader("busigen.evaluation.reader_study", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plain"] = plain
    return environment


def source(environment: Environment, name: str) -> str:
    """The text of a template as it is stored."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def plain(text: object) -> Markup:
    """Text that Markdown shows as it is: without markup, links, HTML or line breaks."""
    return Markup(re.sub(r"([\\`*_{}\[\]<>()#+\-.!|&~:@])", r"\\\1", printable(str(text))))
