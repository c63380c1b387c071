"""multipart/form-data, piece by piece as it arrives, with a bound on everything that is kept."""

from dataclasses import dataclass
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.api.refusals import InvalidMultipart, InvalidParameter, TooManyParts, UnknownParameter

FILE_FIELD: Final = "images"


@dataclass(frozen=True, kw_only=True)
class PartLimits:
    """Bounds of one body; the body's own is the guard's."""

    max_parts: int
    max_file_bytes: int
    max_text_bytes: int


@dataclass(frozen=True)
class SentFile:
    """A part with a file.

    Attributes:
        data: The file; only its beginning where it is above the limit.
        size_bytes: All of it.
        filename: As the caller named it, without folders; None where it has no name.
    """

    data: bytes
    size_bytes: int
    filename: str | None


class MultipartReader:
    """Takes a body in pieces. Files are the parts named `images`; every other part is a parameter's text.

    Args:
        boundary: Of the Content-Type.
        limits: Of parts.

    Raises:
        InvalidMultipart: The boundary can't be one.
    """

    def __init__(self, boundary: bytes, limits: PartLimits) -> None:
        self.files: list[SentFile] = []
        self.texts: list[tuple[str, str]] = []
        self._limits = limits
        self._parts = 0
        self._ended = False
        self._header_name = b""
        self._header_value = b""
        self._disposition: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self._size_bytes = 0
        if not boundary:
            raise InvalidMultipart("the Content-Type names no boundary: let your client set this header")
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._take_header_name,
                    "on_header_value": self._take_header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._take_data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise InvalidMultipart("the boundary in the Content-Type is too long") from None

    def feed(self, chunk: bytes) -> None:
        """Takes the next piece.

        Raises:
            InvalidMultipart: The body is malformed.
            TooManyParts: It has more parts than are read.
            UnknownParameter: A file is in a field of another name.
            InvalidParameter: A text is too long, or not UTF-8.
        """
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise InvalidMultipart("the body is not well-formed multipart/form-data") from None

    def finish(self) -> None:
        """Checks that the body is whole.

        Raises:
            InvalidMultipart: Its end is missing.
        """
        if not self._ended:
            raise InvalidMultipart("the body ends before its last boundary: it was cut short")

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > self._limits.max_parts:
            raise TooManyParts(
                f"the body has more than {self._limits.max_parts} parts: split it",
                limit=self._limits.max_parts,
                actual=self._parts,
            )
        self._disposition = {}
        self._pieces = []
        self._size_bytes = 0

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, self._disposition = parse_options_header(self._header_value)
        self._header_name = b""
        self._header_value = b""

    def _end_headers(self) -> None:
        if b"name" not in self._disposition:
            raise InvalidMultipart("a part has no name in its Content-Disposition")
        if b"filename" in self._disposition and self._name != FILE_FIELD:
            raise UnknownParameter(
                f"there is a file in the field {self._name!r}: files go into `{FILE_FIELD}`, once for each",
                parameter=self._name,
            )

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        self._size_bytes += end - start
        if self._name == FILE_FIELD:
            # Above the limit only the count goes on: the part's error will say how large it was.
            if self._size_bytes <= self._limits.max_file_bytes:
                self._pieces.append(data[start:end])
        elif self._size_bytes > self._limits.max_text_bytes:
            raise InvalidParameter(
                f"{self._name} has more than {self._limits.max_text_bytes:,} bytes", parameter=self._name
            )
        else:
            self._pieces.append(data[start:end])

    def _end_part(self) -> None:
        data = b"".join(self._pieces)
        self._pieces = []
        if self._name == FILE_FIELD:
            self.files.append(SentFile(data, self._size_bytes, self._filename))
            return
        try:
            self.texts.append((self._name, data.decode("utf-8")))
        except UnicodeDecodeError:
            raise InvalidParameter(f"{self._name} is not UTF-8 text", parameter=self._name) from None

    def _end(self) -> None:
        self._ended = True

    @property
    def _name(self) -> str:
        return self._disposition[b"name"].decode("utf-8", "replace")

    @property
    def _filename(self) -> str | None:
        name = self._disposition.get(b"filename", b"").decode("utf-8", "replace")
        return name.replace("\\", "/").rpartition("/")[2] or None
