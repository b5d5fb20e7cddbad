"""The site, from the notebooks into `_docs`: `python tools/docs.py build|check|links|serve`.

nbdev stages the notebooks (hidden cells dropped, API tables added); Quarto renders them where it is installed, else
smalldocs. What either leaves to other hosts is brought home afterwards: formulas become MathML, and no page loads
anything from elsewhere.
"""
import json, os, re, shutil, subprocess, sys, time
from functools import partial
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
STAGE, SITE = ROOT/"_proc", ROOT/"_docs"
FORMULA = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
REMOTE = re.compile(r'<script[^>]*\ssrc="https?:[^>]*></script>\s*|'
                    r'<link(?=[^>]*\srel="(?:stylesheet|preconnect)")[^>]*\shref="https?:[^>]*>\s*')
WEB_FONT = re.compile(r'@import *(?:url\((["\']?)https?:[^)]*\)|(["\'])https?:.*?\2);')
NAME_LINK = re.compile(r'<a href="([^":#]+)#([^"]+)">(?=<code>)')
FETCHED = re.compile(r'const r = await fetch\(offset \+ "search\.json"\);\s*index = await r\.json\(\);')
LOADED = """index = await new Promise((done, failed) => {
        const script = document.createElement("script");
        Object.assign(script, { src: offset + "search.js", onload: () => done(window.searchIndex), onerror: failed });
        document.head.append(script);
      });"""


def stage():
    """Let nbdev prepare the notebooks in `_proc`, and finish its pages.

    Its absolute links to this site become relative, so that they work anywhere, and `output-file`, which says nothing
    new and which smalldocs doesn't know, goes.
    """
    import nbformat
    from nbdev.config import get_config
    from nbdev.serve import proc_nbs
    # of cells that import and do more: see CONTRIBUTING.md
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:nbdev.processors"
    proc_nbs(n_workers=2, force=True)
    cfg = get_config()
    home = f"{cfg.doc_host}{cfg.doc_baseurl}/"
    for path in STAGE.rglob("*.ipynb"):
        name = path.relative_to(STAGE)
        text = path.read_text(encoding="utf-8").replace(home, "../"*len(name.parent.parts) or "./")
        page = nbformat.reads(re.sub(r"output-file: [\w.-]+\\n", "", text), as_version=4)
        describe_figures(page.cells)
        if name.parts[0] == "tutorials": page.cells.insert(1, nbformat.v4.new_markdown_cell(open_in(cfg, name)))
        nbformat.write(page, path)


def open_in(cfg, name):
    "The line of links that opens the notebook of a page where it can be run."
    repo, page = f"{cfg.user}/{cfg.repo}", f"nbs/{name.as_posix()}"
    return (f"[Run it in Colab](https://colab.research.google.com/github/{repo}/blob/{cfg.branch}/{page}){{.open-in}} "
            f"[or in Binder](https://mybinder.org/v2/gh/{repo}/{cfg.branch}?labpath={page}){{.open-in}}")


def describe_figures(cells):
    "Give a figure without alternative text its caption, or what the text before it says one should look for."
    before = ""
    for cell in cells:
        if cell.cell_type == "markdown": before = cell.source
        if cell.cell_type != "code" or re.search(r"^#\| *fig-alt:", cell.source, re.M): continue
        if not any(kind.startswith("image/") for out in cell.outputs for kind in out.get("data", {})): continue
        caption = re.search(r"^#\| *fig-cap: *(.+)$", cell.source, re.M)
        text = caption.group(1).strip("\"'") if caption else before.strip().split("\n\n")[-1]
        plain = " ".join(re.sub(r"\]\([^)]*\)|[\[\]`*#$]", "", text).split())
        cell.source = f"#| fig-alt: {json.dumps(plain or 'figure', ensure_ascii=False)}\n{cell.source}"


def mathml(match):
    "One formula as MathML, which browsers draw without any script; `ValueError` where a command is not understood."
    from latex2mathml.converter import convert
    kind, tex = match.groups()
    tex = re.sub(r"\\[bB]igg?[lrm]?(?=\\)", "", unescape(tex))               # fences stretch by themselves
    drawn = convert(tex, display="inline" if kind == "inline" else "block")
    if "\\" in drawn: raise ValueError(f"a formula has a command that MathML doesn't know: {tex}")
    return drawn


def render():
    "Render `_proc` into `_docs`."
    quarto = shutil.which("quarto")
    if not quarto and sys.version_info < (3, 11): sys.exit("The site needs Quarto, or Python 3.11 for smalldocs")
    command = [str(Path(sys.executable).with_name("smalldocs")), "render", "-q", "--strict", str(STAGE)]
    if quarto:
        command = [quarto, "render", str(STAGE), "--no-cache"]
        use_mathml(STAGE/"_quarto.yml")
    subprocess.run(command, check=True)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(STAGE/"_docs", SITE)
    bring_home()
    link_names()
    if not quarto: search_without_server()


