"""Equal and nearly equal rows are found; rows that only share a template are not."""

import random
from collections.abc import Sequence

import pytest

from perl.data.duplicates import Rows
from perl.data.records import Turn

WORDS = [f"word{n}" for n in range(500)]


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def rows_of(texts: Sequence[str], more: int = 40) -> Rows:
    """Return each text in its own dialogue, followed by `more` other texts."""
    draw = random.Random(1)
    others = [text(draw, 30) for _ in range(more)]
    everything = [*texts, *others]
    return Rows([(Turn("text", one),) for one in everything], [str(n) for n in range(len(everything))])


def alike(one: str, other: str) -> bool:
    rows = rows_of([one, other])
    clusters = rows.clusters()
    assert rows.like([0], [1]) == rows.like([1], [0]) == [clusters[0] == clusters[1]]
    assert rows.like([0, 1], range(2, 42)) == [False, False]
    return clusters[0] == clusters[1]


LONG = text(random.Random(2), 40).split()
CHINESE = "我想要一杯拿铁咖啡加燕麦奶不要糖谢谢你今天天气很好"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A latte, please!", "a latte  please", True),
        ("Ｆｕｌｌ width", "full width", True),
        ("“Quoted” – so?", "quoted so", True),
        ("What is 3 + 4?", "What is 3 * 4?", False),
        ("What is 3 + 4?", "What is 3 + 5?", False),
        ("It is 5 degrees.", "It is -5 degrees.", False),
        ("A latte, please.", "A mocha, please.", False),
        (" ".join(LONG), " ".join([*LONG, "thanks"]), True),
        (" ".join(LONG), " ".join([*LONG[:20], "other", *LONG[21:]]), True),
        (" ".join(LONG), " ".join([*LONG[:20], "quite", "another", "text", *LONG[30:]]), False),
        (" ".join(LONG[:9]), " ".join([*LONG[:8], "other"]), False),
        (
            "我想要一杯拿铁咖啡加燕麦奶不要糖谢谢你今天天气很好",
            "我想要一杯拿铁咖啡加燕麦奶不要糖谢谢您今天天气很好",
            True,
        ),
    ],
)
def test_alike(one: str, other: str, same: bool) -> None:
    assert alike(one, other) is same


@pytest.mark.parametrize("template", [40, 400])
def test_a_long_template_does_not_make_short_questions_alike(template: int) -> None:
    draw = random.Random(3)
    prompt = text(draw, template)
    rows = rows_of([f"{prompt} {text(draw, 15)}" for _ in range(30)])
    assert rows.clusters() == list(range(70))


def test_the_same_template_with_nearly_the_same_text_is_alike() -> None:
    draw = random.Random(3)
    prompt, said = text(draw, 100), text(draw, 40)
    clusters = rows_of(
        [*(f"{prompt} {text(draw, 40)}" for _ in range(20)), f"{prompt} {said}", f"{prompt} {said} so"]
    )
    assert len(set(clusters.clusters())) == 61


def test_a_chain_of_changes_is_no_cluster() -> None:
    """Each text differs from the next in five of 200 words, the first from the last in nearly all."""
    words, texts = text(random.Random(2), 200).split(), []
    for place in range(0, 200, 5):
        texts.append(" ".join(words))
        words[place : place + 5] = text(random.Random(place), 5).split()
    clusters = rows_of(texts, more=2000).clusters()
    assert len(texts) == 40
    assert 4 < len(set(clusters[:40])) < 40
    assert max(abs(row - leader) for row, leader in enumerate(clusters[:40])) <= 5


def test_clusters_do_not_depend_on_the_order_of_rows() -> None:
    draw = random.Random(4)
    texts = [text(draw, 30) for _ in range(50)]
    texts += [f"{one} {extra}" for one in texts[:30] for extra in ("so", "well then")]
    found = []
    for _ in range(3):
        order = draw.sample(range(len(texts)), len(texts))
        clusters = Rows([(Turn("text", texts[n]),) for n in order], [str(n) for n in order]).clusters()
        parts: dict[int, set[int]] = {}
        for place, leader in enumerate(clusters):
            parts.setdefault(leader, set()).add(order[place])
        found.append(sorted(map(sorted, parts.values())))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 50


def test_of_much_text_a_sample_of_the_pairs_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perl.data.duplicates.CHARACTERS", 20_000)
    draw = random.Random(5)
    long = [text(draw, 400) for _ in range(40)]  # 107,000 characters: one pair in five is kept
    near = [f"{one} thanks" for one in long]
    clusters = rows_of([*long, *near], more=0).clusters()
    assert [len({clusters[n], clusters[n + 40]}) for n in range(40)] == [1] * 40
    assert len(set(clusters)) == 40


def test_ten_thousand_rows_take_seconds() -> None:
    draw = random.Random(6)
    texts = [text(draw, 60) for _ in range(5000)]
    rows = Rows([(Turn("text", one),) for one in [*texts, *texts]], [str(n) for n in range(10_000)])
    assert len(set(rows.clusters())) == 5000
