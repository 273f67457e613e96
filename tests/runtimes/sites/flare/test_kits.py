"""Kits: who may do what, what is loaded, what the preflight finds; and the engine's half-private parts that we lean on."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedloom.common.errors import UserError
from fedloom.common.yaml import dump_yaml, load_yaml
from fedloom.runtimes.sites.project import Project
from tests.helpers import tiny

pytest.importorskip("nvflare")

from fedloom.experiment.sites import heard_again
from fedloom.runtimes.sites.checks import checks
from fedloom.runtimes.sites.flare.kits import LAUNCHER_CLASS, SERVER_CLASS, SITE_CLASS, provision
from fedloom.runtimes.sites.flare.services import CONNECTED, FOREIGN, REVOKED, SILENT, standing, write_job
from fedloom.runtimes.sites.join import Joined, settle
from fedloom.runtimes.sites.order import kit_file
from fedloom.runtimes.sites.supervisor import Server


def project(port=8002, **more):
    return Project.model_validate({"name": "hospitals", "server": {"port": port}, "sites": ["a", "b"], **more})


@pytest.fixture(scope="module")
def listener():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        made.listen(8)
        yield made


@pytest.fixture(scope="module")
def kits(tmp_path_factory, listener) -> Path:
    folder = tmp_path_factory.mktemp("kits") / "kits"
    provision(project(listener.getsockname()[1]), folder)
    return folder


def resources(kit: Path) -> dict:
    return json.loads((kit / "local" / "resources.json").read_text())


def test_a_kit_loads_our_classes_only_and_takes_no_code(kits):
    assert resources(kits / "server")["class_allow_list"] == [SERVER_CLASS]
    assert resources(kits / "a")["class_allow_list"] == [SITE_CLASS]
    for kit in ("server", "a", "b"):
        assert resources(kits / kit)["class_list_enforcement_mode"] == "enforce"
        rights = json.loads((kits / kit / "local" / "authorization.json").read_text())["permissions"]
        assert list(rights) == ["project_admin"]
        assert (rights["project_admin"]["byoc"], rights["project_admin"]["shell_commands"]) == ("none", "none")
    launchers = [c["path"] for c in resources(kits / "a")["components"] if c["id"] == "process_launcher"]
    assert launchers == [LAUNCHER_CLASS]


def test_no_log_and_no_file_of_a_site_can_be_read_from_outside(kits):
    site = resources(kits / "a")
    assert site["allow_log_streaming"] is False
    assert "site_log_streamer" not in {c["id"] for c in site["components"]}
    assert "log_receiver" not in {c["id"] for c in resources(kits / "server")["components"]}
    rights = json.loads((kits / "a" / "local" / "authorization.json").read_text())["permissions"]["project_admin"]
    assert {name for name, who in rights.items() if who != "none"} == {"submit_job", "manage_job", "view"}


def test_nothing_of_a_job_lies_outside_the_kit(kits):
    text = (kits / "server" / "local" / "resources.json").read_text()
    assert "/tmp/nvflare" not in text


def test_a_job_carries_two_class_names_and_no_code(tmp_path):
    folder = write_job(tmp_path / "job", "hospitals", 2)
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
        "config_fed_client.json", "config_fed_server.json", "meta.json",
    ]  # fmt: skip
    config = folder / "app" / "config"
    assert json.loads((config / "config_fed_server.json").read_text())["workflows"][0]["path"] == SERVER_CLASS
    assert json.loads((config / "config_fed_client.json").read_text())["executors"][0]["executor"]["path"] == SITE_CLASS


def test_the_classes_that_kits_name_are_there():
    from importlib import import_module

    for name in (SERVER_CLASS, SITE_CLASS, LAUNCHER_CLASS):
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute)


def test_the_engines_half_private_parts_are_as_the_launcher_expects():
    """Names and shapes that another release may change: a change has to be seen here and not at a site."""
    import inspect

    from nvflare.app_common.job_launcher.process_launcher import ProcessHandle
    from nvflare.utils.job_launcher_utils import get_credential_env
    from nvflare.utils.process_utils import ProcessAdapter, spawn_process

    assert list(inspect.signature(spawn_process).parameters) == ["cmd_args", "env"]
    assert get_credential_env({}) == {}
    handle = ProcessHandle(process_adapter=ProcessAdapter(pid=1))
    assert isinstance(handle.adapter, ProcessAdapter)
    assert {"wait", "poll", "terminate"} <= set(dir(handle.adapter))


def test_the_engines_server_refuses_whom_the_kit_names_and_nobody_of_before(tmp_path, monkeypatch):
    """The engine's own reader of the file: its name and format may change with another release."""
    from nvflare.private.fed.server import fed_server
    from nvflare.private.fed.server.client_manager import ClientManager

    from fedloom.runtimes.sites.flare import services

    assert f'"{services.REFUSED}"' in Path(fed_server.__file__).read_text(encoding="utf-8")
    monkeypatch.setattr(services, "Service", lambda *_: None)
    for revoked in (["b", "a"], []):
        services.server_service(tmp_path, {}, revoked)
        clients = ClientManager(project_name="hospitals")
        clients.set_disabled_clients_file(str(tmp_path / services.REFUSED))
        assert clients.disabled_clients == set(revoked)


