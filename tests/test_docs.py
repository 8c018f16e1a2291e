"""The Python blocks of the documents run as they stand, and give the numbers in their comments."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
NUMBER = re.compile(r"#\s*(\d+(?:\.\d+)?)\s*$")


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


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/custom-loops.md",
        "docs/data.md",
        "docs/fine-tuning.md",
        "docs/guide.md",
        "docs/models.md",
        "docs/monitor.md",
        "docs/people.md",
        "docs/scaling.md",
    ],
)
@pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")
@pytest.mark.filterwarnings("ignore:The copy of 'classifier'")  # docs/models.md shows it
def test_every_python_block_runs(document, monkeypatch, tmp_path):
    blocks = BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))
    assert blocks
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks:
        run(block, namespace)


def test_a_wrong_number_in_a_comment_is_found():
    run("a = 2\na / 3  # 0.667", {})
    with pytest.raises(AssertionError, match="a / 3"):
        run("a = 2\na / 3  # 0.666", {})


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/guide.md",
        "docs/architecture.md",
        "docs/benchmarks.md",
        "docs/custom-loops.md",
        "docs/data.md",
        "docs/fine-tuning.md",
        "docs/guarantees.md",
        "docs/models.md",
        "docs/monitor.md",
        "docs/accuracy.md",
        "docs/people.md",
        "docs/planning.md",
        "docs/privacy-report.md",
        "docs/scaling.md",
    ],
)
def test_every_link_to_a_file_or_heading_leads_somewhere(document):
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, heading = target.partition("#")
        aim = path.parent / file if file else path
        assert aim.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", aim.read_text(encoding="utf-8"), re.M)
            assert heading in [
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings
            ]
