"""The report's page: one file, readable everywhere, safe with any text, and right in a browser."""

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from report_fixtures import full_result
from report_older import without_errors

from morse.evaluation.report.render import render

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = {"meta", "img", "br", "link"}
HOSTILE = '"><script>alert(1)</script><img src="https://example.com/x.png">&amp;'
# Tells the page around it what a reader would see.
PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images];
  parent.postMessage(JSON.stringify({
    images: images.length, loaded: images.filter(image => image.naturalWidth > 0).length,
    width: innerWidth, needed: document.documentElement.scrollWidth,
    pixelated: getComputedStyle(document.querySelector(".pictures img")).imageRendering,
    requests: performance.getEntriesByType("resource").filter(
      entry => !entry.name.startsWith("data:")).length,
  }), "*");
});</script>"""
# Windows have a least width of 500 pixels, frames have none. Keeps what `PROBE` tells in its body.
FRAME = """<!DOCTYPE html><body><script>
addEventListener("message", event => { document.body.dataset.probe = event.data; });
</script><iframe src="probed.html" width="WIDTH" height="900" style="border: 0"></iframe>"""


class Page(HTMLParser):
    """Collects tags with their attributes, and checks that they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    render(full_result(), folder)
    return (folder / "benchmark.html").read_text(encoding="utf-8")


def test_the_page_is_accessible(text):
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}]
    assert [tag for tag, _ in page.tags if tag in ("h1", "title", "main")] == [
        "title",
        "main",
        "h1",
    ]
    images = page.all("img")
    assert len(images) == 4 + 1 + 6  # plots, their legend, strips
    assert all(image["alt"] for image in images)
    assert len({image["alt"] for image in images}) == len(images)
    headers = page.all("th")
    assert headers and all(cell["scope"] in ("col", "row") for cell in headers)
    assert len(page.all("caption")) == len(page.all("table"))
    anchors = [section["id"] for section in page.all("section")]
    assert len(set(anchors)) == len(anchors) and "where-morse-does-not-win" in anchors
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_claim_conditions_and_limits_come_first(text):
    places = [
        text.index(words)
        for words in (
            "2,000 images a point from each of 3 seeds, NVIDIA H100 80GB HBM3, float32, N = 6.00",
            "comparisons with the best training-free solver",
            "How many times less Morse costs",
            "morse bench --num_images 2000",
            "<h2>Quality at each budget",
        )
    ]
    assert places == sorted(places)


def test_the_page_asks_for_nothing(text):
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in text and "@import" not in text
    policy = page.all("meta")[1]["content"]
    assert policy.startswith("default-src 'none'") and "script-src" not in policy


def test_text_from_the_json_stays_text(tmp_path):
    result = copy.deepcopy(full_result())
    for row in result["rows"]:
        row["label"] = row["label"].replace("DDIM", f"DDIM {HOSTILE}")
        row["note"] = HOSTILE
    for entry in result["speedups"]:
        entry["method"], entry["note"] = HOSTILE, HOSTILE
    for axis in result["axes"].values():
        axis["title"] = axis["title"].replace("Same", HOSTILE)
    result |= dict.fromkeys(("device", "command", "reference", "real_images", "torch"), HOSTILE)
    result["not_measured"] = [HOSTILE]
    result["speed_ratio"]["how"] = HOSTILE
    result["grid"]["rows"][0]["label"] = HOSTILE
    render(result, tmp_path)
    text = (tmp_path / "benchmark.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("script")
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert "&lt;script&gt;" in text


def browse(file, folder):
    """Open a page in headless Chromium; return its document and its console's lines."""
    command = [
        CHROMIUM,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0"),
        *("--hide-scrollbars", "--virtual-time-budget=5000", "--dump-dom", file.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome")
def test_what_a_page_complains_of_would_be_seen(tmp_path):
    """The control of the tests below, framed as theirs: what is logged, thrown and refused."""
    policy = "default-src 'none'; script-src 'unsafe-inline'"
    (tmp_path / "probed.html").write_text(
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><img src="third.png">'
        "<script>console.error('first'); throw new Error('second')</script>",
        encoding="utf-8",
    )
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", "400"), encoding="utf-8")
    _, console = browse(tmp_path / "frame.html", tmp_path)
    for word in ("first", "second", "third.png"):
        assert any(word in line for line in console), word


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome")
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_the_page(text, tmp_path, width):
    probed = tmp_path / "probed.html"
    allowed = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    probed.write_text(allowed.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    dom, console = browse(frame, tmp_path)
    assert console == []
    found = re.search(r'data-probe="([^"]*)"', dom)
    probe = json.loads(found[1].replace("&quot;", '"'))
    assert probe["loaded"] == probe["images"] == 11
    assert probe["pixelated"] == "pixelated" and probe["requests"] == 0
    assert probe["needed"] <= probe["width"] == width  # only tables scroll sideways, never the page


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome")
def test_the_page_itself_gives_no_console_messages(tmp_path):
    render(without_errors(full_result()), tmp_path)
    dom, console = browse(tmp_path / "benchmark.html", tmp_path)
    assert console == [] and "<h2>Conditions</h2>" in dom
