"""The model card of an exported role: what it is, how to load it, its metrics, and its licence."""

from dataclasses import dataclass
from pathlib import Path

from perl.recipe import StageName
from perl.recipe.adapter import DoraSettings, LoraSettings
from perl.report.templates import filled
from perl.roles.role import REWARD_MEMBERS, Role
from perl.roles.shared_base import SharedBase
from perl.stages.conversion import MAX_NEW_TOKENS, Conversion
from perl.stages.session import Session

TITLES = {
    Role.SFT: "language model after supervised fine-tuning",
    **dict.fromkeys(REWARD_MEMBERS, "reward model"),
    Role.POLICY: "language model after RL",
    Role.CRITIC: "critic of RL",
}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank` that every version accepts (vllm/config/lora.py, `MaxLoRARanks`)."""


@dataclass(frozen=True)
class Exported:
    """Description of an export.

    Attributes:
        whole: whether it is a whole model; else an adapter.
        scores: whether it is a sequence classifier; else a language model.
        text: whether the run's rows are plain text, without a chat format.
        text_end: what has to be appended to plain text, as Python code.
        start_ids: tokens that an encoder-decoder's decoder starts with; empty for other models.
        difference: largest difference of transformers' scores from the run's own, on held-out rows.
        conversion: the loss of converting the adapter to LoRA; None: the adapter as it was trained.
    """

    role: Role
    stage: StageName
    whole: bool
    scores: bool
    text: bool
    text_end: str
    start_ids: tuple[int, ...] = ()
    difference: float | None = None
    conversion: Conversion | None = None


def model_card(session: Session, exported: Exported) -> str:
    """Return the card in Markdown, with the hub's metadata on top."""
    recipe, base = session.recipe, session.base
    local = Path(base.name).exists()
    origin = f"`{Path(base.name).name if local else base.name}`"
    if recipe.base.build is not None:
        origin = f"a tiny {type(session.roles.models()[0]).__name__} that the recipe trained on the same source"
    form = "all weights trained"
    if isinstance(session.roles, SharedBase):
        form = f"{session.roles.adapter}" + (", merged into the base" if exported.whole else "")
    biases = False
    if (converted := exported.conversion) is not None:
        form = f"{converted.kind}, written as LoRA: {converted}"
        biases = converted.truncation.biases
    auto_class = f"Auto{'' if exported.whole else 'Peft'}ModelFor"
    of_lm = session.roles.backbone.auto_class.__name__.removeprefix("AutoModelFor")
    auto_class += "SequenceClassification" if exported.scores and not exported.start_ids else of_lm
    imported = ["AutoTokenizer", *[auto_class] * exported.whole, *["GenerationConfig"] * (not exported.scores)]
    tokens = base.tokenizer.convert_ids_to_tokens(list(base.chat.end_ids))
    settings = session.roles.adapter.settings if isinstance(session.roles, SharedBase) else None
    served = isinstance(settings, LoraSettings) and not isinstance(settings, DoraSettings) and not biases
    rank = settings.rank if isinstance(settings, LoraSettings) and served else None
    served_rank = next((one for one in VLLM_RANKS if rank is not None and one >= rank), None)
    return filled(
        "model_card.md.j2",
        {
            "exported": exported,
            "recipe": recipe,
            "base": base,
            "title": TITLES[exported.role],
            "hub_id": None if local or recipe.base.config is not None else base.name,
            "hub_or_base": "BASE" if local else base.name,
            "origin": origin,
            "data_file": Path(recipe.data.path).name if recipe.data.path else None,
            "auto_class": auto_class,
            "imported": sorted(imported),
            "remote_code": ", trust_remote_code=True" if recipe.base.trust_remote_code else "",
            "max_new_tokens": recipe.rl.max_new_tokens if recipe.rl else MAX_NEW_TOKENS,
            "stamp": session.stamp(exported.role) if exported.scores else None,
            "form": form,
            "starts": _starts(session, exported.stage),
            "rank": rank,
            "served_rank": served_rank,
            "longest": session.max_length("reward") if exported.stage == "reward" else None,
            "members": session.reward_members,
            "ends": " or ".join(f"`{token}`" for token in tokens),
            "metrics": _metrics(session, exported),
        },
    )


def _starts(session: Session, stage: StageName) -> list[str]:
    """Return the adapters, trained elsewhere, that the stage (or the SFT stage before RL) started from."""
    finished = session.folder.results().finished
    stages = [finished[name] for name in ("sft", "rl") if name in finished] if stage == "rl" else [finished[stage]]
    starts = [one.started_from for one in stages if one.started_from is not None]
    return [f"`{Path(start.folder).name}`, SHA-256 of its weights `{start.sha256}`" for start in starts]


def _metrics(session: Session, exported: Exported) -> dict[str, str]:
    """Return the scalar values of the stage's evaluation on held-out data."""
    result = session.folder.result(exported.stage)
    assert result is not None
    values = {name: value for name, value in vars(result.eval).items() if isinstance(value, int | float | str)}
    return {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
