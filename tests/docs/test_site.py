"""The documentation site is built once, without a warning, and looked at: links, anchors, names, and in a browser."""
import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest

for module in ("sphinx", "myst_nb", "furo", "sphinx_design", "sphinx_copybutton"):
    pytest.importorskip(module, reason=f"the docs need {module}: pip install -e .[docs]")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import pages  # noqa: E402
from notebooks import notebooks  # noqa: E402

from learner.loop.stages import TREE  # noqa: E402


class Page(HTMLParser):
    "The anchors of a page, its links, and what it loads."

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads, self.text = set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        if tag == "link" and attrs.get("rel") not in ("canonical",): self.loads.append(attrs.get("href", ""))
        if attrs.get("src"): self.loads.append(attrs["src"])

    def handle_endtag(self, tag):
        if tag not in ("a", "code", "em", "span", "strong"): self.text.append("\n")

    def handle_data(self, data): self.text.append(data)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The folders of the pages and of the sources that they were made of."
    out, sources = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("sources")
    done = subprocess.run([sys.executable, "docs/build.py", str(out), str(sources)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return out, sources


@pytest.fixture(scope="module")
def site(built): return built[0]


@pytest.fixture(scope="module")
def parsed(site): return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def faults_of_links(site, parsed):
    "Every link within the site that leads nowhere."
    for name, page in parsed.items():
        for link in page.links:
            if urlparse(link).scheme or link.startswith("//"): continue
            path, anchor = urldefrag(urljoin(f"/{name}", link))
            path = unquote(path).lstrip("/")
            if not (site / path).is_file(): yield f"{name}: {link} leads nowhere"
            elif anchor and path in parsed and unquote(anchor) not in parsed[path].anchors:
                yield f"{name}: {link} has no such anchor"


def test_every_internal_link_and_anchor_is_there(site, parsed):
    assert len(parsed) > 200
    assert sum(len(page.links) for page in parsed.values()) > 10_000
    assert [*faults_of_links(site, parsed)] == []


def test_links_are_relative(parsed):
    "So the site may lie in a folder of a host, or be opened from the disk."
    assert [f"{name}: {link}" for name, page in parsed.items() for link in [*page.links, *page.loads] if link.startswith("/")] == []


def test_a_link_that_leads_nowhere_would_be_found(site, parsed, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text('<a href="nowhere.html">x</a><a href="index.html#nothing">y</a>', encoding="utf-8")
    assert [*faults_of_links(site, {"bad.html": Page(path), "index.html": parsed["index.html"]})] == [
        "bad.html: nowhere.html leads nowhere", "bad.html: index.html#nothing has no such anchor"]


def test_nothing_is_loaded_from_another_host(site, parsed):
    outside = {f"{name}: {address}" for name, page in parsed.items() for address in page.loads
               if urlparse(address).scheme not in ("", "data") or address.startswith("//")}
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        outside |= {f"{path.name}: {address}" for address in re.findall(r"(?:url\(|@import )[\"' ]*(https?:[^\"')]+)", text)}
    assert outside == set()


def test_no_directive_and_no_empty_cell_is_shown(built):
    cells = 0
    for path in built[1].rglob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            assert source.strip(), path
            assert cell["cell_type"] != "code" or not re.search(r"^#\|", source, re.MULTILINE), path
            cells += 1
    assert cells > 2000
    assert "#| export" not in (built[0] / "nbs/loop/loop.html").read_text(encoding="utf-8")


def test_every_public_name_has_its_place(parsed):
    for name in pages.main_names(): assert f"reference/{name}.html" in parsed
    for short, module in pages.modules().items():
        text = "".join(parsed[f"reference/modules/{short}.html"].text)
        assert [name for name in pages.public(module) if not re.search(rf"\b{name}\b", text)] == [], short


def test_arguments_are_explained(parsed):
    text = " ".join("".join(parsed["reference/EarlyStopping.html"].text).split())
    assert "patience: int, default 3 How many epochs without an improvement end training." in text


def test_all_hooks_and_fixtures_are_on_one_page(parsed):
    text = {*re.findall(r"\w+", "".join(parsed["reference/hooks.html"].text))}
    assert {f"{kind}_{stage}" for stage in TREE.stages for kind in ("before", "around", "after", "cancelled", "cleanup")} <= text
    assert TREE.fixtures() | {*TREE.groups} <= text
    assert {stage.cancel.__name__ for stage in TREE.stages.values() if stage.cancel} <= text


def test_every_error_has_an_example_that_was_raised(parsed):
    page = parsed["reference/errors.html"]
    assert {name.lower() for name in pages.errors()} <= page.anchors
    assert "Typo.after_bacth names no stage; did you mean after_batch?" in "".join(page.text)


def test_every_command_is_there(parsed):
    from learner.runs import cli
    text = "".join(parsed["reference/command_line.html"].text)
    for command in ("train", "resume", "evaluate", "rerun", "scores", "compare", "show", "configs"):
        assert f"usage: learner {command}" in text
    assert cli.help_text() in text


def test_every_example_is_in_the_gallery(site, parsed):
    page = parsed["gallery/index.html"]
    for name in [*(path.stem for path in notebooks("examples")), "own_trainer"]:
        assert any(f"nbs/examples/{name}" in link for link in page.links), name
        assert any(address.endswith(f"{name}.png") for address in page.loads), name
    assert not [address for address in page.loads if not (site / "gallery" / unquote(address).split("?")[0]).resolve().is_file()]


def test_the_reference_is_one_file_too(site):
    whole, index = (site / "learner.md").read_text(encoding="utf-8"), (site / "llms.txt").read_text(encoding="utf-8")
    for name in pages.main_names():
        assert f"\n# {name}\n" in whole
        assert f"(reference/{name}.html)" in index
    assert "after_any_batch" in whole and "meta.json" in whole
    for path in (ROOT / "docs/start").glob("[!.]*.ipynb"): assert f"(start/{path.stem}.html)" in index
    for name in ("WholeStep", "Distributed", "launch", "export", "verify"): assert re.search(rf"\b{name}\b", index), name
    for link in re.findall(r"\]\(([^)]+)\)", index): assert (site / link).is_file(), link


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--no-first-run", "--disable-quic"]
SEEN = ("index", "start/ten_minutes", "start/trainer", "start/background", "start/faster", "coming_from/lightning", "reference/Learner", "reference/hooks",
        "reference/command_line", "gallery/index", "nbs/loop/loop", "nbs/watch/measured")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright: pip install playwright")
    if CHROMIUM is None: pytest.skip("chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def watched(browser, address, **options):
    "A page, and the list of what went wrong on it."
    page, faults = browser.new_context(**options).new_page(), []
    page.on("request", lambda request: request.url.startswith((address, "data:")) or faults.append(f"asks for {request.url}"))
    page.on("response", lambda response: response.status < 400 or faults.append(f"{response.status} {response.url}"))
    page.on("pageerror", lambda error: faults.append(str(error)))
    return page, faults


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_pages_in_a_browser_without_a_network(address, browser, width, scheme):
    page, faults = watched(browser, address, viewport={"width": width, "height": 900}, color_scheme=scheme)
    for name in SEEN:
        page.goto(f"{address}/{name}.html")
        too_wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if too_wide > 0: faults.append(f"{name} is {too_wide} pixels wider than {width}")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", ground)[:3])) > 380
    assert faults == []
    assert light == (scheme == "light")


SOUGHT = {"EarlyStopping": "reference/EarlyStopping.html", "WholeStep": "start/faster.html", "watch_run": "start/background.html",
          "launch": "start/several_processes.html", "verify": "start/use_a_model.html", "predict": "start/use_a_model.html"}


def test_search_works_without_a_network(address, browser):
    page, faults = watched(browser, address)
    for word, wanted in SOUGHT.items():
        page.goto(f"{address}/index.html")
        page.fill(".sidebar-search", word)
        page.press(".sidebar-search", "Enter")
        page.wait_for_selector("ul.search li a")
        page.wait_for_function("document.querySelector('.search-summary').textContent.includes('found')")
        found = page.eval_on_selector_all("ul.search li a", "links => links.map(link => link.getAttribute('href'))")
        assert any(link.startswith(wanted) for link in found), (word, found[:10])
    assert faults == []
