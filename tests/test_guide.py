"""The guide: what it tells people to type exists, its Python is Python, its glossary is in order."""
import ast
import importlib
import json
import os
import re

import pytest
from conftest import REPO, check_parses, typed_commands

from nanochat.post.mixture import describe_conversations

GUIDE = REPO/"nbs"/"guide"
PAGES = sorted(GUIDE.glob("*.md"))
MUST = ("index", "start", "report_laptop", "negative_results", "glossary", *(f"howto_{name}" for name in ("data", "identity", "ability", "task", "resume", "serve", "page", "export", "measure", "node", "install")))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page, language):
    "The blocks of code of a language."
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def test_all_pages_are_there():
    assert set(MUST) <= {page.stem for page in PAGES}


@pages
def test_page_has_a_title_and_names_no_machine(page):
    text = page.read_text("utf-8")
    assert re.match(r"---\ntitle: .+\n---\n\n", text)
    assert not re.search(r"(?<![\w.~])/(?:tmp|root|home|Users|work)/", text)
    assert not re.search(r"^(?::::|\{\{<)|@(?:fig|sec|tbl)-", text, re.M) # only some builders know these


@pages
def test_commands_parse(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("talks", "FOLDER"): (tmp_path/folder).mkdir() # what the pages speak of
    (tmp_path/"talks"/"letters.jsonl").write_text("")
    (tmp_path/"lessons").symlink_to(REPO/"lessons")
    for words in typed_commands(page.read_text("utf-8")): check_parses(words)


def test_wrong_commands_would_be_found():
    for line in ("nanochat fly", "nanochat speedrun --no-such-option", "nanochat speedrun --preset mega", "nanochat speedrun --set base.stepz=3", "nanochat data fly", "python -m nanochat.post.mixture fly"):
        with pytest.raises((Exception, SystemExit)): check_parses(line.split())
    assert typed_commands("```bash\nuv run nanochat chat \\\n  -p x # so\n```\n") == [["nanochat", "chat", "-p", "x"]]
    assert sum(words[0] == "nanochat" for page in PAGES for words in typed_commands(page.read_text("utf-8"))) > 30


@pages
def test_python_compiles_and_imports_what_exists(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "nanochat":
                module = importlib.import_module(node.module)
                for name in node.names: assert hasattr(module, name.name), (node.module, name.name)


@pages
def test_no_wall_of_text(page):
    text = re.sub(r"^```.*?^```$", "\n#\n", page.read_text("utf-8"), flags=re.M | re.S)
    for part in re.split(r"^(?:#.*|\|.*|[-*] .*|!\[.*|> .*|---)$", text, flags=re.M): assert len(part.split()) <= 200, part[:200]


def test_the_ability_of_the_guide_can_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(blocks(GUIDE/"howto_ability.md", "python")[0], {})
    found = describe_conversations("talks")
    assert found.startswith("2,000 conversations") and found in (GUIDE/"howto_ability.md").read_text("utf-8") # the page shows this line
    def word(row): return re.match(r"The (?:first|last) letter of (\w+) is \w\.", row["messages"][1]["content"])[1]
    learned, asked = ({word(json.loads(line)) for line in open(name)} for name in (os.path.join("talks", "letters.jsonl"), "letters_exam.jsonl"))
    assert len(asked) > 50 and not learned & asked


def test_the_task_of_the_guide_judges_rightly():
    names = {}
    for code in blocks(GUIDE/"howto_task.md", "python")[:2]: exec(code, names) # with its own assertions
    assert not names["task"].evaluate(names["task"][3], "Together they have 27 apples.")


def test_glossary_is_in_order_and_links_each_term():
    text = (GUIDE/"glossary.md").read_text("utf-8")
    terms = re.findall(r"^### (.+)$", text, re.M)
    assert 70 <= len(terms) <= 100 and terms == sorted(terms, key=str.lower)
    assert len({re.sub(r"\W", "", term).lower() for term in terms}) == len(terms)
    for entry in re.split(r"^### .+$", text, flags=re.M)[1:]: assert 5 < len(entry.split()) < 60 and re.search(r"\]\(\S+\)", entry), entry
