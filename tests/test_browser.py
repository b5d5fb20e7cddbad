"""The site in a real browser: Chromium without a window, which may talk to this machine only.

Every page is opened once, at two widths, light and dark; `PROBE` notes what is on it, and each test asks one question
of all pages.
Skipped where there is no Chromium with its driver, unless `NEED_BROWSER` is set, as continuous integration does.
"""
import json, os, re, shutil, sys, time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/"tools"))
import docs

PAGES = sorted(p.relative_to(ROOT/"nbs").with_suffix(".html").as_posix() for kind in ("*.ipynb", "*.md")
               for p in (ROOT/"nbs").rglob(kind) if ".ipynb_checkpoints" not in p.parts)
WIDTHS, SCHEMES, CONTRAST = (1300, 390), ("light", "dark"), 4.5             # contrast: what WCAG 2 (AA) asks of text
VETO = "tutorials/03_veto.html"

PROBE = r"""
const [contrast] = arguments, main = document.querySelector("main"), all = s => [...main.querySelectorAll(s)]
const shown = e => { const r = e.getBoundingClientRect(); return r.width > 0 && r.height > 0 }
const right = e => shown(e) ? e.getBoundingClientRect().right : 0
const scrolls = e => /auto|scroll/.test(getComputedStyle(e).overflowX)
const boxed = e => e != main && (scrolls(e.parentElement) || boxed(e.parentElement)) // scrolls in a box of its own
const text = e => e.textContent.trim().slice(0, 60)
document.querySelectorAll("details").forEach(d => d.open = true)
const rgba = c => { const [r, g, b, a = 1] = c.match(/[\d.]+/g).map(Number); return [r, g, b, a] }
const linear = x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4
const light = ([r, g, b]) => .2126*linear(r) + .7152*linear(g) + .0722*linear(b)
const over = (top, below) => [0, 1, 2].map(i => top[i]*top[3] + below[i]*(1 - top[3])).concat(1)
const ground = e => {
  const c = rgba(getComputedStyle(e).backgroundColor)
  if (c[3] == 1 || !e.parentElement) return c[3] ? c : [255, 255, 255, 1]
  return over(c, ground(e.parentElement))
}
const faint = e => {
  const below = ground(e), ink = over(rgba(getComputedStyle(e).color), below)
  const [a, b] = [light(ink), light(below)].sort((x, y) => y - x)
  return (a + .05) / (b + .05) < contrast
}
const own = e => [...e.childNodes].filter(n => n.nodeType == 3).map(n => n.data).join("")
const named = e => `${e.tagName}.${e.className}: ${text(e)}`
const texts = all("*").filter(e => !e.closest("svg") && shown(e) && own(e).trim())
const prose = all("p, li, td, th, figcaption, h1, h2, h3").filter(e => !e.closest("pre, .cell-output"))
const root = document.scrollingElement
return {
  title: document.title, headings: all("h2").length, contents: !!document.querySelector("#TOC a"),
  wide: (root.scrollWidth > root.clientWidth ? ["the window scrolls"] : []).concat(
    all("*").filter(e => right(e) > right(main) + 1 && !boxed(e)).slice(0, 5).map(named)),
  faint: texts.filter(faint).slice(0, 5).map(named),
  formulas: all("math").length,
  flat: all("math").filter(e => !shown(e) || e.querySelector("merror")).map(text),
  raw: prose.filter(e => /\\\(|\\\[|\$\$|\\frac|\\mathrm/.test(own(e))).map(text),
  figures: all("img").length,
  blank: all("img").filter(i => !i.complete || !i.naturalWidth || !shown(i)).length,
  silent: all("img").filter(i => !(i.alt || "").trim()).length,
  ids: [...document.querySelectorAll("[id]")].map(e => e.id),
  links: [...document.querySelectorAll("a[href]")].map(a => a.href),
  loads: performance.getEntriesByType("resource").map(e => e.name),
  head: Object.fromEntries([...document.querySelectorAll("meta[property], meta[name], link[rel=icon]")].map(
    m => [m.getAttribute("property") || m.name || "icon", m.content || m.href])),
}"""


IS_DARK = "return [document.documentElement, document.body].some(e => e.classList.contains('quarto-dark'))"


def missing():
    "Why there is no browser to test with, or `None`."
    if sys.version_info < (3, 11): return "smalldocs needs Python 3.11"
    try: import selenium                                                    # noqa: F401
    except ImportError: return "selenium is not installed"
    if not browser_path(): return "Chromium is not installed (Debian: apt-get install chromium chromium-driver)"
    if not shutil.which("chromedriver"):
        return "Chromium's driver is not installed (Debian: apt-get install chromium-driver)"


def browser_path():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


