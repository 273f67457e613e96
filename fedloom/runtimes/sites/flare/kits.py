"""Create a project's kits: certificates from the project's own authority, and each party's permissions.

    KITS/server  KITS/<site>  KITS/admin      each goes to its owner, by hand
    KITS/authority                            stays where it was created: whoever has it can admit any site

The engine's provisioner creates certificates and startup files. A site's permissions are written here and are stricter
than the engine's defaults: only the two classes of fedloom may be loaded, no job brings code, nobody outside can read a
site's files or logs, and no log leaves. This file does not start anything.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.lighter.constants import CtxKey, WorkDir
from nvflare.lighter.entity import participant_from_dict
from nvflare.lighter.impl.cert import CertBuilder
from nvflare.lighter.impl.signature import SignatureBuilder
from nvflare.lighter.impl.static_file import StaticFileBuilder
from nvflare.lighter.impl.workspace import WorkspaceBuilder
from nvflare.lighter.provisioner import Provisioner
from nvflare.lighter.spec import Project as FlareProject

from fedloom.common.errors import UserError
from fedloom.common.yaml import dump_yaml
from fedloom.runtimes import versions
from fedloom.runtimes.sites.policy import Policy
from fedloom.runtimes.sites.project import KIT_FILE, LAUNCHER_CLASS, SERVER_CLASS, SITE_CLASS, Project

#: The project's administrator may start, end and see the job at a site. Nobody else may do anything.
PERMISSIONS = {
    "submit_job": "any", "manage_job": "any", "view": "any", "clone_job": "none", "download_job": "none",
    "operate": "none", "shell_commands": "none", "byoc": "none", "server-predeployed-flwr": "none",
}  # fmt: skip


POLICY_HEAD = "# What this site allows, whatever a recipe asks. It is read here and never sent.\n"


def provision(project: Project, kits: Path) -> list[Path]:
    """Write a kit for the server, each site and the admin; return their folders.

    A second call for the same project keeps the authority and all certificates, adds kits of new sites, and leaves each
    kit's own settings (local/) unchanged.

    Raises:
        UserError: `kits` has other files, or the kits of another project.
    """
    authority = kits / "authority"
    if kits.exists() and any(kits.iterdir()) and not authority.is_dir():
        raise UserError(f"{kits} is not empty and has no kits: name another folder with --out")
    others = [p.name for p in authority.iterdir() if p.name != project.name] if authority.is_dir() else []
    if others:
        raise UserError(f"{kits} has the kits of the project {others[0]}: name another folder with --out")
    kits.mkdir(parents=True, exist_ok=True)
    authority.mkdir(exist_ok=True)
    authority.chmod(0o700)
    made = _provisioned(project, authority)
    folders = []
    parties = {"server": project.server.host, "admin": project.admin, **{s.name: s.name for s in project.sites}}
    for name, subject in parties.items():
        folders.append(kits / name)
        _place(made / subject, kits / name)
    _restrict_server(kits / "server", project)
    for entry in project.sites:
        _restrict_site(kits / entry.name)
        about = {"role": "site", "project": project.name, "site": entry.name, "client": entry.client or entry.name}
        more = {"server": _address(project), "versions": versions.own()}
        _write(kits / entry.name / KIT_FILE, dump_yaml(about | more))
        if not (kits / entry.name / "local" / "policy.yaml").exists():
            _write(kits / entry.name / "local" / "policy.yaml", _policy_text())
    _write(kits / "admin" / KIT_FILE, dump_yaml({"role": "admin", "project": project.name, "admin": project.admin}))
    return folders


def _provisioned(project: Project, workspace: Path) -> Path:
    """Run the engine's provisioner; return its newest folder of kits."""
    server = project.server
    parties: list[dict[str, Any]] = [
        {"name": server.host, "type": "server", "org": "fedloom", "fed_learn_port": server.port,
         "host_names": [n for n in server.also if n != server.host]},
        {"name": project.admin, "type": "admin", "org": "fedloom", "role": "project_admin"},
        *({"name": s.name, "type": "client", "org": "fedloom"} for s in project.sites),
    ]  # fmt: skip
    flare = FlareProject(name=project.name, description="", props={"api_version": 3, "name": project.name})
    builders = [
        WorkspaceBuilder(),
        StaticFileBuilder(config_folder="config", scheme="grpc"),
        CertBuilder(root_valid_days=project.valid_days),
        SignatureBuilder(),
    ]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for party in parties:
            flare.add_participant(participant_from_dict(party))
        context = Provisioner(str(workspace), builders).provision(flare)
    if context.get(CtxKey.BUILD_ERROR) or not context.get(WorkDir.CURRENT_PROD_DIR):
        raise UserError(f"the certificates could not be made: {' '.join(said.getvalue().split())[-300:]}")
    return Path(context[WorkDir.CURRENT_PROD_DIR])


def _place(made: Path, kit: Path) -> None:
    """Replace the startup folder; keep the owner's settings in local/."""
    shutil.rmtree(kit / "startup", ignore_errors=True)
    shutil.copytree(made / "startup", kit / "startup")
    if not (kit / "local").is_dir():
        shutil.copytree(made / "local", kit / "local")
    kit.chmod(0o700)


def _restrict_server(kit: Path, project: Project) -> None:
    resources = json.loads((kit / "local" / "resources.json.default").read_text())
    components = [c for c in resources["components"] if c["id"] != "log_receiver"]  # no site sends its log
    for component in components:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str((kit / "jobs").resolve())
        if component["id"] == "job_scheduler":  # a lost job starts again at once, not after the default's minutes
            component["args"] = {"max_jobs": 1, "min_schedule_interval": 1.0, "max_schedule_interval": 3.0}
    resources["components"] = components
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str((kit / "snapshots").resolve())
    resources["class_allow_list"] = [SERVER_CLASS]
    _write_json(kit / "local" / "resources.json", resources)
    _write_json(
        kit / "local" / "authorization.json", _authorization({**PERMISSIONS, "operate": "any", "download_job": "any"})
    )
    about = {"role": "server", "project": project.model_dump(mode="json")}
    _write(kit / KIT_FILE, dump_yaml(about))


def _restrict_site(kit: Path) -> None:
    resources = json.loads((kit / "local" / "resources.json.default").read_text())
    resources["class_allow_list"] = [SITE_CLASS]
    resources["allow_log_streaming"] = False
    components = [c for c in resources["components"] if c["id"] != "site_log_streamer"]
    for component in components:
        if component["id"] == "process_launcher":
            component["path"] = LAUNCHER_CLASS
    resources["components"] = components
    _write_json(kit / "local" / "resources.json", resources)
    _write_json(kit / "local" / "authorization.json", _authorization(PERMISSIONS))


def _authorization(rights: Mapping[str, str]) -> dict[str, Any]:
    return {"format_version": "1.0", "permissions": {"project_admin": dict(rights)}}


def _address(project: Project) -> dict[str, Any]:
    return {"host": project.server.host, "port": project.server.port}


def _policy_text() -> str:
    lines = [POLICY_HEAD]
    defaults = Policy.model_validate({}).model_dump(mode="json")
    for name, info in Policy.model_fields.items():
        lines.append(f"\n# {info.description}\n{dump_yaml({name: defaults[name]})}")
    return "".join(lines)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    _write(path, json.dumps(values, indent=2) + "\n")
