"""The errors that hecompile raises on bad input: one line that names the thing and says what to do about it."""

from __future__ import annotations


class HecompileError(Exception):
    """Base class: the command line prints its message and exits with status 2, without a traceback."""


class InputError(HecompileError):
    """A file, option, recipe or dataset given by the user is missing, malformed or out of range."""


class NotFiniteError(InputError):
    """A value that training made is infinite or NaN: a loss, a gradient, an activation to encrypt.

    `causes`: what is known of why, a sentence's part each; with ends of ranges, so for the data owner's own eyes.
    """

    def __init__(self, message: str, causes: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.causes = causes


class LegalityError(HecompileError):
    """A graph is not legal at the stage it has reached; the message names the node and the rule."""


class SecurityError(HecompileError):
    """A request would weaken the encryption: parameters under 128 bits, a secret used twice, a secret in the clear."""


class WorkerError(HecompileError):
    """The worker refused a request, broke the protocol or returned something it must not."""


class WorkerUnavailableError(WorkerError):
    """No answer: the worker cannot be reached, the connection broke, or it was silent too long. Asking again, or another
    worker of the plan, may help; the request had no effect."""


class VerificationError(WorkerError):
    """A reply is not the product that was asked for: the worker cheats, or its machine or the link is broken."""


class FederationError(HecompileError):
    """A round of a federation cannot end well: a participant broke the protocol or its bounds, or too few are left. The
    global adapter is as it was before the round.

    `public` is what others may be told, where the message itself has figures of somebody's update.
    """

    def __init__(self, message: str, public: str | None = None) -> None:
        super().__init__(message)
        self.public = message if public is None else public


class PrivacyError(HecompileError):
    """A release would break the differential-privacy promise made about a dataset, or the record of what was released cannot
    be relied on."""
