"""Define the errors that hecompile raises on bad input: one line that names the thing and says what to do about it."""

from __future__ import annotations


class HecompileError(Exception):
    """Serve as the base class: the command line prints its message and exits with status 2, without a traceback."""


class InputError(HecompileError):
    """Report that a file, option, recipe or dataset given by the user is missing, malformed or out of range."""


class NotFiniteError(InputError):
    """Report that a loss, a gradient or an activation to encrypt is infinite or NaN.

    causes: the known reasons, each a part of a sentence. They give ends of ranges, so they are for the data owner alone.
    """

    def __init__(self, message: str, causes: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.causes = causes


class LegalityError(HecompileError):
    """Report that a graph is not legal at the stage it has reached; the message names the node and the rule."""


class SecurityError(HecompileError):
    """Refuse what would weaken the encryption: parameters under 128 bits, a secret used twice, a secret in the clear."""


class WorkerError(HecompileError):
    """Report that the worker refused a request, broke the protocol or returned something it must not."""


class WorkerUnavailableError(WorkerError):
    """Report that the worker cannot be reached, the connection broke, or no answer came in time.

    The request had no effect: asking again, or another worker of the plan, may help.
    """


class VerificationError(WorkerError):
    """Report that a reply is not the product requested: the worker cheats, or its machine or the link is broken."""


class FederationError(HecompileError):
    """Report that a round of a federation cannot be completed: a participant broke the protocol or its bounds, or too few
    are left. The global adapter is as it was before the round.

    public: the text for others, where the message itself has figures of somebody's update.
    """

    def __init__(self, message: str, public: str | None = None) -> None:
        super().__init__(message)
        self.public = message if public is None else public


class PrivacyError(HecompileError):
    """Refuse a release that would break the differential-privacy promise made about a dataset.

    Raised as well where the record of earlier releases cannot be relied on.
    """
