"""Chat templates for the model of lm-evaluation-harness."""

from typing import Any

from ladder_jax.config import ConfigError


def render(
    template: str,
    messages: list[dict[str, str]],
    add_generation_prompt: bool,
    names: dict[str, str | None],
) -> str:
    """Renders a chat template as transformers does.

    Args:
      template: in Jinja.
      messages: role and content of each.
      add_generation_prompt: see LadderLM.apply_chat_template.
      names: of the special tokens: bos_token, ...
    Raises ConfigError if the template refuses the messages.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    end = "<<the last message ends here>>"
    if not add_generation_prompt:
        last = messages[-1] | {"content": messages[-1]["content"] + end}
        messages = [*messages[:-1], last]
    program = environment.from_string(template)
    options: dict[str, Any] = dict(names, add_generation_prompt=add_generation_prompt)
    try:
        text = program.render(messages=messages, **options)
    except jinja2.TemplateError as error:
        without_system = [m for m in messages if m["role"] != "system"]
        if len(without_system) == len(messages):
            raise ConfigError(f"the chat template cannot be applied: {error}") from None
        text = program.render(messages=without_system, **options)
    return text if add_generation_prompt else text[: text.rindex(end)]
