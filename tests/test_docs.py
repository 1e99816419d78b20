"""The docs site: built once from the notebooks of this repository, its links followed, its pages opened in a browser; and a small site of a few pages, for what can go wrong."""
import http.server
import json
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import REPO, assert_user_error, drawn, nanochat, nanochat_process

from nanochat.lab.docs import MARK, build_docs, check_site, docs_server, search_script, serve_docs

pytest.importorskip("nbdev", reason="the docs are built with the dev group")
pytest.importorskip("smalldocs", reason="the docs are built with the dev group")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site of this repository, built by the command."
    out, base, started = tmp_path_factory.mktemp("site")/"docs", tmp_path_factory.mktemp("base"), time.perf_counter()
    done = nanochat_process(base, "docs", "--out", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(f"built in {time.perf_counter() - started:.0f} s")
    assert "note:" not in done.stdout, done.stdout
    assert str(out) in done.stdout, done.stdout
    return out


@pytest.fixture(scope="module")
def address(site):
    "Where the site is served while these tests run."
    sock = docs_server(0)
    threading.Thread(target=serve_docs, args=(site, sock), daemon=True).start()
    return f"http://127.0.0.1:{sock.getsockname()[1]}/"


@pytest.fixture(scope="module")
def watched(browser, address):
    "A page that keeps what went wrong on it, and that no request leaves this machine from: (page, faults)."
    page, faults = browser.new_page(), []
    def pass_on(route):
        if route.request.url.startswith((address, "data:", "blob:")): route.continue_()
        else:
            faults.append(f"{page.url} asks for {route.request.url}")
            route.abort()
    page.route("**/*", pass_on)
    page.on("console", lambda message: faults.append(f"{page.url}: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(f"{page.url}: {error}"))
    page.on("response", lambda response: faults.append(f"{page.url}: {response.status} for {response.url}") if response.status >= 400 else None)
    return page, faults


@pytest.fixture
def visitor(watched):
    "The same page, of which nothing bad is known yet."
    watched[1].clear()
    return watched


def sources(*patterns):
    "The pages that must be there: the sources of this repository, by their paths in the site."
    return [path.relative_to(REPO).with_suffix(".html").as_posix() for pattern in patterns for path in sorted(REPO.glob(pattern))]


def test_every_source_has_its_page(site):
    for page in sources("nbs/**/*.ipynb", "lessons/*.ipynb"): assert (site/page).is_file(), page
    for page in sources("nbs/guide/*.md"): assert (site/page).is_file() or page == "nbs/guide/index.html", page
    for path in (REPO/"nanochat").rglob("[a-z]*.py"):
        assert (site/"source"/path.relative_to(REPO/"nanochat").with_suffix(".html")).is_file(), path
    home, guide = (site/"index.html").read_text(), (REPO/"nbs"/"guide"/"index.md").read_text()
    title = re.search(r"^(?:title: *|# )(.+)$", guide, re.M)[1].strip("\"'")
    assert re.search(rf"<h1[^>]*>\s*{re.escape(title)}", home), title


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_outside(site):
    assert check_site(site) == []
    # and the check can fail: the same site, with one word of one link changed
    page = site/"index.html"
    text = page.read_text()
    try:
        page.write_text(text.replace("</main>", '<a href="nbs/model/14_gpt.html#no-such-place">x</a><img src="https://images.invalid/x.png"></main>', 1))
        assert sorted(check_site(site)) == ["index.html loads https://images.invalid/x.png", "index.html: nbs/model/14_gpt.html#no-such-place has no such anchor"]
    finally: page.write_text(text)


def test_signatures_lead_to_their_lines(site):
    page = (site/"nbs"/"model"/"14_gpt.html").read_text()
    lines = (REPO/"nanochat"/"model"/"gpt.py").read_text().splitlines()
    number = int(re.search(r'href="\.\./\.\./source/model/gpt\.html#L(\d+)"[^>]*>source</a>(?:(?!<h3).)*<h3[^>]*id="gptconfig"', page, re.S)[1])
    assert any(line.startswith("class GPTConfig") for line in lines[number - 1:number + 2]), lines[number - 1]
    code = (site/"source"/"model"/"gpt.html").read_text()
    ids = re.findall(r'<span id="L(\d+)">', code)
    assert ids == [str(n) for n in range(1, len(lines) + 1)]
    # what stands after an anchor is that line
    where = next(n for n, line in enumerate(lines, 1) if line.startswith("class GPTConfig"))
    line = re.sub(r"<[^>]+>", "", code.split(f'<span id="L{where}">')[1].split("\n")[0])
    assert line.startswith("class GPTConfig"), line


def test_pages_open_without_errors_and_ask_nobody(site, address, visitor):
    page, faults = visitor
    page.set_viewport_size({"width": 1280, "height": 900})
    started, seen = time.perf_counter(), sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    code = [name for name in seen if name.startswith("source/")] # all made alike: a few of them show it
    seen = [name for name in seen if name not in code or name in code[::10]]
    seen = [name for i, name in enumerate(seen) if drawn(i, of=3) or name == "nbs/model/12_loss.html"]
    with_math = []
    for name in seen:
        page.goto(address + name, wait_until="load")
        state = page.evaluate("() => ({ title: document.title, math: document.querySelectorAll('.math').length, drawn: document.querySelectorAll('.katex').length, wrong: document.querySelectorAll('.katex-error').length })")
        assert state["title"], name
        assert state["wrong"] == 0, f"{name}: KaTeX cannot read a formula"
        if state["math"]:
            assert state["drawn"] == state["math"], (name, state)
            with_math.append(name)
    assert faults == []
    assert "nbs/model/12_loss.html" in with_math
    print(f"{len(seen)} pages in {time.perf_counter() - started:.0f} s")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_the_screen(site, address, visitor, scheme):
    page, faults = visitor
    page.emulate_media(color_scheme=scheme)
    names = ["index.html", "nbs/model/14_gpt.html", "nbs/speedrun/7_report.html", *sources("nbs/guide/[!i]*.md"), *sources("lessons/*.ipynb")]
    for name in (name for i, name in enumerate(names) if drawn(i, of=3)):
        page.set_viewport_size({"width": 375, "height": 800})
        page.goto(address + name, wait_until="load")
        for width in (375, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than {width} pixels"
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
        assert light > 200 if scheme == "light" else light < 80, (name, background)
    assert faults == []


def test_dark_can_be_switched_and_stays(address, visitor):
    page, _ = visitor
    page.set_viewport_size({"width": 1280, "height": 800})
    page.emulate_media(color_scheme="light")
    page.goto(address + "nbs/model/14_gpt.html", wait_until="load")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator(".quarto-color-scheme-toggle:visible").first.click()
    page.wait_for_function("before => getComputedStyle(document.body).backgroundColor != before", arg=light)
    page.goto(address + "nbs/model/15_optim.html", wait_until="load")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.evaluate("localStorage.clear()")


@pytest.mark.parametrize("query, wanted", [("Muon", r"nbs/model/15_optim\.html"), ("loss mask", r"glossary\.html#loss-mask|lessons/07_chat\.html"), ("best fit", r"nbs/core/09_dataloader\.html")])
def test_search_finds(address, visitor, query, wanted):
    page, faults = visitor
    page.set_viewport_size({"width": 1280, "height": 800})
    page.goto(address + "index.html", wait_until="load")
    page.locator("input[type=search]").first.fill(query)
    page.wait_for_selector(".search-result")
    found = page.eval_on_selector_all(".search-result", "links => links.map(link => link.getAttribute('href'))")
    assert any(re.search(wanted, href) for href in found[:5]), found
    page.locator("input[type=search]").first.press("Enter")
    page.wait_for_url(lambda url: url != address + "index.html")
    assert faults == []
    page.goto(address + "index.html", wait_until="load")
    page.locator("input[type=search]").first.fill("muonxyz no such word")
    page.wait_for_selector(".search-none")


def test_search_counts_a_title_more_than_text(visitor):
    page, _ = visitor
    page.goto("about:blank")
    page.evaluate(search_script().replace("window.Fuse = class", "window.Ours = class") + "; null")
    ask = lambda query, entries: page.evaluate("([query, entries]) => new Ours(entries).search(query).map(hit => hit.item.href)", [query, entries])
    entry = lambda href, title, section, text: {"href": href, "title": title, "section": section, "text": text}
    entries = [entry("text", "A", "", "muon here, and the muon there"), entry("title", "Muon", "", ""), entry("heading", "B", "On Muon", ""), entry("within", "C", "", "commuons")]
    assert ask("muon", entries) == ["title", "heading", "text"]
    assert ask("MUO", entries) == ["title", "heading", "text"]
    apart, together = entry("apart", "A", "", "fit what is best, best what is fit"), entry("together", "B", "", "rows are packed by best-fit")
    assert ask("best fit", [apart, together]) == ["together", "apart"]
    assert ask("best nothing", [apart, together]) == []
    assert ask("c++ (a|b) [", entries) == []   # no pattern of anybody's


# ---- a small site: what is asked of it is seen at once

NOTEBOOK = {"metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}


def write_notebook(path, *cells):
    "Cells are Markdown, or pairs of code and the data of its output."
    path.parent.mkdir(parents=True, exist_ok=True)
    make = lambda cell: {"cell_type": "markdown", "metadata": {}, "source": cell} if isinstance(cell, str) else {
        "cell_type": "code", "execution_count": None, "metadata": {}, "source": cell[0],
        "outputs": [{"output_type": "display_data", "metadata": {}, "data": cell[1]}] if cell[1] else []}
    path.write_text(json.dumps(NOTEBOOK | {"cells": [{"id": f"cell{n}"} | make(cell) for n, cell in enumerate(cells)]}))


@pytest.fixture
def clone(tmp_path):
    "A repository of a few pages that link to each other in every way that sources do."
    root = tmp_path/"clone"
    (root/"nanochat"/"core").mkdir(parents=True)
    for name in ("_quarto.yml", "settings.ini"): shutil.copy(REPO/name, root/name)
    (root/"pyproject.toml").write_text('[project]\nname = "nanochat"\nversion = "0.1.0"\n')
    (root/"nanochat"/"__init__.py").write_text("")
    (root/"nanochat"/"core"/"small.py").write_text('"Small."\n\n# AUTOGENERATED! DO NOT EDIT! File to edit: ../../nbs/core/00_small.ipynb.\n\ndef double(x): return 2 * x\n')
    guide = root/"nbs"/"guide"
    guide.mkdir(parents=True)
    (guide/"index.md").write_text("# Small home\n\n[start](start.md), [small](../core/00_small.ipynb#How-sure?), [lesson](../../lessons/01_first.ipynb), [stage](../speedrun/1_data.ipynb)\n\n![dot](images/dot.png)\n")
    (guide/"start.md").write_text("# Begin\n\n[home](index.md) [small](../core/00_small.ipynb)\n\nInline $x^2$.\n")
    for name in ("report_laptop", "negative_results", "glossary", "howto_one", "course", "teach"): (guide/f"{name}.md").write_text(f"# {name}\n\n[home](index.md)\n")
    (guide/"images").mkdir()
    shutil.copy(REPO/"nbs"/"images"/"chat.png", guide/"images"/"dot.png")
    write_notebook(root/"nbs"/"core"/"00_small.ipynb", "# Small\n\n> A small module.", ("#| default_exp core.small", None), ("#| export\ndef double(x): return 2 * x", None),
                   "## How sure?\n\n[lesson](../../lessons/01_first.ipynb) [home](../guide/index.md)", ("double(2)", {"text/html": "<b id='shown'>four</b>", "text/plain": "4"}))
    write_notebook(root/"lessons"/"01_first.ipynb", "# 1 · First", "[small](../nbs/core/00_small.ipynb#How-sure?) [guide](../nbs/guide/start.md)\n\n<details><summary>Solution</summary>\n\nIt is **four**.\n\n</details>")
    write_notebook(root/"nbs"/"speedrun"/"1_data.ipynb", "# 1 · Data", "[small](../core/00_small.ipynb)")
    return root


def test_links_between_sources_become_links_between_pages(clone, tmp_path, capfd):
    out = build_docs(tmp_path/"out", clone)
    assert check_site(out) == [] and "note:" not in capfd.readouterr().out
    home, lesson, small = (out/"index.html").read_text(), (out/"lessons"/"01_first.html").read_text(), (out/"nbs"/"core"/"00_small.html").read_text()
    for link in ("nbs/guide/start.html", "nbs/core/00_small.html#how-sure", "lessons/01_first.html", "nbs/speedrun/1_data.html"): assert f'href="{link}"' in home, link
    assert 'src="nbs/guide/images/dot.png"' in home and (out/"nbs"/"guide"/"images"/"dot.png").is_file()
    assert 'href="../nbs/core/00_small.html#how-sure"' in lesson and 'href="../../index.html"' in (out/"nbs"/"guide"/"start.html").read_text()
    assert "<details>" in lesson and "<strong>four</strong>" in lesson
    assert "<b id='shown'>four</b>" in small and 'id="double"' in small
    assert "katex/katex.min.js" in (out/"nbs"/"guide"/"start.html").read_text() and (out/"site_libs"/"katex"/"fonts"/"KaTeX_Main-Regular.woff2").is_file()

    # built again into the same folder, after a page was changed, one renamed and a link broken
    (clone/"lessons"/"01_first.ipynb").write_text((clone/"lessons"/"01_first.ipynb").read_text().replace("It is **four**", "It was **five**"))
    (clone/"nbs"/"speedrun"/"1_data.ipynb").rename(clone/"nbs"/"speedrun"/"1_texts.ipynb")
    build_docs(tmp_path/"out", clone)
    said = capfd.readouterr().out
    assert "<strong>five</strong>" in (out/"lessons"/"01_first.html").read_text()
    assert not (out/"nbs"/"speedrun"/"1_data.html").exists() and (out/"nbs"/"speedrun"/"1_texts.html").exists()
    assert "note: index.html: nbs/speedrun/1_data.html leads nowhere" in said, said


def test_quarto_is_preferred_and_mended_too(clone, tmp_path, monkeypatch):
    quarto = tmp_path/"bin"/"quarto"
    quarto.parent.mkdir()
    quarto.write_text(f"""#!{sys.executable}
import pathlib, sys
out = pathlib.Path(sys.argv[2])/"_docs"
assert sys.argv[1] == "render" and (out.parent/"index.md").is_file() and (out.parent/"nbs"/"core"/"00_small.ipynb").is_file()
(out/"nbs"/"core").mkdir(parents=True, exist_ok=True)
(out/"nbs"/"core"/"00_small.html").write_text('<h2 id="how-sure">How sure?</h2><script src="https://cdn.jsdelivr.net/npm/katex@0.16.22/dist/katex.min.js"></script>')
(out/"index.html").write_text('<a href="nbs/core/00_small.ipynb#How-sure?">small</a>')
""")
    quarto.chmod(0o755)
    monkeypatch.setenv("PATH", f"{quarto.parent}:{os.environ['PATH']}")
    out = build_docs(tmp_path/"out", clone)
    assert check_site(out) == []
    assert (out/"index.html").read_text() == '<a href="nbs/core/00_small.html#how-sure">small</a>'
    assert '"../../site_libs/katex/katex.min.js"' in (out/"nbs"/"core"/"00_small.html").read_text()


def test_what_is_refused(tmp_path):
    mine = tmp_path/"mine"
    mine.mkdir()
    (mine/"thesis.txt").write_text("years of work")
    assert_user_error(nanochat(tmp_path, "docs", "--out", mine), "not empty", str(mine))
    assert (mine/"thesis.txt").read_text() == "years of work"
    assert_user_error(nanochat(tmp_path, "docs", "--out", mine/"thesis.txt"), "is a file")
    assert_user_error(nanochat(tmp_path, "docs", "--out", tmp_path/"new", "--port", 0), "--serve")
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as taken:
        assert_user_error(nanochat(tmp_path, "docs", "--out", tmp_path/"new", "--serve", "--port", taken.server_port), f"port {taken.server_port}")
    assert not (tmp_path/"new").exists()
    with pytest.raises(Exception, match="which is the home page of the docs"):
        (tmp_path/"empty").mkdir()
        build_docs(tmp_path/"new", tmp_path/"empty")


def test_the_dev_group_is_asked_for(tmp_path, monkeypatch):
    "As it is for somebody who installed the package without the dev group."
    import importlib.util
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "nbdev" else real(name, *args))
    with pytest.raises(Exception, match="built with nbdev, which is not installed: run `uv sync`"): build_docs(tmp_path/"new", REPO)
    assert not (tmp_path/"new").exists()


def test_an_older_build_may_be_replaced(tmp_path):
    from nanochat.lab.docs import check_out
    (tmp_path/MARK).touch()
    (tmp_path/"old.html").touch()
    assert check_out(tmp_path) == Path(tmp_path).resolve()
