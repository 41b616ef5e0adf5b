"""The model card of an exported role: what it is, how to load it, what it came to, and on what terms."""

from dataclasses import dataclass
from pathlib import Path

from perl.recipe import StageName
from perl.roles.roles import Role
from perl.roles.shared_base import SharedBase
from perl.stages.session import Session

TITLES = {
    Role.SFT: "language model after supervised fine-tuning",
    Role.REWARD: "reward model",
    Role.POLICY: "language model after RL",
    Role.CRITIC: "critic of RL",
}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be in every version (vllm/config/lora.py, `MaxLoRARanks`)."""
MAX_NEW_TOKENS = 64
"""In the card's code, where the run says nothing."""

FOUR_BIT = (
    "It was trained beside the base in 4 bits, so load that in 4 bits: to the options of `from_pretrained` add "
    '`quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    "bnb_4bit_compute_dtype=DTYPE)`, DTYPE being that of the table."
)


@dataclass(frozen=True)
class Exported:
    """What was exported, for the card and for who exported it."""

    role: Role
    stage: StageName
    whole: bool
    """A whole model; else an adapter."""
    scores: bool
    """A sequence classifier; else a language model."""
    text: bool
    """The run's rows are plain text, without a chat format."""
    text_end: str
    """What plain text needs after it, as Python."""
    pad_id: int
    """The token for padding."""
    difference: float | None = None
    """The largest between scores by transformers and the run's own, on held-out rows."""


def card(session: Session, made: Exported) -> str:
    """The card in Markdown, with the metadata that the hub reads on top."""
    parts = [
        _metadata(session, made),
        f"# {session.recipe.name}: {TITLES[made.role]}",
        _origin(session, made),
        "## Loading\nWith this folder as the working folder, or its name or hub id as `folder`:",
        f"```python\n{_code(session, made)}\n```",
        FOUR_BIT if session.recipe.base.quantization == "4bit" else "",
        _scores(session, made) if made.scores else _answers(session, made),
        _figures(session, made),
        "## Licence\nThe licences of the base and of the data hold for this folder too; PERL adds no terms.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(session: Session, made: Exported) -> str:
    lines = [f"library_name: {'transformers' if made.whole else 'peft'}"]
    if not Path(session.base.name).exists() and session.recipe.base.config is None:
        lines.append(f"base_model: {session.base.name}")
    lines.append(f"pipeline_tag: text-{'classification' if made.scores else 'generation'}")
    return "\n".join(["---", *lines, "tags: [perl-rlhf, rlhf]", "---"])


def _origin(session: Session, made: Exported) -> str:
    recipe, base = session.recipe, session.base
    origin = f"`{Path(base.name).name if Path(base.name).exists() else base.name}`"
    if recipe.base.build is not None:
        origin = f"a tiny {type(session.roles.models()[0]).__name__} that the recipe trained on the same source"
    if recipe.tuning == "full":
        form = "trained whole"
    else:
        assert isinstance(session.roles, SharedBase)
        form = f"{session.roles.adapter}" + (", merged into the base" if made.whole else "")
    data = recipe.data.source + (f", `{Path(recipe.data.path).name}`" if recipe.data.path else "")
    rows = [
        ("base", f"{origin}, {base.parameters:,} parameters, {recipe.base.dtype}"),
        ("base's weights, SHA-256", f"`{base.sha256}`"),
        ("trained by", f"[PERL](https://arxiv.org/abs/2403.10704), stage `{made.stage}`; {form}"),
        ("data", data),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])


def _code(session: Session, made: Exported) -> str:
    """Python that loads the folder and uses it once."""
    task = "SequenceClassification" if made.scores else "CausalLM"
    model = f"Auto{'' if made.whole else 'Peft'}ModelFor{task}"
    code = ", trust_remote_code=True" if session.recipe.base.trust_remote_code else ""
    options = code if made.whole else f'{code}, dtype="{session.recipe.base.dtype}"'
    if made.scores and not made.whole:
        options += f", num_labels=1, pad_token_id={made.pad_id}"
    names = ["AutoTokenizer", *([model] if made.whole else []), *([] if made.scores else ["GenerationConfig"])]
    load = [
        *([] if made.whole else [f"from peft import {model}"]),
        f"from transformers import {', '.join(sorted(names))}",
        "",
        'folder = "."',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{code})",
        f"model = {model}.from_pretrained(folder{options}).eval()",
    ]
    return "\n".join([*load, *(_score_code(made) if made.scores else _answer_code(session, made))])


