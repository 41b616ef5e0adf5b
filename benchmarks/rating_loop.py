"""Rate, train a reward model and a policy, rate again: does it help to choose what to rate by uncertainty?

    python -m benchmarks.rating_loop --seeds 3 --out runs/rating-loop

The coffee shop's gold judge is the rater, without noise. The first run trains SFT, a reward model and a policy on
100 ratings. In each of two rounds, 200 completions by the last run's roles on training prompts are then rated,
with the questions and log of `perl-rlhf rate`, and reward model and policy are trained again on all ratings, from
the same SFT policy. Both arms start from the same run and differ only in `--choose`. Evaluation uses prompts
and turns that no run has: gold is the share of the policy's completions that the judge finds right, AUROC is the
reward model's against the judge. Differences have 95 % intervals over these prompts and turns for all seeds
together; variation between seeds shows only in the differences by seed printed next to them.

Called again, it resumes where it stopped. --out has a folder for each run, ratings.jsonl and loop.json.
"""

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

import perl
from perl.data.jsonl import read_jsonl
from perl.data.simulator.source import simulate
from perl.measure.bootstrap import ClusterBootstrap
from perl.measure.metrics import auroc, checked
from perl.measure.paired import changes
from perl.rating.log import Opinion, RatingLog
from perl.rating.questions import CHOICES, Questions
from perl.system.files import write_json

ROOT = Path(__file__).parent.parent
ROUNDS = 2
UNSEEN = simulate(1_000, dialogues=0, ratings=1_000, prompts=512, noise=0.0)
"""Prompts and rated turns for evaluation, with a seed that no run has."""
KEYS = [
    "data.source=rated-shop",
    "reward.epochs=8",
    "reward.batch_size=16",
    "rl.anyway=true",
    "rl.guard=warn",  # to stop or roll back by the judge would be training on it
    "rl.eval_prompts=16",
    "rl.eval_samples=1",
    "rl.best_of_n=0",
    f"plugins=[{ROOT / 'benchmarks' / 'rated_shop.py'}]",
]


@dataclass(frozen=True)
class Judged:
    """A run's results on `UNSEEN`: the judge's grade of each prompt's completion, and each turn's score."""

    gold: list[float]
    scores: list[float]
    ratings_up: float | None = None

    @property
    def auroc(self) -> float:
        return float(roc_auc_score([one.label for one in UNSEEN.ratings], self.scores))


