"""What sections of the configuration are made of: strict, frozen models and the types of their values."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

# PS3.5 6.2: an AE title has 1 to 16 characters of the default repertoire, no backslash, no control characters.
AeTitle = Annotated[
    str, StringConstraints(pattern=r"^[\x20-\x5b\x5d-\x7e]{1,16}$", min_length=1, strip_whitespace=True)
]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PeerAddress(Section):
    """A DICOM application entity that we call."""

    ae_title: AeTitle
    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
