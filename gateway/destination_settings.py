"""destinations.toml: where results go, one class per kind of destination."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gateway.setting_types import AeTitle, Name, PeerAddress, Seconds, Section


class _Destination(Section):
    name: Name
    concurrency: int = Field(default=1, ge=1, le=16)
    first_retry_s: Annotated[float, Field(gt=0)] = 5
    max_retry_s: Annotated[float, Field(gt=0)] = 300
    give_up_after_s: Seconds = 7 * 86400  # then parked, never dropped


class PacsDestination(_Destination):
    """Common to all three ways to a PACS."""

    encodings: tuple[Literal["LABELMAP", "BINARY", "SC"], ...] = ("BINARY", "SC")  # tried in this order
    send_sr: bool = True


class DimseDestination(PacsDestination):
    """[[dimse]]: C-STORE, verified by C-FIND."""

    ae_title: AeTitle
    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
    calling_ae_title: AeTitle | None = None  # None = the receiver's
    verify: Literal["c-find", "none"] = "c-find"
    query: PeerAddress | None = None  # where to ask, when not the same AE
    timeout_s: Annotated[float, Field(gt=0)] = 30


class DicomWebDestination(PacsDestination):
    """[[dicomweb]]: STOW-RS, verified by QIDO-RS."""

    url: str  # the DICOMweb root, e.g. https://pacs.example/dicom-web
    verify: Literal["qido", "none"] = "qido"
    token_file: Path | None = None
    token_env: str = ""
    username: str = ""
    password_file: Path | None = None
    ca_file: Path | None = None
    timeout_s: Annotated[float, Field(gt=0)] = 60


class OrthancDestination(PacsDestination):
    """[[orthanc]]: Orthanc's REST interface through orthanc-api-client."""

    url: str
    username: str = ""
    password_file: Path | None = None
    timeout_s: Annotated[float, Field(gt=0)] = 60


class SmartBackend(Section):
    """SMART Backend Services: a signed JWT is exchanged for a token (SMART App Launch 2.2)."""

    client_id: str
    key_file: Path  # PEM private key (RSA or EC P-384)
    key_id: str
    scope: str = (
        "system/Patient.rs system/Device.crs system/Observation.crs system/DocumentReference.crs "
        "system/DiagnosticReport.crs"
    )
    token_url: str = ""  # empty = read from .well-known/smart-configuration


class FhirDestination(_Destination):
    """[[fhir]]: an EMR with a FHIR R4 interface."""

    url: str  # the FHIR base URL
    patient_identifier_system: str  # e.g. urn:oid:1.2.36.146.595.217.0.1
    accepted_issuers: tuple[str, ...] = ()  # Issuer of Patient ID (0010,0021) that mean this system; empty = all
    wado_root: str = ""  # DICOMweb root under which the EMR's users reach the PACS; empty = no links
    auth: Literal["none", "token", "basic", "smart"] = "none"
    token_file: Path | None = None
    token_env: str = ""
    username: str = ""
    password_file: Path | None = None
    smart: SmartBackend | None = None
    ca_file: Path | None = None
    timeout_s: Annotated[float, Field(gt=0)] = 30

    @model_validator(mode="after")
    def _credentials(self) -> Self:
        if self.auth == "token" and not (self.token_file or self.token_env):
            raise ValueError("auth = 'token' needs token_file or token_env")
        if self.auth == "basic" and not (self.username and self.password_file):
            raise ValueError("auth = 'basic' needs username and password_file")
        if self.auth == "smart" and self.smart is None:
            raise ValueError("auth = 'smart' needs a [fhir.smart] table")
        return self


class DestinationSettings(Section):
    """destinations.toml: where results go. Every result goes to all of them."""

    dimse: tuple[DimseDestination, ...] = ()
    dicomweb: tuple[DicomWebDestination, ...] = ()
    orthanc: tuple[OrthancDestination, ...] = ()
    fhir: tuple[FhirDestination, ...] = ()

    @property
    def pacs(self) -> tuple[DimseDestination | DicomWebDestination | OrthancDestination, ...]:
        return (*self.dimse, *self.dicomweb, *self.orthanc)

    @property
    def all(
        self,
    ) -> tuple[DimseDestination | DicomWebDestination | OrthancDestination | FhirDestination, ...]:
        return (*self.pacs, *self.fhir)

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [d.name for d in self.all]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two destinations have the same name: {', '.join(twice)}")
        return self
