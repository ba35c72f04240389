"""Base of records: one frozen dataclass for each JSON file format, its only writer and its only reader."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from extract.base.errors import RetortError
from extract.base.files import read_json, write_json
from extract.base.validate import parse


class Record:
    """Methods of a frozen dataclass whose fields are the keys of a JSON file.

    A subclass sets `REMEDY`, the command that makes the file, and raises `FORMAT_VERSION` if its fields change.
    """

    # Without annotations: a dataclass would take annotated names for fields.
    FORMAT_VERSION = 1
    REMEDY = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file as JSON values."""
        return {"format_version": self.FORMAT_VERSION, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], *, path: Path) -> Self:
        """Parse the content of the file at `path`: all fields, no other, each of its type.

        Raises RetortError that names the path and the field.
        """
        content = dict(value)
        try:
            if (version := content.pop("format_version", None)) != cls.FORMAT_VERSION:
                raise RetortError(f"{path}: format_version: got {version!r}, expected {cls.FORMAT_VERSION}")
            return parse(cls, content, where=str(path))
        except RetortError as error:
            raise RetortError(f"{error}; write the file anew with {cls.REMEDY}") from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file. Raises RetortError if it is missing or invalid."""
        return cls.from_dict(read_json(path), path=path)

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        write_json(path, self.to_dict())
