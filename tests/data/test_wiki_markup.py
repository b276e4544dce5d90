"""What the markup stripper keeps and drops."""

import io

import pytest

from pyprune.data.wiki_markup import iterate_pages, strip_markup


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''italic''", "Bold and italic"),
        (
            "a [[link]], a [[target|named link]] and [[:Category:x|one]]",
            "a link, a named link and one",
        ),
        ("[[File:a.jpg|thumb|a [[nested]] caption]]Text", "Text"),
        ("Text[[Category:Things]] [[de:Ding]]", "Text"),
        (
            "see [http://x.org/a?b=c the site] or [http://x.org] or http://x.org/y .",
            "see the site or or.",
        ),
        ('fact<ref>{{cite|a=b}}</ref><ref name=x /> and<ref name="y">z</ref>.', "fact and."),
        ("a{{infobox|x={{nested|y}}}}b", "ab"),
        ("{{convert|5|km|mi}} or {{convert|5|to|7|kg}}", "5 km or 5 to 7 kg"),
        ("{{lang|el|λόγος}} {{lang-la|verbum}} {{nowrap|no wrap}}", "λόγος verbum no wrap"),
        ("population {{as of|2014|lc=y}}", "population as of 2014"),
        ("before\n{| class=x\n|-\n| cell {{t}}\n{| nested |}\n|}\nafter", "before\nafter"),
        ("x<!-- hidden -->y<!-- open", "xy"),
        ("H<sub>2</sub>O<br/>next &nbsp;&amp; last", "H2O\nnext & last"),
        ("E <math>e=mc^2</math>holds", "E holds"),
        ("name ({{IPA-en|x}}; {{audio|y}}) is ( ) here (, born)", "name is here (born)"),
        ("* one\n** two\n# three\n: four", "one\ntwo\nthree\nfour"),
        ("stray }} and ]] and {{", "stray and and"),
        ("__NOTOC__text\n----\nmore", "text\nmore"),
    ],
)
def test_inline(markup: str, text: str):
    assert strip_markup(markup) == text


def test_headings_stay_where_text_follows():
    markup = "Lead\n== A ==\n=== A1 ===\ntext\n== Empty ==\n=== B1 ===\n== C ==\nmore\n== D =="
    assert strip_markup(markup) == "Lead\nA\nA1\ntext\nC\nmore"


def test_apparatus_sections_go_with_their_subsections():
    markup = "Lead\n== See also ==\n* x\n=== Sub ===\ny\n== Life ==\nz\n==References==\nw"
    assert strip_markup(markup) == "Lead\nLife\nz"


def test_pages_without_redirects_and_other_namespaces():
    page = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"
    dump = (
        '<mediawiki xmlns="http://example.org/">'
        + page.format("A", 0, "", "a &lt;ref/&gt;")
        + page.format("B", 0, '<redirect title="A"/>', "b")
        + page.format("C", 4, "", "c")
        + "</mediawiki>"
    )
    assert list(iterate_pages(io.BytesIO(dump.encode()))) == [("A", "a <ref/>")]
