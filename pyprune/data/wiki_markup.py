"""Turns MediaWiki markup into plain text, and an XML dump into articles.

What is kept: prose, section headings on a line of their own, list items.
What goes: references, templates (but for a few that carry words), tables, files, categories,
mathematics, galleries, comments, and the apparatus sections at the end of an article.
Deterministic: only regular expressions over the text, no locale, no clock.
"""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from typing import IO

CLEANER_VERSION = 1  # part of the cached text's name: raise it with every change of the output

COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
DROPPED_TAGS = "ref|math|gallery|timeline|imagemap|score|syntaxhighlight|source|code|pre|chem"
EMPTY_ELEMENT = re.compile(rf"<(?:{DROPPED_TAGS})\b[^<>]*/>", re.IGNORECASE)
ELEMENT = re.compile(rf"<({DROPPED_TAGS})\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
BREAK = re.compile(r"<br\b[^<>]*>", re.IGNORECASE)
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
TEMPLATE = re.compile(r"\{\{((?:(?!\{\{|\}\}).)*)\}\}", re.DOTALL)
TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
LINK = re.compile(r"\[\[((?:(?!\[\[|\]\]).)*)\]\]", re.DOTALL)
EXTERNAL_LINK = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\]]*\s*([^\]]*)\]|\[mailto:[^\]]*\]")
BARE_URL = re.compile(r"\b(?:https?|ftp)://[^\s|\]}<>\"]+")
QUOTES = re.compile(r"'{2,5}")
MAGIC_WORD = re.compile(r"__[A-Z]{3,}__")
HEADING = re.compile(r"^(={1,6})\s*(.*?)\s*\1\s*$")
LIST_MARK = re.compile(r"^[*#:;]+\s*")
RULE = re.compile(r"^-{4,}\s*")

DROPPED_NAMESPACES = {"file", "image", "category", "media", "wikipedia", "template", "portal"}
INTERWIKI = re.compile(r"^:?[a-z]{2,3}(?:-[a-z]+)*$")
APPARATUS = {
    "bibliography", "citations", "external links", "footnotes", "further reading", "notes",
    "notes and references", "references", "references and notes", "see also", "sources",
    "works cited",
}  # fmt: skip

# Templates that stand for words in a sentence: which positional argument holds them.
WORD_ARGUMENT = {
    "lang": 1, "transl": -1, "nowrap": 0, "small": 0, "smaller": 0, "angbr": 0, "vanchor": 0,
    "quote": 0, "cquote": 0, "blockquote": 0, "flag": 0, "ipa": 0, "nihongo": 0,
    "vr": 0, "val": 0, "nts": 0, "keypress": 0, "abbr": 0, "em": 0, "sic": 0, "linktext": 0,
}  # fmt: skip
DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
LITERAL = {
    "'s": "'s", "'": "'", "nbsp": " ", "spaces": " ", "spaced ndash": f" {DASH} ",
    "snd": f" {DASH} ", "ndash": DASH, "mdash": "\N{EM DASH}", "!": "|", "pipe": "|",
    "\N{MIDDLE DOT}": " \N{MIDDLE DOT} ",
}  # fmt: skip
RANGE_WORDS = {
    "-": DASH, DASH: DASH, "to": " to ", "and": " and ", "or": " or ", "x": f" {TIMES} ",
}  # fmt: skip


def _convert(arguments: list[str]) -> str:
    """{{convert|5|km|mi}} -> "5 km"; {{convert|5|to|7|km}} -> "5 to 7 km"."""
    if len(arguments) >= 4 and arguments[1] in RANGE_WORDS:
        return f"{arguments[0]}{RANGE_WORDS[arguments[1]]}{arguments[2]} {arguments[3]}"
    return " ".join(arguments[:2])


def _template_words(match: re.Match[str]) -> str:
    """What a template without nested ones shows inside a sentence; most show nothing."""
    name, *rest = match[1].split("|")
    name = name.strip().lower().replace("_", " ")
    if name in LITERAL:
        return LITERAL[name]
    arguments = [part.strip() for part in rest if not re.match(r"\s*\w+\s*=", part)]
    if name in {"convert", "cvt"}:
        return _convert(arguments)
    if name == "as of" and arguments:
        return f"{'as' if 'lc=' in match[1] else 'As'} of {arguments[0]}"
    if name.startswith("lang-") and arguments:
        return arguments[0]
    if name == "chem":
        return "".join(arguments)
    position = WORD_ARGUMENT.get(name)
    if position is None or not arguments:
        return ""
    return arguments[position if position < len(arguments) else -1]


