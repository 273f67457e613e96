"""The project file, which lists a federation's parties, and a site's own settings file, which stays at the site.

This file only describes them. runtimes/sites/flare/kits.py creates certificates and folders from a project; trainer.py
opens a client from a site's file. Neither file has a secret.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from fedloom.common.complaints import first_complaint
from fedloom.common.errors import UserError
from fedloom.common.yaml import load_yaml
from fedloom.recipe.sections import Section

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


#: In a kit: the file with its role and its part of the project.
KIT_FILE = "kit.yaml"


#: In a kit's local/resources.json: the classes that the engine may load. A release that moves them needs new kits.
SERVER_CLASS = "fedloom.experiment.sites.RunJob"
SITE_CLASS = "fedloom.runtimes.sites.flare.executor.SiteExecutor"
LAUNCHER_CLASS = "fedloom.runtimes.sites.flare.launcher.RestartingLauncher"


class ServerConfig(Section):
    host: str = Field("localhost", description="the name by which sites reach the server, as in its certificate")
    port: int = Field(8002, ge=1, le=65535, description="the one port that sites connect to")
    also: list[str] = Field(default_factory=list, description="other names and addresses of the server")

    @field_validator("host")
    @classmethod
    def _is_host(cls, value: str) -> str:
        if not HOST.fullmatch(value):
            raise ValueError(f"server.host={value!r} is no host name")
        return value


class SiteEntry(Section):
    name: str = Field(description="the site's name, as in its certificate")
    client: str = Field("", description="the client that it plays in a recipe's split; its own name by default")

    @field_validator("name")
    @classmethod
    def _is_name(cls, value: str) -> str:
        if not NAME.fullmatch(value) or value in {"server", "admin"}:
            raise ValueError(
                f"sites: {value!r} cannot name a site: take letters, digits, - and _, and neither server nor admin"
            )
        return value


class Project(Section):
    """PROJECT.yaml."""

    name: str = Field(description="the federation's name")
    server: ServerConfig = Field(default_factory=ServerConfig, description="where the server is")
    sites: list[SiteEntry] = Field(min_length=1, description="the sites; a bare string is a name")
    admin: str = Field("admin@fedloom.org", description="whose certificate submits runs")
    valid_days: int = Field(360, ge=1, le=3650, description="days for which the authority is valid")
    revoked: list[str] = Field(default_factory=list, description="sites that the server no longer accepts")

    @field_validator("sites", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _sound(self) -> Project:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name={self.name!r} cannot name a federation: take letters, digits, - and _")
        named = [s.name for s in self.sites], [s.client or s.name for s in self.sites]
        for what, names in zip(("name", "client"), named, strict=True):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"sites: two sites have the same {what} {', '.join(twice)}")
        unknown = sorted(set(self.revoked) - {s.name for s in self.sites})
        if unknown:
            raise ValueError(f"revoked: there is no site {', '.join(unknown)}")
        return self

    @property
    def clients(self) -> dict[str, str]:
        """Client → site, in the order of the file, without revoked sites."""
        return {s.client or s.name: s.name for s in self.sites if s.name not in self.revoked}

    @classmethod
    def load(cls, path: Path) -> Project:
        """Load a project file. Raises UserError."""
        project: Project = load_section(cls, path, "the project file")
        return project


class SiteConfig(Section):
    """A site's own settings: where its data are, and how its machine runs. They never leave the site."""

    client: str = Field(description="the client that this site is")
    home: str = Field(description="the folder of its own state, tokens, results and audit log")
    policy: str = Field(description="the file of its policy")
    data: str = Field(description="a data file, a folder of them, or a shard that was dealt to it")
    columns: dict[str, str] | None = Field(None, description="which column of its data plays which role")
    model: str | None = Field(None, description="where the base model lies here, if not where the recipe says")
    batch_size: int | None = Field(
        None, ge=1, description="examples in one forward pass; a step keeps as many examples as the recipe says"
    )
    device: str | None = Field(None, description="cpu, cuda, cuda:0 …")
    threads: int | None = Field(None, ge=1, description="CPU threads, divided among ranks")
    ranks: int | None = Field(
        None, ge=1, le=64, description="processes that train together here, if not as many as the recipe says"
    )
    parallel: Literal["ddp", "fsdp"] | None = Field(
        None, description="how they train together, if not as the recipe says"
    )
    keep_runs: int = Field(
        5, ge=1, description="runs whose state and results stay here, the present one counted; older ones are deleted"
    )


def load_section(cls: type[Any], path: Path, what: str) -> Any:
    """Load a YAML file as a section. Raises UserError if it is missing or not valid."""
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: {what} is expected there") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{what} {path}: {first_complaint(error)}") from None
