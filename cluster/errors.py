"""The error tree. Each class has one HTTP status, one gRPC code and one answer to "may the caller retry?".

Messages are written for the person who caused the error: one line that names the input, what was expected, what was
found and what to do. Foreign exceptions become these at one boundary each (storage.py, weights.py, preprocess.py).
"""

from __future__ import annotations


class CellrayError(Exception):
    """The root. `str(error)` is one line and safe to show to a client."""

    http_status = 500
    grpc_code = "INTERNAL"
    retry = False
    retry_after_s = 0  # where `retry`: when

    def __init__(self, message: str) -> None:
        text = message.encode(errors="backslashreplace").decode()  # names of files may be no text
        super().__init__(" ".join(text.split()))


class InvalidInput(CellrayError):
    """The request, argument or file is wrong; sending it again will not help."""

    http_status = 400
    grpc_code = "INVALID_ARGUMENT"


class InvalidSettings(InvalidInput):
    """The YAML file, a `CELLRAY_*` variable or an argument does not fit the settings."""


class InvalidCheckpoint(InvalidInput):
    """The weights file is damaged, unsafe, or not a Segment Anything model."""


class InvalidImage(InvalidInput):
    """The bytes are an image's but cannot be used: damaged, non-finite, of no area."""

    http_status = 422


class UnsupportedImage(InvalidImage):
    """The bytes are of no image format that is read here."""

    http_status = 415


class TooLarge(InvalidImage):
    """The body, file or pixel count is over its limit; refused before it is decoded."""

    http_status = 413


class InvalidPrompt(InvalidInput):
    """A box, point or label does not fit the image or its own shape."""

    http_status = 422


class InvalidEmbedding(InvalidInput):
    """An embedding has the wrong shape, or numbers that are not finite."""

    http_status = 422


class NotFound(CellrayError):
    """No such file, bucket, model or embedding."""

    http_status = 404
    grpc_code = "NOT_FOUND"


class Unauthorized(CellrayError):
    """The request has no key, or one that is not in the keys file."""

    http_status = 401
    grpc_code = "UNAUTHENTICATED"


class Forbidden(CellrayError):
    """The storage or service refused the credentials."""

    http_status = 403
    grpc_code = "PERMISSION_DENIED"


class Conflict(CellrayError):
    """What is to be written exists already with other content; it is never overwritten."""

    http_status = 409
    grpc_code = "ABORTED"


class Unavailable(CellrayError):
    """Something outside is down or slow: the storage, the cluster, a replica. Try again later."""

    http_status = 503
    grpc_code = "UNAVAILABLE"
    retry = True
    retry_after_s = 2


class Overloaded(Unavailable):
    """A queue is full. Try again after the seconds in Retry-After."""


class RateLimited(Unavailable):
    """A key has used up its requests for now. `retry_after_s` is when it has one again, where the guard has set it."""

    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(Unavailable):
    """The answer did not come within the request's time limit."""

    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"


class Diverged(CellrayError):
    """A training's loss is no number any more. The last checkpoint is from before that."""


class Internal(CellrayError):
    """A defect of ours. The log has the traceback; the client gets only this."""