def test_a_sites_job_answers_its_own_runs_server_and_nobody_else():
    """By the engine's own cell, job and message: what stands here of it may change with another release."""
    from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
    from nvflare.fuel.f3.cellnet.fqcn import FQCN
    from nvflare.fuel.f3.message import Message

    from fedloom.runtimes.sites.flare.link import attend, start
    from fedloom.runtimes.sites.link import Answer

    class Engine:
        def get_cell(self):
            return self

        def register_request_cb(self, channel, topic, cb):
            self.cb = cb

    engine, asked = Engine(), []
    attend(
        engine, "job-1", lambda header, data: asked.append((header, bytes(data))) or Answer({"state": "here"}, b"ab")
    )
    code = MessageHeaderKey.RETURN_CODE
    question = start({"verb": "hello"}) + b"xyz"
    reply = engine.cb(Message({MessageHeaderKey.ORIGIN: FQCN.join(["server", "job-1"])}, question))
    assert reply.get_header(code) == ReturnCode.OK
    assert reply.payload == {"header": '{"state": "here"}', "data": b"ab"}
    assert asked == [({"verb": "hello"}, b"xyz")]
    for origin in ("b.job-1", "server.job-2", "server", "", None):
        reply = engine.cb(Message({MessageHeaderKey.ORIGIN: origin}, question))
        assert reply.get_header(code) == ReturnCode.AUTHENTICATION_ERROR
        assert reply.payload is None
    for odd in (
        b"",
        b"\xff\xff\xff\xff{}",
        question[:6],
        b"\x02\x00\x00\x00\xff\xff",
        b"\x02\x00\x00\x00[]",
        {"a": 1},
        None,
    ):
        reply = engine.cb(Message({MessageHeaderKey.ORIGIN: "server.job-1"}, odd))
        assert reply.get_header(code) == ReturnCode.INVALID_REQUEST
    assert len(asked) == 1


def test_private_keys_are_their_owners_and_the_authoritys_key_is_in_no_kit(kits):
    for kit in ("server", "a", "b", "admin"):
        assert (kits / kit).stat().st_mode & 0o077 == 0
        assert "root_pri_key" not in "".join(p.name for p in (kits / kit).rglob("*"))
    assert (kits / "authority").stat().st_mode & 0o077 == 0


def test_again_adds_a_site_and_changes_no_certificate(kits, listener):
    before = {k: (kits / k / "startup" / "client.crt").read_bytes() for k in ("a", "b")}
    own = kits / "a" / "local" / "policy.yaml"
    own.write_text("rounds: 7\n")
    provision(project(listener.getsockname()[1], sites=["a", "b", "c"], revoked=["b"]), kits)
    assert {k: (kits / k / "startup" / "client.crt").read_bytes() for k in ("a", "b")} == before
    assert own.read_text() == "rounds: 7\n"
    assert Server.open(kits / "server", None).project.revoked == ["b"]
    assert (kits / "c" / "startup" / "client.crt").exists()
    with pytest.raises(UserError, match="has the kits of the project hospitals"):
        provision(Project.model_validate({"name": "other", "sites": ["a"]}), kits)


