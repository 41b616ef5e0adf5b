"""The stages in order, each from where the last one stopped, and the report at the end."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.progress import console
from perl.recipe import Recipe, StageName
from perl.report import write_report
from perl.rundir import STAGE_ROLE
from perl.seeds import seed_everything
from perl.stages import reward, rl, sft
from perl.stages.material import Material
from perl.stages.session import Session, open_session

TRAIN: dict[StageName, Callable[[Session], dict[str, Any]]] = {
    "sft": sft.train_sft,
    "reward": reward.train_reward,
    "rl": rl.train_rl,
}
CHECK: dict[StageName, Callable[[Session], None]] = {
    "sft": sft.check,
    "reward": reward.check,
    "rl": rl.check,
}
SUMMARY: dict[StageName, Callable[[dict[str, Any]], None]] = {
    "sft": sft.summary,
    "reward": reward.summary,
    "rl": rl.summary,
}


def run(
    recipe: Recipe,
    out: Path,
    stages: Sequence[StageName] | None = None,
    material: Material | None = None,
    engine: Engine | None = None,
) -> None:
    """Run the stages that are not finished, and write the report.

    Args:
        out: the run folder.
        stages: which of the recipe's stages to run; all of them by default.
        material: data and base, where they were read before.
        engine: of the processes that run it together; each calls this.

    Raises:
        UserError: the input of any stage cannot be used; nothing has been written then.
    """
    for stage in stages or ():
        if stage not in recipe.stages:
            raise UserError(f"the recipe has no section {stage}", where=f"recipe {recipe.name}", remedy="Add it.")
    session = open_session(recipe, out, material=material, engine=engine)
    wanted = tuple(stages or recipe.stages)
    unfinished = [stage for stage in wanted if session.folder.result(stage) is None]
    for stage in unfinished:
        _check_earlier(session, stage, wanted)
        CHECK[stage](session)
    with session.folder.claim(recipe):
        for stage in wanted:
            result = session.folder.result(stage)
            if result is None:
                seed_everything(recipe.seed)  # so that a stage draws the same whatever ran before it
                result = TRAIN[stage](session)
                session.folder.finish(stage, result)
            else:
                console.print(f"{stage} is finished already; its result:")
            SUMMARY[stage](result)
        sha256_after = session.roles.base_sha256()  # all processes gather the base together
        if session.processes.main:
            write_report(session, sha256_after)
    if not session.processes.main:
        return
    from perl.page.render import write_page  # matplotlib takes a second to import: not before there is a page

    page = write_page([out], out / "report.html")
    console.print(f"Written: {page}, report.json beside it, and what each role has learnt, in {out}/")


def _check_earlier(session: Session, stage: StageName, wanted: Sequence[StageName]) -> None:
    """A stage alone needs those before it finished."""
    for earlier in session.recipe.stages[: session.recipe.stages.index(stage)]:
        needed = earlier != "sft" or stage == "rl"  # the reward model does not start from the SFT policy
        if needed and earlier not in wanted and session.folder.result(earlier) is None:
            raise UserError(
                f"{stage} needs the adapter of {earlier}, which has not been trained",
                where=str(session.folder.role(STAGE_ROLE[earlier])),
                remedy=f"Run `perl-rlhf {earlier}` with this recipe first, or `perl-rlhf run`.",
            )
