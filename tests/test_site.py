"The site, as a reader gets it: every page there and reachable, API tables, formulas, whole links, no other hosts."
import inspect, json, re, sys
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import gated_symile
import gated_symile.core

ROOT = Path(__file__).parent.parent
SITE = ROOT/"_docs"
sys.path.insert(0, str(ROOT/"tools"))
import docs

pytestmark = [pytest.mark.usefixtures("site"),
              pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")]


def text(page): return (SITE/page).read_text(encoding="utf-8")


def test_every_notebook_is_a_page_that_can_be_reached():
    notebooks = {p.relative_to(ROOT/"nbs").with_suffix(".html") for p in (ROOT/"nbs").rglob("*.ipynb")
                 if ".ipynb_checkpoints" not in p.parts}
    reached, left = set(), [SITE/"index.html"]
    while left:
        page = left.pop()
        if page in reached or page.suffix != ".html" or not page.exists(): continue
        reached.add(page)
        left += [(page.parent/urlsplit(u).path).resolve() for u in docs.Page(page).links if not urlsplit(u).netloc]
    assert {p.relative_to(SITE.resolve()) for p in reached} >= notebooks


def test_the_api_shows_signature_comments_and_docstring():
    page = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", "", text("api/core.html"))))
    source = inspect.getsource(gated_symile.core.fill_missing)
    comments = re.findall(r"# (.*)", source)
    assert comments and all(c in page for c in ["def fill_missing( x:Tensor,", *comments])
    assert gated_symile.core.fill_missing.__doc__.split("`")[0].split(";")[0].strip() in page


def test_formulas_are_drawn_without_a_script():
    page = text("api/product.html")
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML"' in page
    assert not re.search(r'class="math|katex|mathjax', page, re.I)


@pytest.mark.parametrize("path", sorted((ROOT/"nbs/tutorials").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_tutorial_runs_elsewhere(path):
    "It offers Colab and Binder, and its first code cell installs the package in Colab, where there is nothing of ours."
    page = text(f"tutorials/{path.stem}.html")
    assert f"/blob/main/nbs/tutorials/{path.name}" in page and f"labpath=nbs/tutorials/{path.name}" in page
    first = next("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
                 if c["cell_type"] == "code")
    assert first.startswith("#| hide\n! [ -e /content ] && pip install -q git+https://github.com/gated-symile/gated_symile")


def test_public_names_link_to_their_source():
    page = text("api/product.html")
    assert all(re.search(rf'href="[^"]*/blob/main/gated_symile/product\.py#L{inspect.getsourcelines(f)[1]}"', page)
               for f in (gated_symile.mip_scores, gated_symile.dvs))


@pytest.mark.parametrize("source, alt", [
    ("#| fig-alt: \"seen\"\nplot()", "seen"),
    ("#| fig-cap: \"caption\"\nplot()", "caption"),
    ("plot()", "Look at [the `peak`](a.html)."),
])
def test_a_figure_is_described(source, alt):
    cells = [SimpleNamespace(cell_type="markdown", source="Title\n\n" + alt),
             SimpleNamespace(cell_type="code", source=source, outputs=[{"data": {"image/png": "iVBO"}}])]
    docs.describe_figures(cells)
    assert re.findall(r'^#\| fig-alt: "(.*)"$', cells[1].source, re.M) == [alt if "[" not in alt
                                                                           else "Look at the peak."]


@pytest.mark.parametrize("tex, shown", [
    (r"\alpha &lt; 1", "α<1"),
    (r"\Big\langle x, y \Big\rangle", "⟨x,y⟩"),
])
def test_a_formula_keeps_its_characters(tex, shown):
    match = docs.FORMULA.search(rf'a <span class="math inline">\({tex}\)</span> b')
    assert unescape(re.sub("<[^>]+>", "", docs.mathml(match))) == shown


def test_a_formula_that_is_not_understood_is_noticed():
    with pytest.raises(ValueError, match="nonsense"):
        docs.mathml(docs.FORMULA.search(r'<span class="math display">\[\nonsense{x}\]</span>'))


@pytest.mark.parametrize("html, problem", [
    ('<a href="b.html#x">', None),
    ('<a href="b.html#y">', "no such place"),
    ('<a href="c.html">', "does not exist"),
    ('<img src="gone.png">', "does not exist"),
    ('<a href="https://example.org/">', None),
    ('<script src="https://example.org/a.js"></script>', "from another host"),
    ('[<a href="b.html"><code>MLP</code></a>](mlp.ipynb)', "by itself"),
])
def test_a_broken_link_is_noticed(tmp_path, monkeypatch, html, problem):
    (tmp_path/"a.html").write_text(html)
    (tmp_path/"b.html").write_text('<h1 id="x">B</h1>')
    monkeypatch.setattr(docs, "SITE", tmp_path)
    found = docs.problems()
    assert len(found) == bool(problem) and all(problem in f for f in found)
