"""Plans a decode step with drafted tokens: `ladder-jax plan --drafts`.

A pass computes 1 + D tokens of every request, and gives it as many tokens as the model
accepts (speculation.py). It has the collectives of one step, so that each token costs
fewer of them. How many tokens a pass gives depends on the text, not on the chips:
`--accepted` says it, and `ladder-jax bench decode --policies speculate` measures it.
"""

from typing import Any

from ladder_jax.config import ConfigError, require
from ladder_jax.planner.plan import Request


def check(request: Request, drafts: int, accepted: float | None) -> float:
    """Returns the tokens that a pass gives; None: all that it computes.

    Raises ConfigError for arguments that are not accepted.
    """
    require(drafts >= 1, "drafts", drafts, "1 or more")
    require(request.workload == "decode", "drafts", drafts, "0 but for decode")
    if 1 + drafts > request.context:
        raise ConfigError(
            f"drafts={drafts} is not accepted: a pass computes {1 + drafts} tokens of "
            f"a request, and context={request.context}"
        )
    if accepted is None:
        return 1.0 + drafts
    is_share = 1 <= accepted <= 1 + drafts
    require(is_share, "accepted", accepted, f"from 1 to 1 + drafts = {1 + drafts}")
    return accepted


def compare(
    plain: dict[str, Any], drafted: dict[str, Any], drafts: int, accepted: float
) -> dict[str, Any]:
    """The step with drafts beside the one without, ready for JSON.

    Args:
      plain, drafted: their reports, see report.make_report.
      drafts: D.
      accepted: tokens that a pass with drafts gives a request.
    """

    def a_token(report: dict[str, Any], tokens: float) -> dict[str, float]:
        collectives = sum(row["count"] for row in report["collectives"])
        totals = report["totals"]
        return dict(
            step_us=totals["step_us"],
            us_a_token=totals["step_us"] / tokens,
            exposed_us_a_token=totals["exposed_us"] / tokens,
            collectives_a_token=collectives / tokens,
        )

    return dict(
        drafts=drafts,
        tokens_a_pass=accepted,
        plain=a_token(plain, 1),
        drafted=a_token(drafted, accepted),
    )


def text(compared: dict[str, Any]) -> str:
    """What `compare` returns as text."""
    plain, drafted = compared["plain"], compared["drafted"]

    def change(key: str, unit: str) -> str:
        return f"{drafted[key]:,.1f} {unit} instead of {plain[key]:,.1f}"

    return (
        f"with {compared['drafts']} drafted tokens a pass takes "
        f"{change('step_us', 'us')}. At {compared['tokens_a_pass']:g} tokens a pass, "
        f"a token takes {change('us_a_token', 'us')}, "
        f"{change('exposed_us_a_token', 'us of exposed communication')}, and "
        f"{change('collectives_a_token', 'collectives')}"
    )
