"""Strategies for fuzzing: nearly valid recipes, and texts that are hardly recipes."""

import copy
from typing import Any

import yaml
from hypothesis import strategies as st

GOOD: dict[str, Any] = {
    "name": "good",
    "seed": 3,
    "base": {"build": {"steps": 2, "hidden_size": 32, "heads": 2}},
    "lora": {"rank": 4, "targets": ["q_proj"], "layers": [0, 1]},
    "data": {"source": "jsonl", "path": "own.jsonl", "held_out": 0.25},
    "sft": {"epochs": 2},
    "reward": {"loss": "pairs", "learning_rate": 2e-3},
    "rl": {"algorithm": "rloo", "samples_per_prompt": 4, "reward": {"function": "f.py:f"}, "kl_coef": 0.0},
}
KEYS = "name base build model rl reward kind plugins sft steps lora layers config random_init trust_remote_code"
MARKS = "1 -1 1e-3 .inf .nan null true ~ *a &a << [ ] { } , | > ' \" # % @ ` \\x 0x 1:60 2001-1-1 é \ud7ff"
TAGS = "!!int !!float !!bool !!timestamp !!binary !!set !!map !!omap !!pairs !!python/name:os.system !x"
SPACED = ["? ", ": ", "- ", "\n", "\n  ", "\n    ", "\t", "---\n", "...\n", *(f"{tag} " for tag in TAGS.split())]
MARKUP = st.sampled_from([*KEYS.split(), *MARKS.split(), *SPACED])
YAML = st.one_of(st.text(), st.lists(MARKUP, max_size=30).map("".join))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10), st.dates(), st.binary(max_size=5)
)
CONTENT = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def near_recipes(draw: st.DrawFn) -> str:
    """Draw a valid recipe with a few keys renamed, removed, moved or given other values."""
    recipe = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(0, 3))):
        section = recipe
        while True:
            key = draw(st.sampled_from(sorted(section, key=str)))
            if not (isinstance(section[key], dict) and section[key] and draw(st.booleans())):
                break
            section = section[key]
        match draw(st.sampled_from(["value", "name", "remove", "word", "number"])):
            case "value":
                section[key] = draw(CONTENT)
            case "name":
                section[draw(SCALARS)] = section[key]
            case "remove" if len(section) > 1:
                del section[key]
            case "word":
                section[key] = draw(MARKUP)
            case _:
                section[key] = draw(st.integers(0, 9) | st.floats(0, 1))
    return str(yaml.dump(recipe))


KEYS_GIVEN = "rl.steps rl.reward plugins base.build base.config name data.path a.b.c lora ."
OVERRIDES = st.one_of(
    st.text(max_size=20),
    st.builds(
        "{}={}".format,
        st.sampled_from([*KEYS_GIVEN.split(), ""]),
        YAML | CONTENT.map(yaml.dump),
    ),
)
