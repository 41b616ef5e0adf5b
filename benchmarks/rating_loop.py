"""Rate, train a reward model, train a policy, rate again: what are ratings worth that are chosen by uncertainty?

    python -m benchmarks.rating_loop --seeds 3 --out runs/rating-loop

The coffee shop's gold judge is the rater, without noise. A run has SFT, a reward model and a policy of 100
ratings; then, in each of two rounds, 200 completions of the last run's roles on training prompts are rated as
`perl-rlhf rate` asks for them and writes them, and the stages are run again on all ratings so far. Both arms start
from the same run and differ in `--choose` alone. All is judged on prompts and turns that no run has: gold is the
share of the policy's completions that the judge finds right, AUROC that of the reward model against the judge.

Called again, it goes on where it stopped. In --out: a run folder each, ratings.jsonl, and loop.json.
"""

import argparse
import json
import statistics
from pathlib import Path

from sklearn.metrics import roc_auc_score

import perl
from perl.data.simulator.source import simulate
from perl.rating.log import Opinion, RatingLog
from perl.rating.questions import CHOICES, Questions
from perl.system.files import write_json

ROOT = Path(__file__).parent.parent
ROUNDS = 2
UNSEEN = 1_000
"""The seed of what is judged on: no run has it."""
KEYS = [
    "data.source=rated-shop",
    "reward.epochs=8",
    "reward.batch_size=16",
    "rl.anyway=true",
    "rl.eval_prompts=16",
    f"plugins=[{ROOT / 'benchmarks' / 'rated_shop.py'}]",
]


def main() -> None:
    """Run the loop for each seed and arm, and print a line a round."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratings", type=int, default=200, help="a round")
    parser.add_argument("--out", type=Path, default=Path("runs/rating-loop"))
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="of every run's recipe")
    asked = parser.parse_args()
    rows = []
    for seed in range(asked.seeds):
        for choose in CHOICES:
            for row in loop(asked.out / str(seed), seed, choose, asked.ratings, [*KEYS, *asked.keys]):
                rows.append(row)
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
                write_json(asked.out / "loop.json", rows)
    for number in range(1, ROUNDS + 1):
        of = {how: [r for r in rows if (r["choose"], r["round"]) == (how, number)] for how in CHOICES}
        for metric in ("gold", "auroc"):
            gains = [a[metric] - b[metric] for a, b in zip(of["uncertainty"], of["random"], strict=True)]
            mean = statistics.mean(gains)
            print(f"round {number}: {metric}, uncertainty less random: mean {mean:+.3f}, each {gains}")


def loop(out: Path, seed: int, choose: str, ratings: int, keys: list[str]) -> list[dict[str, float | int | str]]:
    """The rounds of one arm, the run before them included."""
    log, folder = out / choose / "ratings.jsonl", out / "start"
    log.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"seed": seed, "choose": choose, "round": 0, **judged(folder, seed, None, keys)}]
    for number in range(1, ROUNDS + 1):
        rated = out / choose / f"ratings-{number}.jsonl"
        if not rated.exists():
            rate(folder, log, choose, seed * ROUNDS + number, ratings * number)
            rated.write_bytes(log.read_bytes())
        folder = out / choose / f"round-{number}"
        rows.append({"seed": seed, "choose": choose, "round": number, **judged(folder, seed, rated, keys)})
    return rows


def rate(folder: Path, file: Path, choose: str, seed: int, until: int) -> None:
    """Let the judge rate what `perl-rlhf rate` would ask, until the file has so many ratings."""
    run, log = perl.load_run(folder), RatingLog(file)
    run.session.held_out = run.session.train  # what is judged on later has nothing to do with the run
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


def judged(folder: Path, seed: int, ratings: Path | None, keys: list[str]) -> dict[str, float]:
    """A run of all stages, judged on prompts and turns that it has not seen."""
    file = folder / "judged.json"
    if not file.exists():
        path = [] if ratings is None else [f"data.path={ratings.absolute()}"]
        recipe = perl.load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"seed={seed}", *keys, *path])
        perl.run(recipe, folder)
        run, unseen = perl.load_run(folder), simulate(UNSEEN, dialogues=0, ratings=1_000, prompts=512, noise=0.0)
        assert unseen.judge is not None
        texts = run.complete([prompt.context for prompt in unseen.prompts], "policy")
        scores = run.score_answers([(rating.context, rating.answer) for rating in unseen.ratings])
        auroc = roc_auc_score([rating.label for rating in unseen.ratings], [one.score for one in scores])
        gold = statistics.mean(unseen.judge(unseen.prompts, texts))
        write_json(file, {"gold": round(gold, 4), "auroc": round(float(auroc), 4)})
    found: dict[str, float] = json.loads(file.read_text())
    return found


if __name__ == "__main__":
    main()