def _score_code(made: Exported) -> list[str]:
    if made.text:
        parts = ('"A prompt"', '" and its answer."', made.text_end)
        return [
            f"texts = [{' + '.join(part for part in parts if part)}]",
            'rows = tokenizer(texts, padding=True, return_tensors="pt")',
            "scores = model(**rows).logits[:, 0]",
        ]
    said = '[{"role": "user", "content": "A latte, please."}, {"role": "assistant", "content": "What size?"}]'
    return [
        f"dialogues = [{said}]",
        "texts = tokenizer.apply_chat_template(dialogues, tokenize=False)",
        'rows = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")',
        "scores = model(**rows).logits[:, 0]",
    ]


def _answer_code(session: Session, made: Exported) -> list[str]:
    limit = session.recipe.rl.max_new_tokens if session.recipe.rl else MAX_NEW_TOKENS
    ask = 'dialogue = [{"role": "user", "content": "A latte, please."}]'
    options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
    prompt = f"prompt = tokenizer.apply_chat_template(dialogue, {options})"
    if made.text:
        ask, prompt = 'text = "A prompt"', 'prompt = tokenizer(text, return_tensors="pt")'
    return [
        ask,
        prompt,
        "settings = GenerationConfig.from_pretrained(folder)",
        f"ids = model.generate(**prompt, generation_config=settings, max_new_tokens={limit})",
        'answer = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)',
    ]


def _scores(session: Session, made: Exported) -> str:
    """What a score means, how RL used it, and what a pipeline gives."""
    stamp = session.stamp(made.role)
    if made.role is Role.CRITIC:
        meaning = (
            "A score is the value of the text so far: what RL expected it to earn from there on, KL penalty "
            "included. It is read at the last token: the text is a prompt, or a prompt and a part of its answer."
        )
    else:
        what, reward = ("the log-odds of a thumb up", "σ(score)")
        if not stamp.reward_is_probability:
            what, reward = ("a number of which only differences mean something", "score")
        meaning = (
            f"A score is {what}, read at the last token of a whole answer"
            f"{' (its end token)' if made.text else ', which ends where the chat template says'}. "
            f"RL's reward is ({reward} - {stamp.reward_mean:.6g}) / {stamp.reward_std:.6g}, mean and spread being "
            "those of the training rows."
        )
    parts = ["## Scores", meaning]
    if made.whole:
        default = "σ(score)" if stamp.reward_is_probability else "the score as it is"
        template = "" if made.text else " Call it with `add_special_tokens=False`: the template has written them."
        parts.append(
            f'`pipeline("text-classification", folder)` gives {default}; with `function_to_apply="none"` always '
            f"the score.{template}"
        )
    if made.difference is not None:
        parts.append(
            f"Loaded in {session.recipe.base.dtype}, its scores of held-out rows differ from the run's own by at "
            f"most {made.difference:.1g}."
        )
    return "\n\n".join(parts)


def _answers(session: Session, made: Exported) -> str:
    """How to serve a language model."""
    lora, name = session.recipe.lora, session.recipe.name
    tokens = session.base.tokenizer.convert_ids_to_tokens(list(session.base.chat.end_ids))
    ends = " or ".join(f"`{token}`" for token in tokens)
    serve = f"vllm serve {name}"
    notes = ""
    if not made.whole and lora is not None:
        rank = next((rank for rank in VLLM_RANKS if rank >= lora.rank), None)
        base = session.base.name if not Path(session.base.name).exists() else "BASE"
        serve = (
            f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}=. --generation-config ."
            f"\nLORA_ADAPTERS={name}=. text-generation-launcher --model-id {base}"
        )
        if rank is None:
            serve, notes = "", f"vLLM takes no adapter of rank {lora.rank}: export with --merge to serve it.\n\n"
    commands = f"```\n{serve}\n```\n\n" if serve else ""
    return f"## Serving\n{notes}{commands}An answer ends with {ends}; `generation_config.json` says so."


def _figures(session: Session, made: Exported) -> str:
    """What the stage came to on held-out data."""
    result = session.folder.result(made.stage)
    assert result is not None
    metrics = {name: value for name, value in vars(result.eval).items() if isinstance(value, int | float | str)}
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in metrics.items()}
    rows = [f"| {name} | {value} |" for name, value in shown.items()]
    return "\n".join([f"## Figures\nOf stage `{made.stage}`, on held-out data:\n", "| | |", "|---|---|", *rows])