def use_mathml(config):
    "Let Quarto write formulas as MathML. (smalldocs doesn't know the option.)"
    import yaml
    options = yaml.safe_load(config.read_text(encoding="utf-8"))
    options["format"]["html"]["html-math-method"] = "mathml"
    config.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")


def bring_home():
    "Draw the formulas that are left to a script, and load nothing from other hosts."
    for page in SITE.rglob("*.html"):
        page.write_text(FORMULA.sub(mathml, REMOTE.sub("", page.read_text(encoding="utf-8"))), encoding="utf-8")
    for style in SITE.rglob("*.css"):
        style.write_text(WEB_FONT.sub("", style.read_text(encoding="utf-8")), encoding="utf-8")


def link_names():
    "Let nbdev's links of names lead to the page where a name has no place of its own there, as some methods."
    ids = {path: Page(path).ids for path in SITE.resolve().rglob("*.html")}
    for path in ids:
        def place(link):
            known = ids.get((path.parent/unquote(link[1])).resolve())
            return link[0] if known is None or unquote(link[2]) in known else f'<a href="{link[1]}">'
        path.write_text(NAME_LINK.sub(place, path.read_text(encoding="utf-8")), encoding="utf-8")


def search_without_server():
    "Let smalldocs' search read its index from a script: a page opened as a file may load scripts, but may not fetch."
    script = SITE/"site_libs/smalldocs.js"
    text, n = FETCHED.subn(LOADED, script.read_text(encoding="utf-8"))
    if n != 1: raise ValueError("smalldocs.js loads its index in a way that is not known here")
    script.write_text(text, encoding="utf-8")
    (SITE/"search.js").write_text("window.searchIndex = " + (SITE/"search.json").read_text(encoding="utf-8"),
                                  encoding="utf-8")


def build():
    "Stage and render."
    stage()
    render()


class Page(HTMLParser):
    "The ids of a page, where its links lead, and what it loads."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag in ("img", "script", "iframe") and a.get("src"): self.loads.append(a["src"])
        if tag == "link" and a.get("rel") in ("stylesheet", "icon"): self.loads.append(a["href"])


def problems():
    """Links of the built site that lead nowhere, things that its pages load from another host, and links around a name
    in backticks, which is a link by itself: `[`MLP`](mlp.ipynb)` comes out broken."""
    from nbdev.config import get_config
    top, pages, found = get_config().doc_baseurl, {path: Page(path) for path in SITE.rglob("*.html")}, []
    for path, page in pages.items():
        names = re.findall(r"<code>([^<]*)</code></a>\]\(", path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(SITE)} has a link around {name}, which is one by itself" for name in names]
        for url in page.links + page.loads:
            to = urlsplit(url)
            name = path.relative_to(SITE)
            if to.scheme or to.netloc:
                if url in page.loads and to.scheme != "data": found.append(f"{name} loads {url} from another host")
                continue
            there = (SITE/unquote(to.path).removeprefix(top).lstrip("/") if to.path.startswith("/")
                     else path.parent/unquote(to.path)).resolve() if to.path else path
            if there.is_dir(): there = there/"index.html"
            if not there.exists(): found.append(f"{name} links to {url}, which does not exist")
            elif to.fragment and there in pages and unquote(to.fragment) not in pages[there].ids:
                found.append(f"{name} links to {url}, but there is no such place on that page")
    return found


def external():
    "Where the site's links to other hosts lead, each with the first page that has it."
    found = {}
    for path in sorted(SITE.rglob("*.html")):
        for url in Page(path).links:
            if urlsplit(url).netloc: found.setdefault(url, path.relative_to(SITE))
    return found


def links():
    "Print the links to other hosts, of the site as it was built."
    for url, page in sorted(external().items()): print(f"{url}\t{page}")


def check():
    "Build, and exit with 1 if a link is broken."
    build()
    found = problems()
    print("\n".join(found) if found else f"{len(list(SITE.rglob('*.html')))} pages, no broken link")
    return bool(found)


def serve(port=8000):
    "Build, serve on this machine, and build again whenever a source changes."
    def state():
        sources = [*(ROOT/"nbs").rglob("*"), *ROOT.glob("*.md"), ROOT/"_quarto.yml"]
        return max(f.stat().st_mtime for f in sources if f.is_file())
    build()
    server = ThreadingHTTPServer(("127.0.0.1", port), partial(SimpleHTTPRequestHandler, directory=SITE))
    Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{port} (Ctrl-C stops)")
    seen = state()
    while True:
        time.sleep(1)
        if state() == seen: continue
        seen = state()
        try: build()
        except Exception as error: print(f"not built: {error}", file=sys.stderr)
        else: print("built again")


if __name__ == "__main__":
    commands = dict(build=build, check=check, links=links, serve=serve)
    if sys.argv[1:] not in ([c] for c in commands): sys.exit(f"usage: python tools/docs.py {'|'.join(commands)}")
    os.chdir(ROOT)
    try: sys.exit(commands[sys.argv[1]]())
    except subprocess.CalledProcessError as error: sys.exit(error.returncode)
    except KeyboardInterrupt: pass