if missing() and (sys.version_info < (3, 11) or not os.environ.get("NEED_BROWSER")):
    pytestmark = pytest.mark.skip(reason=missing())


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def home(site):
    "The address of the site, served by this machine."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    assert not missing(), missing()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = browser_path()
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars",
                 "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync",
                 "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def look(browser, width=1300, scheme="light"):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia",
                            {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600})


def until(found, seconds=10):
    "Ask again and again until the answer is true."
    end = time.monotonic() + seconds
    while not (answer := found()) and time.monotonic() < end: time.sleep(0.05)
    return answer


def complaints(browser):
    "What the console and the network had to complain of since the last call, and what was asked of other hosts."
    found = [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    asked = {}
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        about, kind = message["params"], message["method"]
        if kind == "Network.requestWillBeSent": asked[about["requestId"]] = about["request"]["url"]
        if kind == "Network.loadingFailed" and not about.get("canceled"):
            found.append(f"{asked.get(about['requestId'])} failed: {about['errorText']}")
        if kind == "Network.responseReceived" and about["response"]["status"] >= 400:
            found.append(f"{about['response']['url']} is {about['response']['status']}")
    return found + [f"asked for {url}" for url in asked.values() if urlsplit(url).scheme in ("http", "https")
                    and urlsplit(url).hostname != "127.0.0.1"]


@pytest.fixture(scope="module")
def visits(home, browser):
    "What each page looked like: page -> (width, scheme) -> notes, and page -> complaints."
    notes, errors = {}, {}
    for page in PAGES:
        look(browser)
        browser.get(home + page)
        for scheme in SCHEMES:
            for width in WIDTHS:
                look(browser, width, scheme)
                until(lambda: browser.execute_script(IS_DARK) == (scheme == "dark"), 2)
                notes[page, width, scheme] = browser.execute_script(PROBE, CONTRAST)
        errors[page] = complaints(browser)
    look(browser)
    return notes, errors


def bad(visits, what):
    "The pages on which there is some of `what`."
    return {where: note[what] for where, note in visits[0].items() if note[what]}


def test_no_page_complains_or_asks_another_host(visits): assert {page: e for page, e in visits[1].items() if e} == {}
def test_nothing_overflows_sideways(visits): assert bad(visits, "wide") == {}
def test_text_stands_out_from_its_ground(visits): assert bad(visits, "faint") == {}


def test_formulas_are_drawn(visits):
    assert bad(visits, "flat") == bad(visits, "raw") == {}
    assert sum(note["formulas"] for (_, width, scheme), note in visits[0].items()
               if (width, scheme) == (1300, "light")) > 300


def test_figures_are_visible_and_described(visits):
    assert bad(visits, "blank") == bad(visits, "silent") == {}
    assert sum(note["figures"] for (_, width, scheme), note in visits[0].items()
               if (width, scheme) == (390, "dark")) > 20


def test_long_pages_have_contents(visits):
    assert [page for page, note in visits[0].items() if note["headings"] > 1 and not note["contents"]] == []


def test_links_and_anchors_lead_somewhere(visits, home, site):
    ids = {page: set(visits[0][page, 1300, "light"]["ids"]) for page in PAGES}
    lost = []
    for page in PAGES:
        for url in visits[0][page, 1300, "light"]["links"]:
            if not url.startswith(home): continue
            path, _, anchor = url.removeprefix(home).partition("#")
            path = path if path and not path.endswith("/") else path + "index.html"
            if not (site/path).is_file() or (anchor and path in ids and anchor not in ids[path]):
                lost.append((page, url))
    assert lost == []


def test_pages_have_an_icon_and_a_card(visits, home):
    for page in PAGES:
        head = visits[0][page, 1300, "light"]["head"]
        assert head["icon"] == home + "images/favicon.svg" and head["og:title"] and head["viewport"]
        assert head["og:image"].endswith("/images/card.png") and head["twitter:card"] == "summary_large_image"


def test_links_to_other_hosts_are_well_formed(site):
    urls = docs.external()
    assert len(urls) > 20
    assert [u for u in urls if not re.fullmatch(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/[^\s<>\"\\^`{|}]*)?", u)] == []
    assert [u for u in urls if "arxiv.org/" in u
            and not re.fullmatch(r"https://arxiv\.org/(abs|pdf)/\d{4}\.\d{4,5}(v\d+)?", u)] == []
    ours = re.compile(r"https://github\.com/gated-symile/gated_symile/blob/main/([^#?]+)(?:#L(\d+))?|"
                      r"https://colab\.research\.google\.com/github/gated-symile/gated_symile/blob/main/(.+)")
    for url in urls:
        if m := ours.fullmatch(url):
            file = ROOT/(m.group(1) or m.group(3))
            assert file.is_file(), f"{url}, on {urls[url]}: we have no such file"
            lines = file.read_text(encoding="utf-8").splitlines()
            assert int(m.group(2) or 1) <= len(lines), f"{url}: the file is shorter"


@pytest.mark.parametrize("width", WIDTHS)
def test_search_finds_what_it_is_asked_for(browser, home, site, width):
    for start in (home + "index.html", (site/"api/core.html").as_uri()):     # served, and opened as a file
        look(browser, width)
        browser.get(start)
        complaints(browser)
        if width < 600: browser.find_element("css selector", ".navbar-toggler").click()
        box = browser.find_element("css selector", "#quarto-search input")
        assert until(box.is_displayed)
        time.sleep(0.5)                                                     # the menu unfolds
        box.send_keys("neutral direction")
        found = "return [...document.querySelectorAll('.search-result')].map(a => a.href)"
        results = until(lambda: browser.execute_script(found))
        assert any(url.split("#")[0].endswith("api/neutral.html") for url in results[:5])
        assert complaints(browser) == []
        browser.execute_script("arguments[0].click()", browser.find_element("css selector", ".search-result"))
        assert until(lambda: browser.current_url != start)
        assert "neutral" in browser.find_element("css selector", "main").text.lower()


def test_the_reader_chooses_light_or_dark(browser, home):
    def dark():
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] < 128")
    look(browser)
    browser.get(home + "index.html")
    assert not dark()
    browser.find_element("css selector", ".quarto-color-scheme-toggle").click()
    assert until(dark)
    browser.get(home + VETO)
    assert until(dark)
    browser.find_element("css selector", ".quarto-color-scheme-toggle").click()
    assert until(lambda: not dark())


def test_code_can_be_copied(browser, home):
    look(browser)
    browser.get(home + "index.html")
    browser.execute_cdp_cmd("Browser.grantPermissions",
                            {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": home})
    block = browser.find_element("css selector", "main .code-copy-outer-scaffold")
    browser.execute_script("arguments[0].querySelector('.code-copy-button').click()", block)
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, e => done(''))"
    copied = until(lambda: browser.execute_async_script(read))
    assert copied.strip() == block.find_element("css selector", "code").get_property("innerText").strip()


# The interactive figure

def state(browser):
    "The angle of the figure, and what it says of both scores."
    return browser.execute_script("""
        const f = document.querySelector('.veto')
        return [+f.querySelector('output').textContent, f.querySelector('input').getAttribute('aria-valuetext'),
                ...['product', 'pairs'].map(n => f.querySelector(`[data-says=${n}]`).textContent)]""")


def centre(browser, selector):
    return browser.execute_script("""
        const e = document.querySelector(arguments[0])
        e.scrollIntoView({block: 'center', behavior: 'instant'})
        const r = e.getBoundingClientRect()
        return [r.x + r.width/2, r.y + r.height/2, r.width, r.height]""", selector)


@pytest.fixture
def veto(browser, home):
    def opened(width=1300):
        look(browser, width)
        browser.get(home + VETO)
        angle, said, product, pairs = state(browser)
        assert (angle, "finds the true one" in product, "finds the true one" in pairs) == (0, True, True)
        return browser
    return opened


def test_the_figure_follows_the_mouse(veto):
    from selenium.webdriver import ActionChains
    browser = veto()
    dial = browser.find_element("css selector", ".veto .dial")
    x, y, width, height = centre(browser, ".veto .dial")
    hand = ActionChains(browser).move_to_element_with_offset(dial, int(0.3*width), 0).click_and_hold()
    hand.move_to_element_with_offset(dial, 0, -int(0.3*height)).release().perform()
    angle, said, product, pairs = state(browser)
    assert abs(angle - 90) <= 3 and "finds the true one" not in product and "finds the true one" in pairs
    assert said.startswith(f"{angle} degrees")


def test_the_figure_follows_the_keyboard(veto):
    from selenium.webdriver.common.keys import Keys
    browser = veto()
    slider = browser.find_element("css selector", ".veto input")
    slider.send_keys(Keys.ARROW_RIGHT * 3)
    assert state(browser)[0] == 3
    slider.send_keys(Keys.END)
    angle, said, product, pairs = state(browser)
    assert angle == 180 and "true: -2.00" in product and said.startswith("180 degrees")
    slider.send_keys(Keys.HOME)
    assert state(browser)[0] == 0


def test_the_figure_follows_a_finger(veto):
    browser = veto(390)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        x, y, width, height = centre(browser, ".veto .dial")
        assert min(width, height) >= 44 and centre(browser, ".veto input")[3] >= 44
        x, y, width, height = centre(browser, ".veto .dial")
        for kind, point in (("touchStart", [x + 0.3*width, y]), ("touchMove", [x, y - 0.3*height]),
                            ("touchMove", [x - 0.3*width, y]), ("touchEnd", None)):
            browser.execute_cdp_cmd("Input.dispatchTouchEvent",
                                    {"type": kind, "touchPoints": [dict(x=point[0], y=point[1])] if point else []})
        assert until(lambda: abs(state(browser)[0] - 180) <= 5)
    finally: browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
