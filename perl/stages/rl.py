"""The RL stage: evaluates the policy, trains it, and evaluates it again.

The policy starts as a copy of the reference (the SFT adapter or the bare base) and is kept near it.
"""

from collections.abc import Sequence
from functools import partial

from perl.errors import UserError
from perl.measure.change import fixed, measured_words
from perl.results import RlStage
from perl.rl.best_of_n import best_of_n
from perl.rl.evaluate import draw_samples, evaluate_policy, policy_change, success_rates
from perl.rl.loop import InitialEval, Loop, checkpoint, choose, resume, train
from perl.rl.results import RlEval
from perl.rl.rollout import EncodedPrompts
from perl.roles.role import Role
from perl.runs.folder import MetricsLog
from perl.stages.cut_rows import say_cut, say_notes
from perl.stages.rl_reward_server import check_reward_servers
from perl.stages.rl_rewards import reward_context, settings_of
from perl.stages.rl_setup import eval_prompts, setup, tokenized_prompts
from perl.stages.session import Session
from perl.stages.validation_rows import validation_split
from perl.system.progress import console, counted

SAMPLES_PER_STEP = 4
"""Held-out prompts for which completions are sampled every `rl.sample_every` steps."""
MIN_ATTEMPTS = 4
"""Minimum number of completions per prompt for measuring its difficulty."""
SAMPLES = 12
"""Held-out prompts whose completions are saved for people to read."""


def check(session: Session) -> None:
    """Refuse prompts and rewards that RL cannot use."""
    settings = settings_of(session)
    prompts = [*session.train.prompts, *session.held_out.prompts]
    tokenized_prompts(session, prompts)
    validation_split(session, "rl")
    if settings.eval_reward == "gold" and session.train.judge is None:
        raise UserError(
            f"{session.recipe.data.source} has no gold judge",
            where="rl.eval_reward: gold",
            remedy="Use a rule, a function or a member of the reward model, or leave eval_reward out.",
        )
    context = reward_context(session)
    for part in (*settings.reward_parts, *settings.eval_reward_parts):
        if not part.needs_model:  # the reward model is not trained yet
            part.source(context)


def train_rl(session: Session) -> RlStage:
    """Train the policy and any critic, evaluate the policy before and after, and save them."""
    settings, held_out, judge = settings_of(session), eval_prompts(session), session.held_out.judge
    check_reward_servers(session)  # before training: it adds the reward model for the comparison
    loop = setup(session, held_out)
    rows, cut = len(loop.prompts) + len(held_out), loop.prompts.cut + held_out.cut
    say_cut(cut, rows, settings.max_prompt_length or 0, "rl.max_prompt_length")
    console.print(_plan(session, loop))
    initial, done = resume(loop)
    if initial is None:
        measure_difficulty(session, loop)
        reference = session.roles.reference
        initial = InitialEval(
            preflight=loop.preflight.check(),
            before=evaluate_policy(loop.collector, reference, held_out, judge, say_spread=True),
        )
        _check_sign(loop, initial.before["reward"], settings.algorithm)
        checkpoint(loop, 0, initial)
    with session.metrics(Role.POLICY, done) as log:
        stopped_by = train(loop, initial, done, partial(_log, session, loop, held_out, log))
    trained = session.roles.parameters_of(*loop.learner.trained)
    kept_step = choose(loop, stopped_by)
    found = None if loop.validation is None else loop.validation.found
    # A guard can stop RL before the first validation.
    stopped_at = stopped_by[0].step if stopped_by else None
    kept = found.kept(kept_step, settings.steps, stopped_at) if found is not None and found.values else None
    stage = session.stage(loop.meter, trained, _policy_rate(loop), rows, cut, kept)
    after = evaluate_policy(loop.collector, Role.POLICY, held_out, judge)
    best = None
    if settings.best_of_n > 1:
        reference = session.roles.reference
        best = best_of_n(loop.collector, reference, held_out, judge, settings.best_of_n, after)
    _save(session, loop, held_out)
    change = policy_change(initial.before, after, held_out, settings.eval_samples)
    return RlStage(
        **vars(stage),
        preflight=initial.preflight,
        liveness=loop.liveness.found or [],
        algorithm_row=loop.algorithm,
        incidents=loop.guarding.incidents(stopped_by, kept_step),
        eval=RlEval(
            **vars(change),
            algorithm=settings.algorithm,
            critic=session.recipe.critic,
            steps=kept_step,
            best_of_n=best,
        ),
    )


