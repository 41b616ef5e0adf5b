"""A chat template that writes a finished dialogue as a reward model read it, for others to score with."""

import json

from perl.backbones.template import ASKED, Template


def ending_with_completion(source: str, template: Template) -> str:
    """The template, and where a dialogue ends with a completion it writes what `Template.row` does.

    Args:
        source: of the chat template, in Jinja.
    """
    prompt, _ = template.row(ASKED)
    end = json.dumps(template.end)
    whole = f"dialogue[: dialogue | length - {template.after}] + {json.dumps(template.closing)}"
    answered = f"{{{{ {whole} }}}}"
    if not template.writes_after_prompt():
        said = "said"
        if tag := template.opened(prompt):
            opened, closed = json.dumps(f"<{tag}>"), json.dumps(f"</{tag}>")
            said = f"(said.removeprefix({opened}).lstrip() if {closed} in said else {closed} + '\\n\\n' + said)"
        answered = (
            "{% set said = messages[-1].content | trim %}"
            "{% set messages = messages[:-1] %}{% set add_generation_prompt = true %}"
            f"{_captured('prompt', source)}"
            f"{{{{ {whole} if dialogue.startswith(prompt) else prompt + {said} + {end} }}}}"
        )
    return (
        f"{_captured('dialogue', source)}"
        "{% if messages[-1].role == 'assistant' and not add_generation_prompt %}"
        f"{answered}{{% else %}}{{{{ dialogue }}}}{{% endif %}}"
    )


def _captured(name: str, source: str) -> str:
    newline = "\n"  # Jinja drops one after a block, and one at a template's end
    return f"{{% set {name} %}}{newline}{source.removesuffix(newline)}{{% endset %}}"
