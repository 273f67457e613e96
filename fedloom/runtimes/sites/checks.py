"""`fedloom join --check`: check whether this site can take part now, and say how to fix each problem.

The checks change nothing and need no recipe. Their results are shown only on this terminal.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography import x509

from fedloom.common.errors import UserError
from fedloom.data.loading import load_corpus
from fedloom.data.shard_file import is_shard, read_shard
from fedloom.models.loading import locate
from fedloom.recipe.recipe import DataConfig, ModelConfig
from fedloom.runtimes import versions
from fedloom.runtimes.doctor import Check, machine
from fedloom.runtimes.sites.order import kit_file
from fedloom.runtimes.sites.policy import Policy
from fedloom.runtimes.sites.project import SiteConfig

#: A certificate with fewer days left than this gets a note.
SOON_DAYS = 30


#: Seconds to wait for one answer over the network.
PATIENCE = 10.0


def checks(kit: Path, site: SiteConfig) -> Iterator[Check]:
    """Run all checks, in the order of their table. Raises UserError if `kit` is not a site's kit."""
    about = kit_file(kit, "site")
    yield Check("good", "site", f"{about['site']} of {about['project']}, client {site.client}")
    host, port = about["server"]["host"], int(about["server"]["port"])
    address = _address(host, port)
    yield address
    yield from _certificates(kit)
    if address.level == "good":
        yield _handshake(kit, host, port)
    elif address.level == "note":
        yield Check("note", "mutual TLS", "not checked", "check again while the server runs")
    differs = versions.mismatch(versions.own(), about["versions"])
    yield Check(
        "bad" if differs else "good",
        "versions",
        differs or ", ".join(f"{k} {v}" for k, v in versions.own().items()),
        "install what kit.yaml names (there: the server's)" if differs else "",
    )
    yield from machine(Path(site.home))
    yield _model(site)
    yield _data(site)
    limits = {k: v for k, v in Policy.load(Path(site.policy)).model_dump().items() if v not in (None, False)}
    yield Check("good", "policy", ", ".join(f"{k}={v}" for k, v in limits.items()))


def _address(host: str, port: int) -> Check:
    try:
        socket.create_connection((host, port), PATIENCE).close()
    except ConnectionRefusedError:
        fix = "the server listens while `fedloom serve` runs there: if it does, ask whether a firewall refuses this machine"
        return Check("note", "address", f"{host}:{port} can be reached, but nothing listens there (yet)", fix)
    except OSError as error:
        fix = "is the server up, and does the firewall let this machine dial out to that port?"
        return Check("bad", "address", f"{host}:{port} cannot be reached ({error.strerror or error})", fix)
    return Check("good", "address", f"{host}:{port}")


def _certificates(kit: Path) -> Iterator[Check]:
    """Check when the certificates of this site and of its authority expire."""
    for what, name in (("certificate", "client.crt"), ("authority", "rootCA.pem")):
        try:
            found = x509.load_pem_x509_certificate((kit / "startup" / name).read_bytes())
        except (OSError, ValueError):
            yield Check("bad", what, f"startup/{name} cannot be read", "ask for a new kit")
            continue
        now = datetime.datetime.now(datetime.UTC)
        age, left = (now - found.not_valid_before_utc).days, (found.not_valid_after_utc - now).days
        said = f"{age} days old, {left} days left"
        if found.not_valid_after_utc < now:
            yield Check("bad", what, f"expired on {found.not_valid_after_utc:%Y-%m-%d}", "ask for a new kit")
        elif left < SOON_DAYS:
            yield Check("note", what, said, "ask for a new kit in time")
        else:
            yield Check("good", what, said)


def _handshake(kit: Path, host: str, port: int) -> Check:
    """Check that server and site accept each other's certificates."""
    startup = kit / "startup"
    try:
        context = ssl.create_default_context(cafile=startup / "rootCA.pem")
        context.load_cert_chain(startup / "client.crt", startup / "client.key")
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, port), PATIENCE) as raw,
            context.wrap_socket(raw, server_hostname=host) as secured,
        ):
            secured.settimeout(PATIENCE)
            with contextlib.suppress(TimeoutError):
                secured.recv(1)  # under TLS 1.3 a rejection arrives only now
    except (OSError, ssl.SSLError) as error:
        said = getattr(error, "reason", None) or error.strerror or type(error).__name__
        return Check(
            "bad",
            "mutual TLS",
            f"refused ({said})",
            "this kit and that server are not of one project: ask for a new kit",
        )
    return Check("good", "mutual TLS", "server and site accept each other's certificates")


def _model(site: SiteConfig) -> Check:
    if site.model is None:
        return Check("note", "model", "named by the recipe", "--model FOLDER, where this machine has no internet")
    try:
        where, source = locate(ModelConfig(name=site.model))
    except UserError as error:
        return Check("bad", "model", str(error), "name a folder with --model")
    return Check("good", "model", f"{source}: {where}")


def _data(site: SiteConfig) -> Check:
    """Check that the data can be read with its columns. The result has numbers only."""
    path = Path(site.data)
    try:
        if is_shard(path):
            corpus, partition, _ = read_shard(path, site.client, 0)
            sizes = partition.shards[site.client]
            return Check("good", "data", f"a dealt shard: {len(sizes.train)} to train on, {len(sizes.test)} to test on")
        settings: dict[str, Any] = {"path": str(path), "columns": site.columns}
        corpus = load_corpus(DataConfig.model_validate(settings), seed=0, splitter="uniform")
    except UserError as error:
        return Check("bad", "data", str(error), "name the columns with --column ROLE=COLUMN")
    count = len(corpus.categories())
    many = "1 category" if count == 1 else f"{count} categories"
    return Check("good", "data", f"{len(corpus.examples):,} examples in {many}")
