"""A source of one's own: a CSV file of questions, answers and stars, as ratings and demonstrations.

In a recipe: `plugins: [example_source.py]` and `data: {source: stars, path: answers.csv}`.
"""

import csv
from pathlib import Path

from perl.data.records import Demonstration, Problem, Prompt, Rating, Records, Turn
from perl.data.sources import SOURCES, Source
from perl.errors import UserError


def read_stars(path: Path | None, seed: int) -> Records:
    """Four stars and more rate an answer up; five make it a demonstration as well."""
    if path is None:
        raise UserError("stars needs a file", where="data.path", remedy="Set data.path to a .csv file.")
    records = Records()
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            question, answer, stars = row["question"], row["answer"], row["stars"]
            if stars not in ("1", "2", "3", "4", "5"):
                records.problems.append(Problem(f"{path}, row {number}", f"stars is {stars!r}; 1 to 5 expected"))
                continue
            context, turn = (Turn("user", question),), Turn("agent", answer)
            # Rows of one dialogue are never split between training and evaluation.
            records.prompts.append(Prompt(context, dialogue=question))
            records.ratings.append(Rating(context, turn, label=stars in "45", dialogue=question))
            if stars == "5":
                records.demonstrations.append(Demonstration(context, (turn,), dialogue=question))
    return records


SOURCES["stars"] = Source(read_stars, "questions and answers with one to five stars", licence="CC0")
