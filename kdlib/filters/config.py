"""What an answer must be, to be kept."""

from kdlib.config.sections import Positive, Section


class Filters(Section):
    """What is kept of the answers; empty ones, cut off ones and refusals never are."""

    shortest: Positive = 1  # characters
    longest: Positive | None = None
