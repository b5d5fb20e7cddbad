"""The site, from the notebooks into `_docs`: `python tools/docs.py build|check|serve`.

nbdev stages the notebooks (hidden cells dropped, API tables added); Quarto renders them where it is installed, else smalldocs.
What smalldocs leaves to other hosts is brought home afterwards: formulas become MathML, and no page loads anything from elsewhere.
"""
import os, re, shutil, subprocess, sys, time
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
KATEX = re.compile(r'<(?:link|script)[^>]*cdn\.jsdelivr\.net/npm/katex[^>]*>(?:</script>)?\s*')
WEB_FONT = re.compile(r'@import url\((["\']?)https?:.*?\1\);')


def stage():
    """Let nbdev prepare the notebooks in `_proc`.

    Its absolute links to this site become relative, so that they work anywhere, and `output-file`, which says nothing new and which
    smalldocs doesn't know, goes.
    """
    from nbdev.config import get_config
    from nbdev.serve import proc_nbs
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:nbdev.processors"  # of cells that import and do more: see CONTRIBUTING.md
    proc_nbs(n_workers=2, force=True)
    cfg = get_config()
    home = f"{cfg.doc_host}{cfg.doc_baseurl}/"
    for page in STAGE.rglob("*.ipynb"):
        up = "../"*len(page.relative_to(STAGE).parent.parts) or "./"
        text = page.read_text(encoding="utf-8").replace(home, up)
        page.write_text(re.sub(r"output-file: [\w.-]+\\n", "", text), encoding="utf-8")


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
    command = [quarto, "render", str(STAGE), "--no-cache"] if quarto else [str(Path(sys.executable).parent/"smalldocs"), "render", "-q", "--strict", str(STAGE)]
    subprocess.run(command, check=True)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(STAGE/"_docs", SITE)
    if quarto: return
    for page in SITE.rglob("*.html"):
        page.write_text(FORMULA.sub(mathml, KATEX.sub("", page.read_text(encoding="utf-8"))), encoding="utf-8")
    for style in SITE.rglob("*.css"):
        style.write_text(WEB_FONT.sub("", style.read_text(encoding="utf-8")), encoding="utf-8")


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
    "Links of the built site that lead nowhere, and things that its pages load from another host."
    pages = {path: Page(path) for path in SITE.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for url in page.links + page.loads:
            to = urlsplit(url)
            name = path.relative_to(SITE)
            if to.scheme or to.netloc:
                if url in page.loads and to.scheme != "data": found.append(f"{name} loads {url} from another host")
                continue
            there = (path.parent/unquote(to.path)).resolve() if to.path else path
            if there.is_dir(): there = there/"index.html"
            if not there.exists(): found.append(f"{name} links to {url}, which does not exist")
            elif to.fragment and there in pages and unquote(to.fragment) not in pages[there].ids:
                found.append(f"{name} links to {url}, but there is no such place on that page")
    return found


def check():
    "Build, and exit with 1 if a link is broken."
    build()
    found = problems()
    print("\n".join(found) if found else f"{len(list(SITE.rglob('*.html')))} pages, no broken link")
    return bool(found)


def serve(port=8000):
    "Build, serve on this machine, and build again whenever a source changes."
    def state(): return max(f.stat().st_mtime for f in [*(ROOT/"nbs").rglob("*"), *ROOT.glob("*.md"), ROOT/"_quarto.yml"] if f.is_file())
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
    commands = dict(build=build, check=check, serve=serve)
    if sys.argv[1:] not in ([c] for c in commands): sys.exit(f"usage: python tools/docs.py {'|'.join(commands)}")
    os.chdir(ROOT)
    try: sys.exit(commands[sys.argv[1]]())
    except subprocess.CalledProcessError as error: sys.exit(error.returncode)
    except KeyboardInterrupt: pass
