"""What only a request over HTTP can get wrong, as a branch of the service's tree of errors.

ServiceError
└── RequestError
    ├── InvalidJson · InvalidMultipart · InvalidArray       the body is not what its Content-Type says
    ├── InvalidParameter · UnknownParameter                 a parameter is out of bounds, or unknown
    ├── NoImages · TooManyParts · UploadTimeout             nothing to do, or too much, or too slow
    ├── UnsupportedMediaType · NotAcceptable                Content-Type or Accept
    ├── ImageRefused                                        one image failed and the caller wants all or none
    ├── TextRefused                                         what other services embed
    ├── Unauthorized · MissingScope                         who asks
    ├── UntrustedHost · CrossOrigin                         and from where
    ├── UnknownRoute · MethodNotAllowed                     nothing is there
    ├── ClientLeft                                          nobody is there to answer
    └── InternalError                                       our fault; the log has it under the request's id
"""

from app.errors import ServiceError
from app.inference.results import ImageFailure


class RequestError(ServiceError):
    """A request over HTTP that can't be served as it stands."""


class InvalidJson(RequestError):
    """The body is not JSON, or not of the shape that the route takes.

    Attributes:
        pointer: Where, as a JSON pointer; empty for the whole.
    """

    code = "invalid_json"

    def __init__(self, title: str, *, pointer: str = "") -> None:
        super().__init__(title)
        self.pointer = pointer


class InvalidMultipart(RequestError):
    """The body is not multipart/form-data as its header says, or ends too early."""

    code = "invalid_multipart"


class InvalidArray(RequestError):
    """The body is not an array in NumPy's format."""

    code = "invalid_array"


class InvalidParameter(RequestError):
    """A parameter has a value that it can't have.

    Attributes:
        parameter: Its name, or path in a JSON body.
    """

    code = "invalid_parameter"

    def __init__(self, title: str, *, parameter: str) -> None:
        super().__init__(title)
        self.parameter = parameter


class UnknownParameter(RequestError):
    """There is no parameter of this name; ignoring it would hide a misspelling.

    Attributes:
        parameter: The name.
    """

    code = "unknown_parameter"

    def __init__(self, title: str, *, parameter: str) -> None:
        super().__init__(title)
        self.parameter = parameter


class NoImages(RequestError):
    """The request has nothing to work on."""

    code = "no_images"


class TooManyParts(RequestError):
    """A multipart body has more parts than any request needs.

    Attributes:
        limit: Parts that are read.
        actual: Parts met so far.
    """

    code = "too_many_parts"

    def __init__(self, title: str, *, limit: int, actual: int) -> None:
        super().__init__(title)
        self.limit = limit
        self.actual = actual


class UploadTimeout(RequestError):
    """The body did not arrive in time."""

    code = "upload_timeout"


class UnsupportedMediaType(RequestError):
    """The route doesn't take bodies of this Content-Type."""

    code = "unsupported_media_type"


class NotAcceptable(RequestError):
    """The route can't answer in any of the forms that Accept names."""

    code = "not_acceptable"


class ImageRefused(RequestError):
    """An image failed, and the caller asked for all or nothing.

    The code is the image's own, so that one code means one thing wherever it is met.

    Attributes:
        failure: Why.
        index: Which image of the request.
    """

    def __init__(self, failure: ImageFailure, *, index: int) -> None:
        super().__init__(failure.title)
        self.failure = failure
        self.index = index


class TextRefused(RequestError):
    """The input is text, or tokens of one, and the model embeds images."""

    code = "text_not_embedded"


class Unauthorized(RequestError):
    """The service wants an API key, and this is none of its keys."""

    code = "unauthorized"


class MissingScope(RequestError):
    """The API key may not do this."""

    code = "missing_scope"


class UntrustedHost(RequestError):
    """The Host header names a machine that this service is not: the mark of DNS rebinding."""

    code = "untrusted_host"


class CrossOrigin(RequestError):
    """A page of another site wants to change something here."""

    code = "cross_origin"


class UnknownRoute(RequestError):
    """Nothing is at this path."""

    code = "unknown_route"


class MethodNotAllowed(RequestError):
    """The path is there, the method isn't.

    Attributes:
        allowed: The methods, as the Allow header lists them.
    """

    code = "method_not_allowed"

    def __init__(self, title: str, *, allowed: str) -> None:
        super().__init__(title)
        self.allowed = allowed


class ClientLeft(RequestError):
    """The caller closed the connection before the answer; only logs and metrics see this."""

    code = "client_left"


class InternalError(RequestError):
    """A fault of ours."""

    code = "internal_error"