def _link_words(match: re.Match[str]) -> str:
    """[[target|words]] -> words; files, categories and links to other wikis -> nothing."""
    target, *rest = match[1].split("|")
    namespace = target.partition(":")[0].strip() if ":" in target else ""
    if namespace.lower() in DROPPED_NAMESPACES or INTERWIKI.match(namespace):
        return ""
    return (rest[-1] if rest else target.removeprefix(":")).strip("\n")


def _until_stable(
    pattern: re.Pattern[str], replacement: str | Callable[[re.Match[str]], str], text: str
) -> str:
    """Innermost first: replaces until nothing matches, which resolves any nesting."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def _inline(text: str) -> str:
    """Removes everything that is not tied to lines."""
    text = COMMENT.sub("", text)
    text = EMPTY_ELEMENT.sub("", text)
    text = _until_stable(ELEMENT, "", text)
    text = _until_stable(TEMPLATE, _template_words, text)
    text = _until_stable(TABLE, "", text)
    text = _until_stable(LINK, _link_words, text)
    text = EXTERNAL_LINK.sub(lambda match: match[1] or "", text)
    text = BARE_URL.sub("", text)
    text = QUOTES.sub("", MAGIC_WORD.sub("", text))
    text = TAG.sub("", BREAK.sub("\n", text))
    return html.unescape(text).replace("\u00a0", " ").replace("\u200b", "")


def _tidy(line: str) -> str:
    """Mends what removals leave inside a line: doubled spaces, empty or ragged brackets."""
    line = re.sub(r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}", "", line)
    line = re.sub(r"\s+", " ", line)
    line = re.sub(r"\(\s*[,;:]+\s*", "(", line)
    line = re.sub(r"\s*[,;:]\s*\)", ")", line)
    line = re.sub(r"\s*\(\s*\)", "", line)
    line = re.sub(r"\(\s+", "(", line)
    return re.sub(r"\s+([,.;:)])", r"\1", line).strip()


def _without_empty_headings(lines: list[tuple[int, str]]) -> list[str]:
    """Drops headings under which no text is left. A line is (heading level or 0, text)."""
    kept: list[str] = []
    following = 1  # what comes after: 0 text, else a heading's level; nothing yet counts as level 1
    for level, text in reversed(lines):
        if level == 0 or following == 0 or level < following:
            kept.append(text)
            following = level
    return kept[::-1]


def strip_markup(markup: str) -> str:
    """The plain text of one article: paragraphs, list items and headings, one a line."""
    lines: list[tuple[int, str]] = []
    skipped_level = 0  # level of the apparatus heading being skipped, 0 when none
    for line in _inline(markup).split("\n"):
        heading = HEADING.match(line.strip())
        if heading:
            level, title = len(heading[1]), _tidy(heading[2])
            if skipped_level and level > skipped_level:
                continue
            skipped_level = level if title.lower() in APPARATUS else 0
            if not skipped_level and title:
                lines.append((level, title))
            continue
        if skipped_level or line.lstrip().startswith(("|", "!", "{|")):
            continue
        text = _tidy(LIST_MARK.sub("", RULE.sub("", line.strip())))
        if re.search(r"\w", text):
            lines.append((0, text))
    return "\n".join(_without_empty_headings(lines))


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def iterate_pages(dump: IO[bytes]) -> Iterator[tuple[str, str]]:
    """(title, markup) of every encyclopaedia page (namespace 0) of an XML dump that is not a
    redirect, in the dump's order."""
    for _, element in ElementTree.iterparse(dump):
        if _local(element.tag) != "page":
            continue
        fields = {_local(child.tag): child.text or "" for child in element.iter()}
        if fields["ns"] == "0" and "redirect" not in fields:
            yield fields["title"], fields["text"]
        element.clear()
