"""Runs the stages in order, each resuming where it stopped, and writes the report at the end."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.parallel.processes import ALONE
from perl.recipe import Recipe, StageName
from perl.recipe.reward_parts import ServerPart
from perl.results import StageResult, Stages
from perl.roles.shared_base import SharedBase
from perl.runs.folder import STAGE_ROLE, RunFolder
from perl.stages import identity, reuse, reward, rl
from perl.stages.material import Material
from perl.stages.opening import open_session
from perl.stages.report_file import LivePage, write_report
from perl.stages.rl_rewards import unfit_for_rl
from perl.stages.session import Session
from perl.system.progress import console, doing
from perl.system.seeds import seed_everything


def _from_sft(name: str) -> Callable[[Any], Any]:
    """Return a function of `perl.stages.sft` that is imported when called; the other stages do not need TRL."""

    def call(argument: Any) -> Any:
        from perl.stages import sft

        return getattr(sft, name)(argument)

    return call


TRAIN: dict[StageName, Callable[[Session], StageResult]] = {
    "sft": _from_sft("train_sft"),
    "reward": reward.train_reward,
    "rl": rl.train_rl,
}
"""Functions that train a stage's roles and save them."""
CHECK: dict[StageName, Callable[[Session], None]] = {
    "sft": _from_sft("check"),
    "reward": reward.check,
    "rl": rl.check,
}
"""Functions that refuse what a stage cannot use, before anything is trained or written."""
SUMMARIZE: dict[StageName, Callable[[Any], None]] = {
    "sft": _from_sft("summary"),
    "reward": reward.summary,
    "rl": rl.summary,
}
"""Functions that print a stage's result."""


def run(
    recipe: Recipe,
    out: Path,
    stages: Sequence[StageName] | None = None,
    material: Material | None = None,
    engine: Engine | None = None,
    source: Path | None = None,
) -> Stages:
    """Run the stages that are not finished and write the report; return the results of all finished stages.

    Args:
        out: the run folder.
        stages: which of the recipe's stages to run; all by default.
        material: data and base, if they have been read before; the base is left without adapters.
        engine: engine of the processes that share the run; each process calls this function.
        source: the folder of another run, whose stages are reused where they fit (`perl.stages.reuse`).

    Raises:
        UserError: the input of a stage cannot be used, and nothing has been written; or the reward model is not
            fit for RL, and all earlier stages are finished.
    """
    for stage in stages or ():
        if stage not in recipe.stages:
            raise UserError(f"the recipe has no section {stage}", where=f"recipe {recipe.name}", remedy="Add it.")
    RunFolder(out, engine.processes if engine is not None else ALONE).check_writable()
    since = time.monotonic()
    with doing("reading the data and the base"):
        session = open_session(recipe, out, material=material, engine=engine)
    try:
        return _run(session, tuple(stages or recipe.stages), source, since)
    finally:
        if material is not None and isinstance(session.roles, SharedBase):
            session.roles.clear()


def _run(session: Session, chosen: Sequence[StageName], source: Path | None, since: float) -> Stages:
    recipe, out = session.recipe, session.folder.path
    identity.refuse_changed(session.folder, session.identities)
    found = reuse.find_stages(recipe, session.folder, session.identities, source)
    for stage in chosen:
        taken = stage in found and found[stage].use == "take"
        if not taken and session.folder.result(stage) is None:
            _check_earlier(session, stage, chosen)
            session.check_start(stage)
            CHECK[stage](session)
    unfit: UserError | None = None
    with session.folder.claim(recipe):
        for stage in chosen:
            if stage == "rl" and session.folder.result("rl") is None and (unfit := _unfit_reward(session)):
                break  # report the finished stages first: the card says why
            if stage in found:
                reuse.take(session.folder, stage, found[stage], session.processes.main)
                session.processes.barrier()
            result = session.folder.result(stage)
            if result is None:
                result = _train(session, stage, since)
                since = time.monotonic()
            elif stage not in found:
                console.print(f"{stage} is already finished; its result:")
            SUMMARIZE[stage](result)
        sha256_after = session.roles.base_sha256()  # collective: all processes gather the base
        if session.processes.main:
            write_report(session, sha256_after)
    if session.processes.main:
        from perl.report.page import write_page  # matplotlib takes a second to import

        page = write_page([out], out / "report.html")
        written = f"Written: {page}, report.json next to it, and each role's trained weights, in {out}/"
        console.print(written, markup=False)
    if unfit is not None:
        raise unfit
    return session.folder.results()


def _unfit_reward(session: Session) -> UserError | None:
    """Return an error if the reward model's card says that it is not fit for RL."""
    settings, reward = session.recipe.rl, session.folder.results().reward
    if reward is None or settings is None or settings.anyway or reward.eval.verdict.fit:
        return None
    if not any(part.needs_model or isinstance(part, ServerPart) for part in settings.reward_parts):
        return None
    return unfit_for_rl(reward.eval.verdict, str(session.folder.role(STAGE_ROLE["reward"])))


def _train(session: Session, stage: StageName, since: float) -> StageResult:
    """Train a stage, or resume it, and write its result.

    Args:
        since: when the user began to wait for it, on the monotonic clock.
    """
    current, folder = session.identities[stage], session.folder
    earlier = folder.waited(stage)
    if session.processes.main:
        identity.record(folder, stage, current)
        page = LivePage(session, stage)

        def after_checkpoint() -> None:
            folder.set_waited(stage, earlier + time.monotonic() - since)
            page()

        session.after_checkpoint = after_checkpoint
    seed_everything(session.recipe.seed)  # so that a stage's random draws do not depend on what ran before it
    with doing(stage):
        result = replace(
            TRAIN[stage](session), data_sha256=current.data_sha256, started_from=session.starts.get(stage)
        )
    result = replace(result, waited_seconds=round(earlier + time.monotonic() - since, 2))
    folder.finish(stage, result)
    return result


def _check_earlier(session: Session, stage: StageName, chosen: Sequence[StageName]) -> None:
    """Refuse a stage whose earlier stages are neither finished nor among those to run."""
    for earlier in session.recipe.stages[: session.recipe.stages.index(stage)]:
        needed = earlier != "sft" or stage == "rl"  # the reward model does not start from the SFT policy
        if needed and earlier not in chosen and session.folder.result(earlier) is None:
            raise UserError(
                f"{stage} needs the adapter of {earlier}, which has not been trained",
                where=str(session.folder.role(STAGE_ROLE[earlier])),
                remedy=f"Run `perl-rlhf {earlier}` with this recipe first, or `perl-rlhf run`.",
            )
