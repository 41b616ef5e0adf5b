"""The commands that the page suggests next."""

from perl.report.runs import Group


def next_steps(group: Group, compared: bool) -> list[tuple[str, str]]:
    """Return what can be done with these runs, as pairs of purpose and command.

    Args:
        compared: whether the page compares two tunings.
    """
    run = group.first
    folder = run.path.name if run.path.is_absolute() else run.path.as_posix()
    again = f"perl-rlhf run {folder}/recipe.yaml"
    steps = []
    if group.rl:
        steps += [
            ("Chat with the policy, side by side with base and SFT", f"perl-rlhf chat {folder}"),
            ("Export it for peft and vLLM", f"perl-rlhf export {folder} policy exported/policy"),
        ]
    elif group.reward:
        steps += [
            ("Score your own completions", f"perl-rlhf score {folder} FILE --out scores.jsonl"),
            ("Export the reward model", f"perl-rlhf export {folder} reward exported/reward"),
        ]
    elif group.sft:
        steps += [("Export the model for peft and vLLM", f"perl-rlhf export {folder} sft exported/sft")]
    if not run.recipe:
        return steps
    if group.rl:
        done = run.section("rl").get("steps")
        setting = f"rl.steps={2 * done}" if isinstance(done, int) else "rl.kl_coef=0.1"
        command = f"{again} {setting} --from {folder} --out {folder}-2"
        steps += [("Train only RL again, with another setting", command)]
    if len(group.runs) == 1:
        seed = run.report.seed + 1
        steps += [("See whether another seed agrees", f"{again} seed={seed} --out {folder}-seed-{seed}")]
    if run.stages and not compared:
        steps += [("Compare with full tuning", f"perl-rlhf compare {folder}/recipe.yaml")]
    return steps
