"""State at rest: whole or not at all, the last k, bit for bit, and every kind of damage recognised."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fedloom.common.errors import RunFailed, UserError
from fedloom.common.files import folder_name, write_bytes, write_json
from fedloom.federation.record.checkpoints import Checkpoints, ClientStore, Evaluation, RoundState
from fedloom.federation.record.events import SCHEMA
from fedloom.messages.at_rest import DamagedFile, from_bytes, load_tensors, to_bytes
from fedloom.messages.types import Payload

VALUES = {
    "f32": torch.tensor([1.0, -0.0, float("inf"), 1e-45]),
    "bf16": torch.arange(6).reshape(2, 3).to(torch.bfloat16),
    "i64": torch.tensor(7),
    "bool": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "fp8": torch.ones(4).to(torch.float8_e4m3fn),
}


def state(round: int) -> RoundState:
    return RoundState(
        round, Payload({"w": torch.full((4,), float(round))}, {"r": round}), {"finished": round, "x": 0.1}
    )


def test_payloads_come_back_bit_for_bit():
    sent = Payload(VALUES, {"note": "ü", "list": [1, 2.5, None]})
    got = from_bytes(to_bytes(sent))
    assert got.meta == sent.meta
    for name, tensor in VALUES.items():
        assert (got.tensors[name].dtype, got.tensors[name].shape) == (tensor.dtype, tensor.shape)
        same = [t.reshape(-1).view(torch.uint8) for t in (got.tensors[name], tensor)]
        assert torch.equal(*same)


def test_every_truncation_and_every_flipped_byte_is_recognised():
    data = to_bytes(Payload({"w": torch.arange(8.0), "v": torch.ones(3, dtype=torch.int8)}, {"n": 1}))
    for length in range(len(data)):
        with pytest.raises(DamagedFile):
            from_bytes(data[:length])
    header = 8 + int.from_bytes(data[:8], "little")
    for at in range(header, len(data)):
        altered = bytearray(data)
        altered[at] ^= 128
        with pytest.raises(DamagedFile):
            from_bytes(bytes(altered))


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    write_bytes(path, b"first")

    def refused(*args):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refused)
            with pytest.raises(OSError, match="No space left") as caught:
                write_bytes(path, b"second")
            assert caught.value.filename == str(path)
        assert path.read_bytes() == b"first"
        assert [p.name for p in path.parent.iterdir()] == ["file"]
    write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode & 0o777 == 0o644


def test_json_that_is_not_finite_is_refused(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1.0})
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{\n  "x": 1.0\n}\n'


def test_the_last_k_rounds_are_kept(tmp_path):
    store = Checkpoints(tmp_path / "c", keep=2)
    assert store.newest() == (None, [])
    for round in range(5):
        assert store.save(state(round)).name == f"round-{round:04d}"
    assert store.rounds() == [4, 3]
    got, said = store.newest()
    assert said == []
    assert (got.round, got.notes, got.server.meta) == (4, state(4).notes, {"r": 4})
    assert torch.equal(got.server.tensors["w"], torch.full((4,), 4.0))
    store.amend(RoundState(4, state(4).server, {"finished": 4, "more": [1]}))
    assert store.newest()[0].notes == {"finished": 4, "more": [1]}
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["round-0003", "round-0004"]


def test_damage_is_passed_over_and_done_again(tmp_path):
    store = Checkpoints(tmp_path / "c", keep=3)
    for round in (1, 2, 3):
        store.save(state(round))
    (store.path(3) / "server.safetensors").write_bytes(b"")
    (store.path(2) / "state.json").unlink()
    got, said = store.newest()
    assert got.round == 1
    assert len(said) == 2
    assert said[0].startswith("the checkpoint of round 3 is damaged")
    assert said[1].startswith("the checkpoint of round 2 is damaged")
    store.save(state(2))
    assert store.newest()[0].round == 2
    (store.path(2) / "server.safetensors").write_bytes(b"x")
    (store.path(1) / "server.safetensors").write_bytes(b"x")
    with pytest.raises(RunFailed, match="no checkpoint in"):
        store.newest()


def test_rounds_after_the_one_that_is_saved_are_not_kept_in_its_place(tmp_path):
    """Rounds 2 and 3 are damaged and keep is 1: saving round 2 again must not delete it for the damaged round 3."""
    store = Checkpoints(tmp_path / "c", keep=3)
    for round in (1, 2, 3):
        store.save(state(round))
    for round in (2, 3):
        (store.path(round) / "server.safetensors").write_bytes(b"")
    Checkpoints(tmp_path / "c", keep=1).save(state(2))
    assert Checkpoints(tmp_path / "c").newest()[0].round == 2


def test_another_version_is_refused(tmp_path):
    store = Checkpoints(tmp_path / "c")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedloom.federation.record.checkpoints.VERSION", 99)
        store.save(state(1))
    with pytest.raises(UserError, match="version 99"):
        store.load(1)


def test_a_left_over_of_a_killed_save_is_cleared(tmp_path):
    store = Checkpoints(tmp_path / "c")
    (tmp_path / "c" / ".round-0001-77").mkdir(parents=True)
    store.save(state(1))
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["round-0001"]


def test_client_state_of_the_right_round(tmp_path):
    store = ClientStore(tmp_path, keep=2)
    assert store.load("a", 5) == {}
    for round in (1, 3, 4):
        optimizer = Payload({"exp_avg": torch.full((2,), float(round)), "step": torch.tensor(float(round))})
        store.save("a", round, {"personal": Payload({}, {"r": round}), "optimizer": optimizer})
    assert store.load("a", 2) == {}  # round 1 is no longer kept
    for up_to, expected in ((3, 3), (4, 4), (9, 4)):
        got = store.load("a", up_to)
        assert got["personal"].meta == {"r": expected}
        assert torch.equal(got["optimizer"].tensors["exp_avg"], torch.full((2,), float(expected)))
    store.save("a", 3, {"personal": Payload({}, {"r": 33})})  # a server that fell back does round 3 again
    assert store.load("a", 3)["personal"].meta == {"r": 33}
    assert store.load("b", 9) == {}


def test_a_client_that_comes_rarely_keeps_two_states(tmp_path):
    """At round 900 the checkpoints of 898 and 899 may be gone back to, whose newest state is that of round 50."""
    store = ClientStore(tmp_path, keep=3)
    for round in (1, 50, 900):
        store.save("a", round, {"personal": Payload({}, {"r": round})})
    assert [store.load("a", up_to).get("personal", Payload()).meta for up_to in (49, 898, 899, 900)] == [
        {}, {"r": 50}, {"r": 50}, {"r": 900},
    ]  # fmt: skip
    for round in (901, 902):
        store.save("a", round, {"personal": Payload({}, {"r": round})})
    assert store.load("a", 899) == {}  # round 902's server goes back to 900 at most
    assert [store.load("a", up_to)["personal"].meta["r"] for up_to in (900, 901, 902)] == [900, 901, 902]


def test_clients_without_state_have_no_file(tmp_path):
    ClientStore(tmp_path / "clients").save("a", 1, {"personal": Payload(), "optimizer": Payload()})
    assert not (tmp_path / "clients").exists()


def test_client_names_become_safe_folders(tmp_path):
    names = [
        "a/b",
        "../up",
        ".hidden",
        "..",
        "C++",
        "c#",
        "naïve",
        "a b",
        "x" * 300,
        "x" * 299 + "y",
        "a%2Fb",
        "A",
        "a",
    ]
    folders = [folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    for name, folder in zip(names, folders, strict=True):
        assert "/" not in folder
        assert not folder.startswith(".")
        assert 0 < len(folder) <= 120
        (tmp_path / folder).mkdir()
        assert (tmp_path / folder).resolve().parent == tmp_path.resolve()
        ClientStore(tmp_path / "s").save(name, 1, {"personal": Payload({}, {"n": name})})
    for name in names:
        assert ClientStore(tmp_path / "s").load(name, 1)["personal"].meta == {"n": name}


def test_a_damaged_tensor_file_is_said(tmp_path):
    path = Path(tmp_path / "x.safetensors")
    path.write_bytes(b"nothing")
    with pytest.raises(DamagedFile, match="cannot be read"):
        load_tensors(path)


# ------------------------------------------------------------------ files that belong to a checkpoint


def with_files(tmp_path: Path, round: int) -> RoundState:
    """A state with two files, such as updates in flight."""
    files = {}
    for number in (1, 2):
        path = tmp_path / f"waits-{round}-{number}"
        path.write_bytes(to_bytes(Payload({"w": torch.full((3,), float(10 * round + number))})))
        files[f"in-flight-{number}.safetensors"] = path
    return RoundState(round, state(round).server, state(round).notes, files)


def test_files_lie_in_the_checkpoint_and_come_back(tmp_path):
    store = Checkpoints(tmp_path / "c")
    folder = store.save(given := with_files(tmp_path, 1))
    for path in given.files.values():
        path.unlink()  # the run goes on
    got = store.load(1)
    assert {name: path.parent for name, path in got.files.items()} == dict.fromkeys(given.files, folder)
    values = [float(from_bytes(path.read_bytes()).tensors["w"][0]) for _, path in sorted(got.files.items())]
    assert values == [11.0, 12.0]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("how", ["gone", "torn", "altered"])
def test_a_checkpoint_is_damaged_where_any_of_its_files_is(tmp_path, number, how):
    store = Checkpoints(tmp_path / "c")
    for round in (1, 2):
        store.save(with_files(tmp_path, round))
    name = f"in-flight-{number}.safetensors"
    path = store.path(2) / name
    data = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(data[:-1] if how == "torn" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedFile, match=f"{name} cannot be read"):
        store.load(2)
    found, said = store.newest()
    assert found.round == 1 and len(found.files) == 2
    assert said == [f"the checkpoint of round 2 is damaged: {name} cannot be read; using the one before it"]


def test_what_is_wrong_with_a_damaged_checkpoint_is_said(tmp_path):
    store = Checkpoints(tmp_path / "c")
    path = store.save(state(1)) / "server.safetensors"
    data = path.read_bytes()
    for written, sentence in (
        (data[:-3], rf"has {len(data) - 3} of {len(data)} bytes"),
        (data + b"x", rf"has {len(data) + 1} of {len(data)} bytes"),
        (data[:-1] + bytes([data[-1] ^ 1]), "server.safetensors was altered"),
    ):
        path.write_bytes(written)
        with pytest.raises(DamagedFile, match=sentence):
            store.load(1)
    path.write_bytes(data)
    described = path.with_name("state.json")
    described.write_text(described.read_text().replace('"finished": 1', '"finished": 2'))
    with pytest.raises(DamagedFile, match=r"state\.json was altered"):
        store.load(1)
    described.write_text("[]")
    with pytest.raises(DamagedFile, match=r"state\.json was altered"):
        store.load(1)
    described.write_text("{")
    with pytest.raises(DamagedFile, match="it cannot be read"):
        store.load(1)


def test_other_folders_beside_checkpoints_are_left_alone(tmp_path):
    store = Checkpoints(tmp_path / "c", keep=1)
    for name in ("round-old", "round-0001.bak", "round-"):
        (tmp_path / "c" / name).mkdir(parents=True)
    store.save(state(12345))
    assert store.rounds() == [12345]
    assert (tmp_path / "c" / "round-old").is_dir()
    assert store.newest()[0].round == 12345


def test_other_files_beside_a_client_s_states_are_left_alone(tmp_path):
    store = ClientStore(tmp_path, keep=2)
    store.save("a", 3, {"personal": Payload({}, {"r": 3})})
    for name in ("round-old.safetensors", "round-0009.safetensors.bak", "round-.safetensors"):
        (tmp_path / "a" / name).write_bytes(b"not ours")
    store.save("a", 4, {"personal": Payload({}, {"r": 4})})
    assert [store.load("a", up_to)["personal"].meta["r"] for up_to in (3, 4, 99)] == [3, 4, 4]
    assert (tmp_path / "a" / "round-old.safetensors").read_bytes() == b"not ours"


OLD = {
    "loss": 1.5, "score": None, "questions": 0, "tokens": 12,
    "clients": {"a": {"loss": 1.5, "tokens": 12, "score": None, "questions": 0}},
    "spread": None, "seconds": 0.25, "pooled": False, "emulator": None,
    "preference": {"loss": 0.5, "accuracy": 1.0, "margin": 2.0, "pairs": 3}, "virtual_seconds": None,
}  # fmt: skip


def test_a_record_comes_back_and_its_keys_stay_in_their_order():
    found = Evaluation.from_json(json.loads(json.dumps(OLD)))
    assert found.tokens == 12 and found.clients["a"]["loss"] == 1.5
    assert json.dumps(found.to_json()) == json.dumps(OLD)
    assert Evaluation.from_json(found.to_json()) == found


def test_a_record_has_the_fields_of_its_event_and_is_read_from_one():
    assert {"round", *OLD} == set(SCHEMA["evaluation"])
    event = {"event": "evaluation", "time": 1.0, "round": 2, **OLD}
    assert Evaluation.from_json(event) == Evaluation.from_json(OLD)
