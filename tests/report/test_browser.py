"""The page in a real browser: it sorts, hovers, complains of nothing, fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess

import pytest

from contextlm.report.page import write_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
EVIL = "<img src=x onerror=alert(1)>"
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome on the path")

# Runs before the page's scripts and, when the charts are drawn, uses the page as a person would.
PROBE = """
const seen = { errors: [], violations: [] };
console.error = (...what) => seen.errors.push(what.join(" "));
console.warn = console.error;
addEventListener("error", (event) => seen.errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => seen.violations.push(event.blockedURI));
const names = () => [...document.querySelectorAll("table.sortable tbody th")].map(
  (cell) => cell.textContent);
function sorted(heading) {
  const heads = [...document.querySelectorAll("table.sortable thead button")];
  heads.find((head) => head.textContent === heading).click();
  return names();
}
function use() {
  seen.drawn = document.querySelectorAll("figure.drawn").length;
  seen.before = names();
  seen.up = sorted("validation PPL (measured)");
  seen.down = sorted("validation PPL (measured)");
  seen.bytes = sorted("cache at 128 tokens (measured)");
  const shown = () => getComputedStyle(document.querySelector("td.of-1")).display;
  seen.topics = [shown()];
  document.querySelector(".topics input[value='1']").click();
  seen.topics.push(shown());
  const dot = document.querySelector("[data-chart='frontier'] .mark-symbol path");
  const box = dot.getBoundingClientRect();
  const where = { bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
  for (const kind of ["pointerover", "pointermove", "mouseover", "mousemove"])
    dot.dispatchEvent(new MouseEvent(kind, where));
  seen.hover = document.getElementById("vg-tooltip-element")?.textContent ?? "";
  seen.fetched = performance.getEntriesByType("resource").map((entry) => entry.name).filter(
    (name) => !name.startsWith("data:"));
  seen.evil = document.querySelectorAll("img[src='x']").length;
  const told = document.createElement("pre");
  told.id = "seen";
  told.textContent = JSON.stringify(seen);
  document.body.append(told);
}
function wait() {
  const charts = document.querySelectorAll("figure").length;
  const drawn = document.querySelectorAll("figure.drawn").length;
  if (document.readyState === "complete" && drawn === charts) use(); else setTimeout(wait, 50);
}
addEventListener("load", wait);
"""


@pytest.fixture(scope="module")
def seen(three_seeds, run_of, tmp_path_factory):
    """What `PROBE` saw on the page, with a contender whose name is markup."""
    folder = tmp_path_factory.mktemp("browser")
    evil = [
        one.model_copy(update={"result": one.result.model_copy(update={"contender": EVIL})})
        if one.result.contender == "hybrid"
        else one
        for one in three_seeds
    ]
    page = write_report([run_of(evil, folder / "run")], folder, ["html"])["report.html"]
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    text = page.read_text("utf-8").replace("script-src ", f"script-src 'sha256-{digest}' ")
    page.write_text(text.replace("<title>", f"<script>{PROBE}</script><title>"), "utf-8")
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--disable-background-networking", "--virtual-time-budget=30000"),
            *("--window-size=1200,900", f"--user-data-dir={folder / 'profile'}", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    told = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(told)


def test_every_chart_is_drawn_without_a_complaint(seen):
    assert seen["drawn"] == 2
    assert (seen["errors"], seen["violations"]) == ([], [])


def test_nothing_is_fetched(seen):
    assert seen["fetched"] == []


def test_a_column_sorts_by_its_figures(seen):
    assert seen["before"] == ["mha (baseline)", EVIL, "compressed"]
    assert seen["up"] == [EVIL, "mha (baseline)", "compressed"]
    assert seen["down"] == seen["up"][::-1]
    assert seen["bytes"][-1] == "mha (baseline)", "64 KB stand before 128 KB"


def test_a_topic_shows_its_columns(seen):
    assert seen["topics"] == ["none", "table-cell"]


def test_hovering_tells_the_figures(seen):
    assert "1" in seen["hover"]
    assert any(figure in seen["hover"] for figure in ("90.0 ± 1.0", "100.0 ± 1.0", "110.0 ± 1.0"))


def test_a_hostile_name_stays_text(seen):
    assert seen["evil"] == 0
