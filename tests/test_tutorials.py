"""The tutorials: each script runs in short, and each page shows what its script does."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
from scripts import EXAMPLES, is_picture

import keras_dp

ROOT = Path(__file__).parents[1]
PAGES = sorted(set((ROOT / "docs" / "tutorials").glob("*.md")) - {ROOT / "docs/tutorials/index.md"})
SCRIPT = re.compile(r"python examples/(\w+\.py)")


def flat(code):
    return re.sub(r"\s+", " ", code).strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_stands_in_its_script(page):
    text = page.read_text(encoding="utf-8")
    scripts = [(EXAMPLES / name).read_text(encoding="utf-8") for name in SCRIPT.findall(text)]
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert blocks
    for block in blocks:
        assert any(flat(block) in flat(script) for script in scripts), block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_and_picture_of_a_page_is_there(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    assert "```\n" in text and "{{" not in text  # an output, and nothing left to fill in
    index = (page.parent / "index.md").read_text(encoding="utf-8")
    assert f"]({page.name})" in index and f"\n{page.stem}\n" in index


@pytest.mark.thorough
def test_images_spends_its_budget_and_its_model_takes_images(run_example, tmp_path):
    printed = run_example("images.py", "--recipes", "bank", "--epochs", "2")

    epsilon, accuracy = re.search(r"^bank .* (\d\.\d{3}) +([\d.]+)%", printed, re.M).groups()
    assert 2.9 < float(epsilon) <= 3
    assert is_picture(tmp_path / "images_output" / "images.png")
    assert f"digits.keras, {accuracy}%" in printed.replace("images_output/", "")
    assert keras.saving.load_model(tmp_path / "images_output" / "digits.keras").input_shape == (
        None,
        28,
        28,
        1,
    )


@pytest.mark.thorough
def test_texts_are_sorted_and_no_word_is_learned_before_training(run_example, monkeypatch):
    printed = run_example("texts.py", "--epochs", "1", "--most", "150")

    assert 2.9 < float(re.search(r"^private +([\d.]+)", printed, re.M)[1]) <= 3
    assert "engine 'ghost'" in printed
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import texts

    both = texts.to_tokens(["a b c", "c d"])
    assert (both[1] == texts.to_tokens(["c d"])[0]).all()
    assert both[0, 2] == both[1, 0] and (both[0, 3:] == 0).all()

    model = texts.build_model()
    said = model.predict(both, verbose=0)
    table, *others = model.get_weights()
    table[0] = 100  # the row of the padding, which nothing may depend on
    model.set_weights([table, *others])
    np.testing.assert_array_equal(model.predict(both, verbose=0), said)


@pytest.mark.thorough
def test_names_are_sorted_by_country_privately(run_example):
    printed = run_example("names.py", "--epochs", "1", "--most", "60")

    assert 2.9 < float(re.search(r"^private +([\d.]+)", printed, re.M)[1]) <= 3
    rows = re.findall(r"^[A-Z]\w+ +" + r"(\d+) +" * 5 + r"(\d+)$", printed, re.M)
    assert len(rows) == 6 and all(97 <= sum(map(int, row)) <= 103 for row in rows)


@pytest.mark.thorough
def test_tabular_chooses_on_public_data_and_spends_once_for_each_model(run_example):
    printed = run_example("tabular.py", "--epochs", "2", "--candidates", "1")

    assert len(re.findall(r"^ +[\d.]+ +\d+ +0\.\d{3}$", printed, re.M)) == 1
    spent = re.findall(r"^private, .*? ([\d.]+) +0\.\d{3} +[\d.]+%$", printed, re.M)
    assert len(spent) == 2 and all(0.97 < float(epsilon) <= 1 for epsilon in spent)


@pytest.mark.filterwarnings("ignore:In the future `np:FutureWarning")  # tf2onnx, if it is there
@pytest.mark.thorough
def test_serving_gives_the_same_answers_in_every_format(run_example, tmp_path):
    printed = run_example("serving.py", "--epochs", "2")

    rows = re.findall(r"^([.\w]+) +[\d,]+ +(\S+) +([\d.]+)%$", printed, re.M)
    assert [name for name, *_ in rows][:3] == [".keras", "SavedModel", "LiteRT"]
    assert all(float(difference) < 1e-5 for _, difference, _ in rows)
    assert len({accuracy for *_, accuracy in rows}) == 1
    statement = (tmp_path / "serving_output" / "digits.privacy.md").read_text()
    assert "differentially private" in statement


@pytest.mark.thorough
def test_own_rule_agrees_with_the_loop_and_a_wrong_one_is_refused(run_example):
    printed = run_example("own_rule.py", "--width", "16", "--places", "4", "--steps", "1")

    differences = re.findall(r"^with(?:out)? a rule +ghost +\d+ +(\S+)$", printed, re.M)
    assert len(differences) == 2 and all(float(d) < 1e-6 for d in differences)
    assert re.search(r"PrivacyError: .*Careless", printed, re.S | re.I)


@pytest.mark.thorough
def test_advanced_spends_no_more_than_the_budget_whatever_the_way(run_example, tmp_path):
    printed = run_example("advanced.py", "--epochs", "3", "--ways", "noise", "per-layer")

    spent = re.findall(r" (\d\.\d{3}) +[\d.]+% ", printed)
    assert len(spent) == 2 and all(2.5 < float(epsilon) <= 3 for epsilon in spent)
    assert is_picture(tmp_path / "advanced_output" / "privacy-monitor.png")


@pytest.mark.thorough
def test_check_and_fix_finds_every_batch_normalization(run_example):
    printed = run_example("check_and_fix.py", "--epochs", "0")

    counted = re.search(r"^BatchNormalization +(\d+) +(\d+) +(\d+)$", printed, re.M).groups()
    assert f"{counted[0]} problems" in printed and counted == (counted[0], "0", counted[0])
    assert "PrivacyError: " in printed and "problems left: 0" in printed


@pytest.mark.thorough
def test_contrastive_spends_its_budget(run_example):
    printed = run_example("contrastive.py", "--epochs", "2", "--public", "8")

    [(*_, last)] = re.findall(r"^ +2 +([\d.]+) +(\d\.\d{3}) ", printed, re.M)
    assert 2.9 < float(last) <= 3


@pytest.mark.thorough
def test_synthetic_people_answer_what_was_asked(run_example, tmp_path):
    printed = run_example("synthetic.py", "--epochs", "2", "--epsilon", "1")

    [(spent, auc)] = re.findall(r"^made up, private +([\d.]+) +(0\.\d+) ", printed, re.M)
    assert 0.97 < float(spent) <= 1 and 0.3 < float(auc) < 0.8
    assert is_picture(tmp_path / "synthetic.png")


@pytest.mark.thorough
def test_larger_than_memory_reads_what_was_drawn(run_example, tmp_path):
    printed = run_example("larger_than_memory.py", "--step", "8", "--epochs", "1")

    assert float(re.search(r"epsilon ([\d.]+) at", printed)[1]) <= 1
    assert sum(file.stat().st_size for file in (tmp_path / "squares").rglob("*")) > 1_000_000


class TestTheLossOfALanguageModel:
    """`examples/lora.py`: masked tokens count for nothing, for one text and for a batch."""

    @pytest.fixture
    def lora(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(EXAMPLES))
            import lora
        return lora

    @pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")
    @pytest.mark.thorough
    def test_padded_texts_move_the_weights_as_if_they_had_never_been_padded(self, lora):
        model = lora.build_model(vocabulary_size=12, length=6, width=8, num_layers=1)
        model.backbone.enable_lora(rank=2)
        random = np.random.default_rng(0)
        start = [w + 0.1 * random.normal(size=w.shape) for w in model.get_weights()]
        model.compile(
            keras_dp.DPSGD(1.0, max_grad_norm=1e6, noise_multiplier=0.0), lora.word_loss()
        )

        def moved(tokens):
            """What a step takes from the weights, times the number of texts."""
            model.set_weights(start)
            x, y, weights = lora.examples(np.array(tokens, "int32"))
            model.train_on_batch(x, y, sample_weight=weights)
            ends = model.get_weights()
            return [len(tokens) * (a - np.asarray(b)) for a, b in zip(start, ends, strict=True)]

        texts = [[1, 5, 7], [1, 3, 2, 9, 4, 8]]  # 2: not in the vocabulary
        padded = np.zeros((2, 7), "int32")
        for row, text in zip(padded, texts, strict=True):
            row[: len(text)] = text

        alone = [moved([text]) for text in texts]  # each of its own length
        for a, b in zip(moved(padded[:1]), alone[0], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        batch = moved(padded)
        for a, *parts in zip(batch, *alone, strict=True):
            np.testing.assert_allclose(a, sum(parts), atol=1e-5)
        assert max(np.abs(a).max() for a in batch) > 0.01
        _, _, weights = lora.examples(padded)
        assert weights.sum(axis=1).tolist() == [2, 4]

    @pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning")  # KerasHub's
    @pytest.mark.thorough
    def test_a_language_model_learns_privately_and_writes(self, run_example):
        printed = run_example(
            "lora.py",
            "--epochs",
            "1",
            "--public-epochs",
            "1",
            "--texts",
            "300",
            "--held-out",
            "50",
        )
        trained, of_all = re.search(r"^([\d,]+) of ([\d,]+) weights", printed, re.M).groups()
        assert int(trained.replace(",", "")) < int(of_all.replace(",", "")) / 20
        assert 2.9 < float(re.search(r"^after .*epsilon ([\d.]+)", printed, re.M)[1]) <= 3
        assert len(re.findall(r"^  \w+ .*", printed, re.M)) == 6
