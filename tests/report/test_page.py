"""The page: what it says, that it stands alone, and that data cannot become markup."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import json
import math
import re
from html.parser import HTMLParser

import pytest

from contextlm.base.errors import InputError
from contextlm.report import charts
from contextlm.report.page import FORMATS, render_summary, write_report
from contextlm.results.facts import EmbeddingFacts, RetrievalAccuracy
from contextlm.results.result import Run, StageMemory, read_run

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "br", "link", "input", "hr"}
FILES = ["report.md", "report.html", "figures"]


class Page(HTMLParser):
    """Tags with attributes, and each text with the classes of all elements around it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("class") or ""))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if data.strip():
            classes = {name for _, names in self.open for name in names.split()}
            self.texts.append((data.strip(), classes))

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def read(paths, name):
    return paths[name].read_text("utf-8")


@pytest.fixture(scope="module")
def paths(three_seeds, run_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "run-1"
    return write_report([run_of(three_seeds, folder)], folder, list(FORMATS))


def test_files_and_their_names(run):
    paths = write_report([run], run.folder)
    assert list(paths) == FILES
    assert all(
        path == run.folder / name and path.stat().st_size > 0 for name, path in paths.items()
    )
    assert sorted(p.name for p in run.folder.iterdir()) == sorted(FILES), "nothing else is left"
    pictures = [f"{name}.{suffix}" for name in ("curves", "frontier") for suffix in charts.FORMATS]
    assert sorted(p.name for p in (run.folder / "figures").iterdir()) == sorted(pictures)


def test_a_run_folder_read_back_gives_the_same_report(run, on_disk, tmp_path):
    on_disk(run)
    again = read_run(run.folder)
    first = write_report([run], tmp_path / "first")
    second = write_report([again], tmp_path / "second")
    assert first["report.md"].read_bytes() == second["report.md"].read_bytes()
    for one in first["figures"].glob("*.[ps][nv]g"):  # a PDF names its fonts anew each time
        assert one.read_bytes() == (second["figures"] / one.name).read_bytes(), one.name


def test_html_needs_nothing_outside_itself(paths):
    text = read(paths, "report.html")
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            if key in {"src", "srcset", "poster", "data", "action", "background"}:
                assert value.startswith("data:image/svg+xml;base64,"), (tag, key)
            if key == "href":
                assert re.fullmatch(r"[a-z]+/seed-\d/(result.json|history.jsonl|checkpoint)", value)
            assert not key.startswith("on")
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_scripts_are_those_that_the_policy_names(paths):
    text = read(paths, "report.html")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 2
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    ]
    assert rules["script-src"].split() == hashes
    assert re.findall(r"<script(?! type=\"application/json\")[^>]+>", text) == []


def test_html_is_made_for_phones_and_readers(paths):
    page = Page(read(paths, "report.html"))
    metas = page.attributes("meta")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert page.attributes("html")[0]["lang"] == "en"
    assert len(page.attributes("h1")) == 1
    images = page.attributes("img")
    assert len(images) == 2
    for image in images:
        assert len(image["alt"]) > 40
        assert base64.b64decode(image["src"].partition(",")[2]).startswith(b"<svg")
    assert len(page.attributes("table")) == len(page.attributes("caption"))


def test_the_answer_comes_first_then_tables_and_charts(paths):
    text = read(paths, "report.html")
    order = [
        text.index(said)
        for said in (
            "Does a smaller cache cost perplexity?",
            "hybrid has the lowest validation perplexity",
            '<aside class="notes"',
            "<caption>Comparison</caption>",
            "<img ",
            "Data and settings",
        )
    ]
    assert order == sorted(order)


def test_reported_and_measured_figures_are_labelled(paths):
    page = Page(read(paths, "report.html"))
    origin = dict(page.texts)
    for figure in ("471.3", "554.2", "24.9%", "3.0 MB", "1.5 MB"):
        assert "reported" in origin[figure], figure
        assert "measured" not in origin[figure], figure
    for figure in ("90.0 ± 1.0", "-10.0%", "64.0 KB", "407.5 ± 0.0"):
        assert "measured" in origin[figure], figure
        assert "reported" not in origin[figure], figure
    markdown = read(paths, "report.md")
    assert "document (reported)" in markdown
    assert "this run (measured)" in markdown
    quality = markdown.partition("## Quality")[2].partition("\n## ")[0]
    assert "measured" not in quality, "nothing reported stands beside it"


