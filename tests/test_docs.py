"""The pages: their Python blocks run and give the numbers in their comments, and links lead on.

A block that begins with ```python runs; one that begins with ```py is shown only (code of
other libraries, fragments). The pages of docs/tutorials quote scripts of examples/, which
have tests of their own.
"""

import ast
import importlib
import re
import runpy
from pathlib import Path

import pytest

import keras_dp

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
NUMBER = re.compile(r"#\s*(\d+(?:\.\d+)?)\s*$")
PAGES = sorted(ROOT.glob("docs/**/*.md"))
# Those that the site fills with a file of the root.
STUBS = {ROOT / "docs/changelog.md", ROOT / "docs/contributing.md"}


def name_of(path):
    """The path from the root, by which pytest knows a test."""
    return path.relative_to(ROOT).as_posix()


def run(source, namespace):
    """Executes a block; the value of `expression  # 1.23` must round to that number."""
    lines = source.splitlines()
    for statement in ast.parse(source).body:
        code = ast.get_source_segment(source, statement)
        stated = NUMBER.search(lines[statement.end_lineno - 1])
        if isinstance(statement, ast.Expr) and stated:
            digits = len(stated[1].partition(".")[2])
            assert f"{eval(code, namespace):.{digits}f}" == stated[1], code
        else:
            exec(code, namespace)


# Pages that train for long; their subjects have files of tests.
THOROUGH = {
    "docs/custom-loops.md",
    "docs/data.md",
    "docs/fine-tuning.md",
    "docs/guide.md",
    "docs/monitor.md",
    "docs/moving.md",
    "docs/people.md",
    "docs/pitfalls.md",
    "docs/start.md",
}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.thorough] if name_of(path) in THOROUGH else [])
        for path in (ROOT / "README.md", *PAGES)
        if path.parent.name != "tutorials" and BLOCK.search(path.read_text(encoding="utf-8"))
    ],
    ids=name_of,
)
@pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")
@pytest.mark.filterwarnings("ignore:The copy of 'classifier'")  # docs/models.md shows it
def test_every_python_block_runs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in BLOCK.findall(path.read_text(encoding="utf-8")):
        run(block, namespace)


def test_a_wrong_number_in_a_comment_is_found():
    run("a = 2\na / 3  # 0.667", {})
    with pytest.raises(AssertionError, match="a / 3"):
        run("a = 2\na / 3  # 0.666", {})


def test_the_figures_of_the_readme_are_those_of_the_pages_that_measured_them():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = runpy.run_path(str(ROOT / "docs/pictures.py"))
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (?:ordinary|private) \|.*\| ([\d.]+) % \|.*\| ([\d.]+) \|$", guide, re.M
    )
    measured = sorted((float(ours), float(opacus)) for ours, opacus in rows)
    shown = pictures["ACCURACY"].values()
    assert sorted((row["keras_dp"], row["Opacus 1.6"]) for row in shown) == measured
    for row in shown:
        assert f"{row['keras_dp']:.1f} %" in readme
        assert re.search(rf"Opacus .*{row['Opacus 1.6']}", readme)

    benchmarks = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    today = benchmarks.partition("### Today")[2].partition("\n### ")[0]
    heads = re.search(r"^\| model \|.*$", today, re.M)[0].split(" | ")
    for model, name in {
        "mlp": "dense network",
        "transformer": "transformer",
        "lstm": "LSTM",
        "cnn": "convolutions",
    }.items():
        cells = re.search(rf"^\| {model} \|.*$", today, re.M)[0].split(" | ")
        r = cells[heads.index("r (first version)")].partition(" ")[0]
        assert f"{r} times ({name})" in readme


def anchors(text):
    """What code hosts and the site make of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in plain]


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES],
    ids=name_of,
)
@pytest.mark.fast
def test_every_link_to_a_file_or_heading_leads_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, heading = target.partition("#")
        aim = path.parent / file if file else path
        assert aim.exists(), target
        if heading:
            assert heading in anchors(aim.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("path", [page for page in PAGES if page not in STUBS], ids=name_of)
def test_every_page_opens_with_what_it_answers(path):
    title, _, rest = path.read_text(encoding="utf-8").lstrip().partition("\n")
    assert title.startswith("# ")
    opening = rest.lstrip().partition("\n")[0]
    assert len(opening) > 60 and opening[0] not in "#|-!<>:", opening


def test_every_page_is_in_the_contents():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    reference = (ROOT / "docs/reference/index.md").read_text(encoding="utf-8")
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", index + reference, re.M | re.S)
    lines = [line for tree in trees for line in tree.splitlines() if line[:1] != ":"]
    listed = {re.sub(r".*<(.*)>", r"\1", line) for line in lines}
    for page in PAGES:
        if page.parent.name != "tutorials" and page.parent.parent.name != "tutorials":
            name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
            assert name == "index" or {name, name.removeprefix("reference/")} & listed, name


def documented():
    """What the pages of the reference have an entry for: the objects, by their full names."""
    entries = {}
    for page in (ROOT / "docs/reference").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"auto(?:class|exception|function|data|module):: (\S+)", text):
            module, found = "keras_dp", keras_dp
            for part in name.split(".")[1:]:
                module = f"{module}.{part}"
                try:
                    found = getattr(found, part)
                except AttributeError:
                    found = importlib.import_module(module)
            assert name not in entries, f"{name} is documented twice"
            entries[name] = found
    return entries


PUBLIC = {
    "keras_dp": keras_dp.__all__,
    "keras_dp.accounting": keras_dp.accounting.__all__,
    "keras_dp.auditing": keras_dp.auditing.__all__,
    "keras_dp.clipping": keras_dp.clipping.__all__,
    "keras_dp.tuning": keras_dp.tuning.__all__,
    "keras_dp.journal": ["read"],
    "keras_dp.ledger": ["Choice", "PrivacyLedger", "Release"],
    "keras_dp.noise": ["NoiseSource", "SecureNoiseSource"],
    "keras_dp.risk": ["AttackRisk", "attack_risk", "draw"],
}


def test_every_public_name_is_in_the_reference():
    entries = list(documented().values())
    for module, names in PUBLIC.items():
        for name in names:
            public = getattr(importlib.import_module(module), name)
            assert any(public is entry for entry in entries), f"{module}.{name}"
