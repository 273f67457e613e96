"""Kits as commands read them: whose they are, and whether this release's engine can load them."""

from __future__ import annotations

import pytest

from fedloom.common.errors import UserError
from fedloom.runtimes.sites.order import kit_file
from fedloom.runtimes.sites.project import LAUNCHER_CLASS, SERVER_CLASS, SITE_CLASS, Project

pytest.importorskip("nvflare")

from fedloom.runtimes.sites.flare.kits import provision


@pytest.mark.parametrize(
    ("role", "new", "old"),
    [
        ("server", SERVER_CLASS, "fedloom.serving.RunJob"),
        ("site", SITE_CLASS, "fedloom.runtimes.flare.executor.SiteExecutor"),
        ("site", LAUNCHER_CLASS, "fedloom.runtimes.flare.launcher.RestartingLauncher"),
    ],
)
def test_a_kit_of_another_release_is_rejected_until_it_is_provisioned_again(tmp_path, role, new, old):
    project, kits = Project.model_validate({"name": "hospitals", "sites": ["site"]}), tmp_path / "kits"
    provision(project, kits)
    path = kits / role / "local" / "resources.json"
    text = path.read_text()
    assert new in text
    path.write_text(text.replace(new, old))
    with pytest.raises(UserError, match=rf"another release of fedloom .*{old}.*fedloom provision` again"):
        kit_file(kits / role, role)
    provision(project, kits)
    assert kit_file(kits / role, role)["role"] == role


def test_an_admins_kit_names_no_classes(tmp_path):
    provision(Project.model_validate({"name": "hospitals", "sites": ["a"]}), tmp_path / "kits")
    assert kit_file(tmp_path / "kits" / "admin", "admin")["project"] == "hospitals"