def test_both_pages_say_what_was_used(paths):
    for name in ("report.html", "report.md"):
        text = html.unescape(read(paths, name))
        for said in (
            "made-up-document.txt",
            "pydocs (Python 3.11.7)",
            "bpe:4096",
            "512,000",
            "float32",
            "  learning_rate: 0.001",
            "  torch: 2.9.0",
            "0123abc",
        ):
            assert said in text, (name, said)


def poisoned(value, keep=()):
    """Every string in a nest of mappings and lists replaced by markup, keys too."""
    if isinstance(value, dict):
        return {
            (key if key in keep else EVIL + key): value[key]
            if key in {"phase"}
            else poisoned(value[key])
            for key in value
        }
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return EVIL if isinstance(value, str) else value


def test_data_never_becomes_markup(run, tmp_path):
    outcomes = []
    for outcome in run.outcomes:
        result = outcome.result
        texts = {
            key: f"{EVIL}|`x`{getattr(result, key)}"
            for key in ("recipe", "scale", "contender", "architecture", "precision", "cache_dtype")
        }
        changes = {"name": EVIL, "tokenizer": EVIL, "unigram_ppl": 9.0}
        corpus = result.corpus.model_copy(update=changes)
        update = {**texts, "corpus": corpus, "reported": {EVIL: 1.0, "val_ppl": 9.0}}
        update["embedding"] = EmbeddingFacts(source="pretrained", path=EVIL)
        update["retrieval"] = [RetrievalAccuracy(level=EVIL, accuracy=0.5, answers=2)]
        stages = [StageMemory(stage=EVIL, host_bytes=1, accelerator_bytes=None)]
        changed = {
            "result": result.model_copy(update=update),
            "timings": outcome.timings.model_copy(update={"stages": stages}),
        }
        outcomes.append(outcome.model_copy(update=changed))
    keep = {"name", "question", "document", "training", "contenders", "model"}
    recipe = {key: poisoned(value) for key, value in run.recipe.items() if key in keep}
    recipe["contenders"] = [{"name": EVIL, "model": poisoned({"type": "x"})}]
    evil = Run(
        folder=tmp_path / EVIL.replace("/", "_"),
        recipe=recipe,
        environment=poisoned(run.environment),
        outcomes=outcomes,
    )
    paths = write_report([evil], tmp_path / "report")
    for name in ("report.html", "report.md"):
        text = read(paths, name)
        assert "&lt;script&gt;" in text
        assert EVIL not in text
    page = read(paths, "report.html")
    assert page.count("<script") == 3, "the charts' data and two scripts of ours"
    rows = [r for r in read(paths, "report.md").splitlines() if r.startswith("| ")]
    assert all("`" not in row.replace("\\`", "") for row in rows)


def test_one_seed_one_contender_no_phase_one(made, run_of, tmp_path):
    run = run_of([made(baseline=True, epochs=1)], tmp_path / "solo", document=None)
    text = read(write_report([run], run.folder), "report.html")
    assert "Only mha was measured" in text
    assert "1 seed" in text
    assert "±" not in text
    assert "Beside the document" not in text
    assert "Phase 1" not in text


def test_several_runs_in_one_report(run, made, run_of, tmp_path):
    other = run_of([made(baseline=True), made("newer", ppl=80)], tmp_path / "run-2", name="second")
    text = read(write_report([run, other], tmp_path / "joined"), "report.html")
    assert "<h1>run-1 · run-2</h1>" in text
    assert "run-1/mha (baseline)" in text
    assert "run-2/mha (baseline)" in text
    assert "newer has the lowest validation perplexity, 80.0 (1 seed): 20.0% lower" in text
    assert not (tmp_path / "run-2").exists(), "only the given folder is written to"


def test_a_diverged_contender_leaves_a_report(made, run_of, tmp_path):
    broken = {"validation_loss": 200.0, "validation_ppl": math.exp(200), "train_ppl": math.exp(200)}
    run = run_of([made(baseline=True), made("ctx", **broken)], tmp_path / "run")
    text = read(write_report([run], run.folder), "report.md")
    assert "| ctx | diverged |" in text


