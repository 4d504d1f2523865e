"""The one error of the engine."""

from planmill.errors import PlanmillError


class PlanError(PlanmillError):
    """A model that cannot become a plan, a file that is no usable plan, or an input that does not fit one."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, for quoting in a PlanError."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)