def test_a_folder_that_is_not_a_kit_is_said(kits, tmp_path):
    with pytest.raises(UserError, match="is no kit"):
        kit_file(tmp_path, "site")
    with pytest.raises(UserError, match="is the site's kit, and the server's is needed"):
        kit_file(kits / "a", "server")
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match="is not empty and has no kits"):
        provision(project(), tmp_path)
    with pytest.raises(UserError, match="has no path to the site's data yet"):
        settle(kits / "b", {})
    with pytest.raises(UserError, match="does not exist on this machine"):
        settle(kits / "b", {"data": str(tmp_path / "none")})


def test_a_sites_settings_are_kept_and_stay_in_its_kit(kits, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl")
    assert settle(kits / "a", {"data": str(rows), "batch_size": 4}).batch_size == 4
    again = settle(kits / "a", {"data": None, "device": "cpu"})
    assert (again.data, again.batch_size, again.device) == (str(rows), 4, "cpu")
    kept = load_yaml((kits / "a" / "local" / "site.yaml").read_text())
    assert kept == {"data": str(rows), "batch_size": 4, "device": "cpu"}


def found(kit: Path, rows: Path) -> dict:
    return {check.name: check for check in checks(kit, settle(kit, {"data": str(rows)}))}


def test_the_preflight_names_what_stands_in_the_way(kits, tmp_path, listener):
    """A server of another authority, other versions, no such column; and then all of it mended."""
    rows = tiny.write_rows(tmp_path / "rows.jsonl")
    provision(project(), tmp_path / "foreign")
    about = load_yaml((kits / "a" / "kit.yaml").read_text())
    (kits / "a" / "kit.yaml").write_text(dump_yaml({**about, "versions": {**about["versions"], "torch": "1.0"}}))
    with _tls(listener, tmp_path / "foreign" / "server" / "startup"):
        bad = found(kits / "a", rows)
    assert bad["mutual TLS"].level == "bad"
    assert "ask for a new kit" in bad["mutual TLS"].fix
    assert bad["versions"].level == "bad"
    assert "torch is" in bad["versions"].found
    (kits / "a" / "kit.yaml").write_text(dump_yaml(about))
    with _tls(listener, kits / "server" / "startup", takes=tmp_path / "foreign" / "server" / "startup"):
        assert found(kits / "a", rows)["mutual TLS"].level == "bad", "the server does not take ours"
    with _tls(listener, kits / "server" / "startup"):
        good = found(kits / "a", rows)
    levels = {
        name: good[name].level for name in ("address", "certificate", "authority", "mutual TLS", "versions", "data")
    }
    assert set(levels.values()) == {"good"}, good
    assert "359 days left" in good["certificate"].found or "360" in good["certificate"].found
    other = tiny.write_rows(tmp_path / "other.jsonl")
    other.write_text(other.read_text().replace('"output"', '"reply"'))
    assert found(kits / "a", other)["data"].level == "bad"


class _tls:
    """A server that asks for a certificate, for one connection after another."""

    def __init__(self, listener: socket.socket, startup: Path, takes: Path | None = None) -> None:
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=(takes or startup) / "rootCA.pem")
        self.context.load_cert_chain(startup / "server.crt", startup / "server.key")
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.listener = listener
        self.over = False

    def __enter__(self) -> None:
        self.listener.settimeout(0.1)
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while not self.over:
            try:
                raw, _ = self.listener.accept()
                raw.settimeout(30)
                with self.context.wrap_socket(raw, server_side=True) as line:
                    line.sendall(b"\0")  # as the engine's server greets
                    line.recv(1)
            except (OSError, ssl.SSLError):
                continue

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.thread.join()