def main() -> None:
    """Run the loop for each seed and arm; print one line per round, and the differences at the end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratings", type=int, default=200, help="ratings per round")
    parser.add_argument("--out", type=Path, default=Path("runs/rating-loop"))
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="set in every run's recipe")
    asked = parser.parse_args()
    rows: list[dict[str, object]] = []
    found: dict[tuple[str, int], list[Judged]] = {}
    for seed in range(asked.seeds):
        for choose in CHOICES:
            rounds = loop(asked.out / str(seed), seed, choose, asked.ratings, [*KEYS, *asked.keys])
            for number, one in enumerate(rounds):
                found.setdefault((choose, number), []).append(one)
                figures = {"gold": statistics.fmean(one.gold), "auroc": one.auroc, "up": one.ratings_up}
                rows.append({"seed": seed, "choose": choose, "round": number, **figures})
                print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    for number in range(1, ROUNDS + 1):
        for metric, of_seeds, interval in differences(found["random", number], found["uncertainty", number]):
            each = ", ".join(f"{one:+.3f}" for one in of_seeds)
            low, high = interval
            print(
                f"round {number}: {metric}, uncertainty less random: {statistics.fmean(of_seeds):+.3f} "
                f"({low:+.3f} to {high:+.3f}); by seed {each}"
            )
            rows.append({"round": number, "metric": metric, "by_seed": of_seeds, "interval": interval})
    write_json(asked.out / "loop.json", rows)


def differences(first: list[Judged], second: list[Judged]) -> list[tuple[str, list[float], tuple[float, float]]]:
    """Return the second arm's gold and AUROC minus the first's: by seed, and the interval of their mean."""
    gold = [
        [statistics.fmean(of_prompt) for of_prompt in zip(*(one.gold for one in arm), strict=True)]
        for arm in (first, second)
    ]
    prompts = [one.dialogue for one in UNSEEN.prompts]
    changed = changes({"gold": gold[0]}, {"gold": gold[1]}, prompts)["gold"].interval
    labels = [one.label for one in UNSEEN.ratings]
    ranks = [[auroc(*checked(one.scores, labels)) for one in arm] for arm in (first, second)]
    resamples = ClusterBootstrap([one.dialogue for one in UNSEEN.ratings], seed=0)
    ranked = resamples.estimate(
        lambda drawn_SN: np.mean([b(drawn_SN) - a(drawn_SN) for a, b in zip(*ranks, strict=True)], axis=0)
    ).interval
    assert changed is not None
    assert ranked is not None
    pairs = list(zip(first, second, strict=True))
    return [
        ("gold", [statistics.fmean(b.gold) - statistics.fmean(a.gold) for a, b in pairs], changed),
        ("auroc", [b.auroc - a.auroc for a, b in pairs], ranked),
    ]


def loop(out: Path, seed: int, choose: str, ratings: int, keys: list[str]) -> list[Judged]:
    """Return the results of one arm's rounds, after those of the first run."""
    log, folder = out / choose / "ratings.jsonl", out / "start"
    log.parent.mkdir(parents=True, exist_ok=True)
    found = [judged(folder, seed, None, keys)]
    for number in range(1, ROUNDS + 1):
        rated = out / choose / f"ratings-{number}.jsonl"
        if not rated.exists():
            rate(folder, log, choose, seed * ROUNDS + number, ratings * number)
            rated.write_bytes(log.read_bytes())
        folder = out / choose / f"round-{number}"
        found.append(judged(folder, seed, rated, keys, out / "start"))
    return found


def rate(folder: Path, file: Path, choose: str, seed: int, until: int) -> None:
    """Let the judge answer the questions of `perl-rlhf rate` until the file has `until` ratings."""
    run, log = perl.load_run(folder), RatingLog(file)
    run.session.held_out = run.session.train  # evaluation uses none of the run's prompts
    prompts = {prompt.context: prompt for prompt in run.session.train.prompts}
    judge = run.session.train.judge
    assert judge is not None
    questions = Questions(run, choose, seed)
    while len(log.entries) < until:
        known = {one.mark.question for one in log.entries.values()}
        for question in questions.draw(1, known)[: until - len(log.entries)]:
            (gold,) = judge([prompts[question.context]], [question.completions[0].text])
            log.add(question, "judge", Opinion(label=gold >= 0.5))
    log.close()


def judged(folder: Path, seed: int, ratings: Path | None, keys: list[str], sft_of: Path | None = None) -> Judged:
    """Run all stages, with SFT taken from the run `sft_of` if given, and evaluate them on `UNSEEN`."""
    file = folder / "judged.json"
    if not file.exists():
        path = [] if ratings is None else [f"data.path={ratings.absolute()}"]
        recipe = perl.load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"seed={seed}", *keys, *path])
        perl.run(recipe, folder, source=sft_of)
        run = perl.load_run(folder)
        assert UNSEEN.judge is not None
        texts = run.complete([prompt.context for prompt in UNSEEN.prompts], "policy")
        scores = run.score_answers([(rating.context, rating.answer) for rating in UNSEEN.ratings])
        up = [rating.label for rating in read_jsonl(ratings).ratings] if ratings is not None else None
        one = Judged(
            gold=UNSEEN.judge(UNSEEN.prompts, texts),
            scores=[round(one.score, 4) for one in scores],
            ratings_up=None if up is None else statistics.fmean(up),
        )
        write_json(file, asdict(one))
    return Judged(**json.loads(file.read_text()))


if __name__ == "__main__":
    main()
