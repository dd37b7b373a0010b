"""Languages as py3langid finds them, whatever stands beside a document in its batch."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from pydantic import ValidationError

from data_tools.flow import Flow
from data_tools.language import LangidModel, Language, LanguageSettings
from megalite.errors import DataError

SENTENCES = {
    "en": "The quick brown fox jumps over the lazy dog, and nobody in the village was surprised by that.",
    "de": "Die Katze saß gestern Abend auf dem warmen Ofen und wollte überhaupt nicht mehr hinaus gehen.",
    "fr": "Le chat dort sur la chaise près de la fenêtre, où le soleil éclaire déjà toute la cuisine.",
    "ru": "Сегодня утром мы пошли на рынок, чтобы купить свежие овощи и немного чёрного хлеба.",
    "ja": "昨日は友達と一緒に映画を見てから、近くの喫茶店でコーヒーを飲みました。",
    "ar": "ذهبت أمس إلى السوق واشتريت بعض الخضروات الطازجة والخبز لأطفالي الصغار",
    "hi": "मैं कल बाजार गया था और वहाँ से ताज़ी सब्जियाँ और थोड़ा सा दूध लाया।",
    "vi": "Hôm qua tôi đã đi chợ mua rau tươi và một ít bánh mì cho bọn trẻ ở nhà.",
}


@pytest.fixture(scope="module")
def theirs() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@pytest.fixture(scope="module")
def ours() -> Language:
    return Language(LanguageSettings())


def found_by(operation: Language, rows: list[str], flow: Flow | None = None) -> list[tuple[str, float]]:
    batch = pa.RecordBatch.from_pydict({"text": pa.array(rows, pa.string())})
    out = operation(batch, flow or Flow())
    assert out.schema.field("language_score").type == pa.float32()
    return list(
        zip(out.column("language").to_pylist(), out.column("language_score").to_pylist(), strict=True)
    )


def sample() -> list[str]:
    """Whole sentences, shouted, decomposed, mixed, cut, repeated, and noise."""
    draw = random.Random(5)
    rows = list(SENTENCES.values())
    rows += [text.upper() for text in SENTENCES.values()]
    rows += [
        "Le cafe\u0301 de\u0301ja\u0300 ferme\u0301",
        "STRASSE ÖFFNEN",
        "don't",
        "ÀÉÎ",
        "1 2 3",
        "\u0301",
        "dž",
    ]
    for _ in range(150):
        a, b = draw.sample(list(SENTENCES.values()), 2)
        rows.append(a[: draw.randrange(len(a))] + b[draw.randrange(len(b)) :] * draw.randrange(3))
    rows += ["".join(map(chr, draw.choices(range(0x20, 0xD000), k=40))) for _ in range(40)]
    rows.append(" ".join(SENTENCES.values()) * 300)  # longer than is walked at once
    return rows


@pytest.mark.slow
def test_it_is_py3langid(ours: Language, theirs: LanguageIdentifier) -> None:
    everything = Language(LanguageSettings(max_bytes=0))
    rows = sample()
    for text, (language, score) in zip(rows, found_by(everything, rows), strict=True):
        expected, probability = theirs.classify(text)
        if language == "und":
            assert score == 0
            assert theirs._raw_score(theirs._encode(text)).max() == 0  # no feature at all
        else:
            assert language == expected, text
            assert score == pytest.approx(probability, abs=2e-3)


def test_languages_are_told_apart_and_counted(ours: Language) -> None:
    flow = Flow()
    found = found_by(ours, [*SENTENCES.values(), ""], flow)
    assert [language for language, _ in found] == [*SENTENCES, "und"]
    assert flow.histograms["language"] == dict.fromkeys([*SENTENCES, "und"], 1)


@pytest.mark.slow
def test_neighbours_change_nothing(ours: Language) -> None:
    rows = sample()
    alone = [found_by(ours, [text])[0] for text in rows]
    assert found_by(ours, rows) == alone
    assert found_by(ours, rows[::-1])[::-1] == alone
    assert found_by(ours, []) == []


def test_classes_of_one_language_count_together() -> None:
    prior = np.log(np.array([0.3, 0.4, 0.3], dtype=np.float32))
    model = LangidModel(
        ["a", "b", "a", "und"],
        row_of=np.zeros(1, dtype=np.uint16),
        moves=np.zeros((1, 256), dtype=np.uint32),
        feature_of=np.zeros(1, dtype=np.int32),
        weights=np.zeros((1, 3), dtype=np.float32),
        prior=prior,
        same_as=np.array([0, 1, 0]),
    )
    labels, scores = model.classify(np.zeros(1, dtype=np.uint8), np.array([0]), np.array([1]))
    assert labels.tolist() == [0]
    assert scores.tolist() == pytest.approx([0.6])


def test_it_looks_no_further_than_told(theirs: LanguageIdentifier) -> None:
    operation = Language(LanguageSettings(max_bytes=50))
    for text in (SENTENCES["ru"] + SENTENCES["en"] * 9, SENTENCES["en"], "a" + SENTENCES["ja"] * 2):
        start = text.encode()[:50].decode(errors="ignore")
        language, score = found_by(operation, [text])[0]
        expected, probability = theirs.classify(start)
        assert (language, score) == (expected, pytest.approx(probability, abs=2e-3))
    one_more, just = found_by(operation, [SENTENCES["en"][:51], SENTENCES["en"][:50]])
    assert one_more == just != found_by(operation, [SENTENCES["en"][:49]])[0]


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ValidationError, match="fasttext alone needs a file"):
        LanguageSettings(engine="fasttext")
    with pytest.raises(ValidationError, match="fasttext alone needs a file"):
        LanguageSettings(model="lid.bin")


def test_fasttext_is_asked_for_one_line(tmp_path: Path) -> None:
    fasttext = pytest.importorskip("fasttext", reason="fastText is not installed")
    lines = [f"__label__{name} {text}\n" for name, text in SENTENCES.items() if name in ("en", "de")] * 50
    (tmp_path / "train.txt").write_text("".join(lines), encoding="utf-8")
    model = fasttext.train_supervised(str(tmp_path / "train.txt"), epoch=20, dim=8, thread=1, verbose=0)
    model.save_model(str(tmp_path / "lid.bin"))
    operation = Language(LanguageSettings(engine="fasttext", model=str(tmp_path / "lid.bin")))
    rows = [SENTENCES["en"].replace(" ", "\n"), SENTENCES["de"]]
    found = found_by(operation, rows)
    for text, (language, score) in zip(rows, found, strict=True):
        probability, label = model.f.predict(" ".join(text.split()) + "\n", 1, 0.0, "strict")[0]
        assert language == label.removeprefix("__label__")
        assert score == pytest.approx(min(probability, 1.0), abs=1e-6)
    assert [language for language, _ in found] == ["en", "de"]


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("fasttext", reason="fastText is not installed")
    with pytest.raises(DataError, match="cannot read the model"):
        Language(LanguageSettings(engine="fasttext", model=str(tmp_path / "missing.bin")))
    (tmp_path / "text.bin").write_bytes(b"not a model")
    with pytest.raises(DataError, match="is not a fastText model"):
        Language(LanguageSettings(engine="fasttext", model=str(tmp_path / "text.bin")))