def test_one_table_can_be_sorted_and_holds_every_topic(paths):
    text = read(paths, "report.html").partition("<script")[0]
    containers = re.findall(r'<div class="scroll"[^>]*>\s*<table.*?</table>\s*</div>', text, re.S)
    assert len(containers) == text.count("<table")
    (table,) = [one for one in containers if 'class="sortable"' in one]
    for heading in ("PPL vs baseline", "bits per byte", "iterations", "at 2,048 tokens", "by seed"):
        assert f"<button>{heading}" in table
    assert 'href="hybrid/seed-1/checkpoint"' in table
    width = len(re.findall(r"<th scope=\"col\"", table))
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", table, re.S)
    assert [row.count("<td") + 1 for row in rows] == [width] * 3


def test_no_report_says_that_anybody_wins(paths):
    for name in ("report.md", "report.tex", "report.json"):
        assert not re.search(r"\b(wins|loses|won|lost)\b", read(paths, name))


def test_formats_for_papers_and_programs(paths, run, tmp_path):
    rows = list(csv.DictReader(read(paths, "report.csv").splitlines()))
    assert [row["name"] for row in rows] == ["mha", "hybrid", "compressed"]
    assert (rows[1]["validation_ppl.mean"], rows[1]["validation_ppl.sd"]) == ("90.0", "1.0")
    assert rows[1]["seeds"] == "0 1 2"
    assert float(rows[1]["difference.high"]) < 0
    facts = json.loads(read(paths, "report.json"))
    assert facts["rows"][1]["verdict"] == "lower"
    assert facts["answers"][0].startswith("hybrid has the lowest")
    assert len(facts["results"]) == 9
    latex = read(paths, "report.tex")
    assert "\\toprule\ncontender & validation PPL (measured) &" in latex
    assert "hybrid & 90.0 $\\pm$ 1.0 & -10.0\\%" in latex
    alone = write_report([run], tmp_path / "one", ["csv"])
    assert list(alone) == ["report.csv", "figures"]


def test_a_folder_of_figures_that_leads_elsewhere_is_refused(run, tmp_path):
    run.folder.mkdir()
    (run.folder / "figures").symlink_to(tmp_path)
    with pytest.raises(InputError, match="leads out of the run folder"):
        write_report([run], run.folder)
    assert not (run.folder / "report.md").exists()


def test_nothing_to_report_is_an_input_error(run_of, tmp_path):
    with pytest.raises(InputError, match="no run"):
        write_report([], tmp_path)
    with pytest.raises(InputError, match="no contender has finished"):
        write_report([run_of([], tmp_path)], tmp_path)


def test_older_run_folders_still_render(run, on_disk, tmp_path):
    on_disk(run)
    newer = {
        "result.json": {"train_ppl_windows", "embedding", "store", "retrieval", "job", "setting"},
        "timings.json": {"store_seconds", "stages"},
    }
    for place in run.folder.glob("*/seed-*"):
        for name, unknown in newer.items():
            facts = json.loads((place / name).read_text("utf-8"))
            facts = {key: value for key, value in facts.items() if key not in unknown}
            if "corpus" in facts:
                del facts["corpus"]["unigram_ppl"]
            (place / name).write_text(json.dumps(facts), "utf-8")
    text = read(write_report([read_run(run.folder)], tmp_path / "older"), "report.md")
    assert "hybrid has the lowest validation perplexity" in text
    for absent in ("Context stores", "unigram PPL |", "embeddings |"):
        assert absent not in text


def test_the_summary_holds_the_answer_the_comparison_and_the_notes(run):
    text = render_summary([run])
    first, *_ = text.splitlines()
    assert first.startswith("hybrid has the lowest validation perplexity")
    for said in ("| contender | validation PPL", "95% intervals: paired t", "- Not the document's"):
        assert said in text
    for told_elsewhere in ("Terms", "effective rank, training stream |"):
        assert told_elsewhere not in text


def test_an_environment_that_is_no_mapping_is_an_input_error(run, on_disk):
    on_disk(run)
    (run.folder / "environment.json").write_text("[]")
    with pytest.raises(InputError, match=r"environment\.json: not a mapping"):
        read_run(run.folder)