def _log(
    session: Session,
    loop: Loop,
    held_out: EncodedPrompts,
    log: MetricsLog,
    step: int,
    metrics: dict[str, float],
    served: dict[str, str],
) -> None:
    """Write a step's metrics and, every `rl.sample_every` steps, samples of the policy."""
    log.write(step, metrics, served)
    if step % settings_of(session).sample_every == 0:
        shown = held_out.take(range(min(SAMPLES_PER_STEP, len(held_out))))
        judge = session.held_out.judge
        session.folder.add_samples(step, draw_samples(loop.collector, [Role.POLICY], shown, judge))


def measure_difficulty(session: Session, loop: Loop) -> None:
    """Order the prompts of a curriculum without given difficulties by the reference's success rates."""
    choice = loop.prompt_choice
    if choice.must_measure:
        each, success = max(MIN_ATTEMPTS, loop.samples_per_prompt), loop.objective.success_reward
        rates = success_rates(loop.collector, session.roles.reference, loop.prompts, each, success)
        choice.easiest_first = sorted(range(len(rates)), key=lambda prompt: -rates[prompt])


def _check_sign(loop: Loop, rewards: Sequence[float], algorithm: str) -> None:
    """Refuse rewards that an algorithm that divides by their mean cannot use.

    Args:
        rewards: each prompt's mean before training.
    """
    if loop.algorithm.advantage == "group-relative" and max(rewards) < 0.0:
        raise UserError(
            f"{algorithm} divides by the mean reward of a prompt's completions, which has to be above 0, but "
            f"before RL it is {min(rewards):.3g} to {max(rewards):.3g}: nothing would be learned",
            where="rl.algorithm",
            remedy="Add a constant to the reward, so that it is never negative, or set another algorithm, such "
            "as rloo.",
        )


def _plan(session: Session, loop: Loop) -> str:
    """Describe a step: the algorithm's resolved row, and the values that `auto` resolved to."""
    settings, rate, head_rate = settings_of(session), _policy_rate(loop), loop.learner.rates[-1]
    rates = [] if rate is None else [f"{rate:.2g}"]
    rates += [f"{head_rate:.2g} for the critic's head"] if loop.algorithm.needs_critic else []
    at = f"; learning rate {', '.join(rates)}" if rates else ""
    completions = counted(settings.prompts_per_step * settings.samples_per_prompt, "completion")
    return (
        f"RL with {settings.algorithm}: {counted(settings.steps, 'step')} of {completions} and "
        f"{counted(settings.epochs * settings.minibatches, 'update')}{at}.\n"
        f"{settings.algorithm}: {loop.algorithm.words}."
    )


def _policy_rate(loop: Loop) -> float | None:
    """Return the policy's peak learning rate; None under the natural gradient, whose step `trust_region` sets."""
    return None if loop.algorithm.direction == "natural" else loop.learner.rates[0]


def _save(session: Session, loop: Loop, held_out: EncodedPrompts) -> None:
    """Save the trained roles, and completions of each policy for people to read."""
    session.save(Role.POLICY, parent=session.roles.reference)
    if Role.CRITIC in session.roles.roles:
        session.save(Role.CRITIC, parent=Role.REWARD)
    policies = [role for role in (Role.BASE, Role.SFT, Role.POLICY) if role in session.roles.roles]
    shown = held_out.take(range(min(SAMPLES, len(held_out))))
    session.folder.write_samples(draw_samples(loop.collector, policies, shown, session.held_out.judge))


def summary(stage: RlStage) -> None:
    """Print the result of RL, and why a guard stopped it."""
    change = stage.eval
    each = counted(change.samples_per_prompt or 1, "completion")
    text = (
        f"[bold]RL[/] ({change.algorithm}, {counted(change.steps, 'step')}): on "
        f"{counted(change.n, 'held-out prompt')}, {each} each, the reward "
        f"{measured_words(change.reward_before, change.reward_after, change.reward_interval)}, at a KL of "
        f"{fixed(change.kl, 1)} nats per completion."
    )
    for one in change.pass_at or []:
        text += f" pass@{one.k} {measured_words(one.before, one.after, one.interval)}."
    if change.gold_before is not None and change.gold_after is not None:
        text += (
            " The share that the gold judge, which training never sees, finds right "
            f"{measured_words(change.gold_before, change.gold_after, change.gold_interval, percent=True)}."
        )
    console.print(text)
    if change.best_of_n:
        console.print(f"  {change.best_of_n_words}", markup=False)
    say_notes(stage)
    for incident in stage.incidents:
        if incident.action == "stopped":
            console.print(
                f"[yellow]RL was stopped at step {incident.step}[/]: {incident.what}. The result is the policy "
                f"after {counted(incident.remains or 0, 'update')}, from before that. {incident.remedy}"
            )