#: Lines of a site's service (process 7) as the engine writes them; a job's process writes beside it.
WORDS = {
    "tries": "conn_manager - INFO - Connection [CN00002 N/A => localhost:8002] is created: PID: 7\n",
    "fails": "conn_manager - INFO - Connection [CN00002 Not Connected] is closed PID: 7\n",
    "refused": "ssl_transport: handshake failed: CERTIFICATE_VERIFY_FAILED: self signed\n",
    "let in": "FederatedClient - INFO - Successfully registered client:a for project hospitals.\n",
    "unreachable": "CoreCell - ERROR - cannot send to 'server': target_unreachable\n",
    "revoked": "FLCommunicationError: error:client_registration Client 'a' is disabled\n",
    "quit": "Communicator - INFO - Failed to send heartbeat. Exception: FLCommunicationError: error:client_quit\n",
    "job": "JobExecutor - INFO - Launched job d1d7 with job launcher\n",
    "job ends": "conn_manager - INFO - Connection [CN00003 Not Connected] is closed PID: 8\n",
    "job's own": "conn_manager - INFO - Connection [CN00005 127.0.0.1:9 => localhost:45206] is created: PID: 7\n",
}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("", None),
        ("tries", None),
        ("tries, fails", SILENT),
        ("tries, refused, fails, tries, refused, fails", FOREIGN),
        ("tries, fails, tries, let in", CONNECTED),
        ("tries, let in, job, job ends", CONNECTED),
        ("tries, revoked, fails", REVOKED),
        ("tries, let in, fails, unreachable, tries, quit", REVOKED),
        ("tries, let in, fails, tries, quit, fails, unreachable", SILENT),
        ("tries, let in, job, job ends, fails, unreachable, tries, fails", SILENT),
        ("tries, let in, fails, unreachable, tries", CONNECTED),
        ("tries, let in, fails, job's own", SILENT),
        ("tries, let in, fails, unreachable, tries, job", CONNECTED),
        ("tries, refused, fails, tries, let in, fails", SILENT),
    ],
)
def test_the_engines_log_becomes_one_sentence(tmp_path, words, found):
    log = tmp_path / "service.log"
    assert standing(log, 7) is None
    log.write_text("".join(WORDS[word] for word in words.split(", ") if word))
    assert standing(log, 7) == found


def test_a_site_says_how_it_stands_when_that_has_changed(kits, tmp_path, monkeypatch):
    """Not in the middle of an attempt, and nothing twice."""
    found: list[str | None] = []
    monkeypatch.setattr(
        "fedloom.runtimes.sites.join.site_service",
        lambda *_: SimpleNamespace(pid=7, log=None, alive=True, close=lambda: None),
    )
    monkeypatch.setattr("fedloom.runtimes.sites.join.standing", lambda log, pid: found.pop(0))
    said: list[str] = []
    joined = Joined(kits / "b")
    found += [None, SILENT, CONNECTED, SILENT, SILENT, SILENT, CONNECTED, CONNECTED, None, CONNECTED, CONNECTED]
    while found:
        said += joined.look()
    assert said == [SILENT, CONNECTED]
    found = [REVOKED, None, REVOKED, None, CONNECTED, None]
    monkeypatch.setattr("fedloom.runtimes.sites.join.standing", lambda log, pid: found.pop(0))
    while found:
        joined._began, joined._service.alive = -1e9, False  # it ran for long, and ended
        said += joined.look()
    assert said[2:] == [REVOKED, "the site's service ended; it is started again"]
    with pytest.raises(UserError, match=r"another `fedloom join` uses .*b: end that one first"):
        Joined(kits / "b")
    joined.close()
    Joined(kits / "b").close()


def test_a_lost_site_that_was_heard_again_ends_the_job(tmp_path):
    path = tmp_path / "heard.json"
    assert not heard_again(path, {"a": 100.0})
    path.write_text('{"a": 101.0, "b": 500.0}')
    assert not heard_again(path, {"a": 100.0}), "heard of before it was lost, or in the same moment"
    path.write_text('{"a": 103.5}')
    assert heard_again(path, {"a": 100.0})
    path.write_text("{")
    assert not heard_again(path, {"a": 100.0})


def test_a_server_needs_its_own_kit_and_the_admins(kits, tmp_path):
    assert Server.open(kits / "server", kits / "admin").user == "admin@fedloom.org"
    with pytest.raises(UserError, match="is no kit"):
        Server.open(kits / "server", tmp_path)
