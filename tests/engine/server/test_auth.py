"""Who reaches the socket, and under which name: real sockets, no engine."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.auth

from pagefork import ConfigError, EngineConfig, wire
from pagefork.endpoint import find
from pagefork.server.bind import Bound
from pagefork.server.config import ServiceConfig
from pagefork.server.keys import KeyPair, new_keys, read_key_pair, write_new
from pagefork.server.router import Router
from pagefork.server.seam import Sent
from pagefork.wire import MAX_FRAME, MAX_FRAMES

ARRIVES, NEVER = 5000, 300  # milliseconds


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    monkeypatch.setenv("PAGEFORK_RUNTIME_DIR", str(folder))
    monkeypatch.delenv("PAGEFORK_TOKEN", raising=False)
    return folder


def config(**settings: Any) -> ServiceConfig:
    return ServiceConfig(engine=EngineConfig(model="demo"), **settings)


@contextmanager
def bound(**settings: Any) -> Iterator[Bound]:
    made = Bound(config(**settings))
    try:
        yield made
    finally:
        made.close()


@contextmanager
def dealer(endpoint: str, server: bytes | None = None, keys: KeyPair | None = None) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        if server is not None and keys is not None:
            socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = server, keys.public, keys.secret
        socket.connect(endpoint)
        yield socket


def heard(made: Bound, milliseconds: int = ARRIVES) -> tuple[bytes, list[bytes], str | None] | None:
    return Router(made.socket, made.principal).receive() if made.socket.poll(milliseconds) else None


def test_the_socket_is_for_its_user_alone_and_its_clients_are_the_owner(runtime: Path) -> None:
    with bound() as made:
        path = runtime / "default.ipc"
        assert made.endpoint == find("default").endpoint == f"ipc://{path}"
        assert (stat.S_ISSOCK(path.stat().st_mode), stat.S_IMODE(path.stat().st_mode)) == (True, 0o600)
        with dealer(made.endpoint) as client:
            client.send_multipart([b"a", b"b"])
            found = heard(made)
            assert found is not None and found[1:] == ([b"a", b"b"], "owner")
            assert Router(made.socket, made.principal).send(found[0], [b"back"]) is Sent.OK
            assert client.poll(ARRIVES) and client.recv_multipart() == [b"back"]
    assert sorted(file.name for file in runtime.iterdir()) == ["default.lock"]


def test_the_umask_of_the_process_is_as_before() -> None:
    before = os.umask(0o027)
    try:
        with bound():
            assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_two_engines_of_one_name_are_refused_and_the_first_goes_on() -> None:
    with bound() as made:
        with pytest.raises(ConfigError, match=rf"'default' runs already \(process {os.getpid()}\)"):
            Bound(config())
        with dealer(made.endpoint) as client, bound(name="other"):
            client.send(b"still here")
            assert heard(made) is not None
    with bound():
        pass


def test_what_an_engine_left_that_was_killed_is_in_nobodys_way(runtime: Path) -> None:
    with bound(bind="tcp://127.0.0.1:*"):
        left = {name: (runtime / name).read_bytes() for name in ("default.endpoint", "default.token")}
    for name, data in left.items():
        (runtime / name).write_bytes(data)
    (runtime / "default.ipc").touch()
    with bound() as made:
        assert find("default") == (made.endpoint, None)


def test_on_tcp_the_real_port_and_a_new_token_are_left_for_clients_of_this_user(runtime: Path) -> None:
    tokens = set()
    for port in ("0", "*"):
        with bound(bind=f"tcp://localhost:{port}") as made:
            assert made.endpoint.startswith("tcp://127.0.0.1:") and not made.endpoint.endswith((":0", ":*"))
            assert find("default") == (made.endpoint, made.token)
            assert stat.S_IMODE((runtime / "default.token").stat().st_mode) == 0o600
            tokens.add(made.token)
            with dealer(made.endpoint) as client:
                client.send(b"hello")
                found = heard(made)
                assert found is not None and found[2] is None  # nobody yet: the token says who
    assert len(tokens) == 2 and min(len(token or "") for token in tokens) > 40


def test_ipv6_loopback_is_loopback() -> None:
    try:
        with bound(bind="tcp://[::1]:0") as made, dealer_v6(made.endpoint) as client:
            client.send(b"hello")
            assert heard(made) is not None
    except ConfigError as error:
        pytest.skip(f"this machine has no IPv6: {error}")


@contextmanager
def dealer_v6(endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.ipv6 = True
        socket.connect(endpoint)
        yield socket


def test_a_port_that_is_taken_is_refused() -> None:
    with bound(bind="tcp://127.0.0.1:0") as made, pytest.raises(ConfigError, match=r"can't listen on .*in use"):
        Bound(config(bind=made.endpoint, name="other"))


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "10.1.2.3", "[::]", "eth0", "127.0.0.1.example.com"])
def test_an_address_that_other_machines_reach_takes_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="CURVE keys: curve_secret_key and curve_clients"):
        Bound(config(bind=f"tcp://{host}:5555"))


@pytest.mark.parametrize(
    "bind", ["", "5555", "tcp://127.0.0.1", "tcp://:1", "ipc:///tmp/x", "tcp://127.0.0.1:65536", "tcp://h:-1"]
)
def test_what_is_no_address_is_refused(bind: str) -> None:
    with pytest.raises(ConfigError, match="tcp://HOST:PORT"):
        Bound(config(bind=bind))


def test_settings_that_go_with_others_are_refused_without_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token_file is for TCP"):
        Bound(config(token_file="x"))
    with pytest.raises(ConfigError, match="curve_secret_key, curve_clients is for TCP"):
        Bound(config(curve_secret_key="x", curve_clients="y"))
    with pytest.raises(ConfigError, match="go together"):
        Bound(config(bind="tcp://127.0.0.1:0", curve_secret_key="x"))
    with pytest.raises(ConfigError, match="token_file is for TCP without CURVE"):
        Bound(config(bind="tcp://127.0.0.1:0", curve_secret_key="x", curve_clients="y", token_file="z"))


def test_a_token_of_the_users_own_is_read_if_nobody_else_can(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 0640"):
        Bound(config(bind="tcp://127.0.0.1:0", token_file=str(file)))
    file.chmod(0o600)
    with bound(bind="tcp://127.0.0.1:0", token_file=str(file)) as made:
        assert (made.token, made.token_file) == ("0123456789abcdef", file)
    assert file.exists()
    for text in ("", "short", "x" * 257, "öffentlich, aber lang genug"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"secret|16 to 256"):
            Bound(config(bind="tcp://127.0.0.1:0", token_file=str(file)))


def test_over_curve_only_known_keys_get_anywhere_and_they_are_the_principal(tmp_path: Path) -> None:
    secrets = {name: read_key_pair(new_keys(tmp_path / name, name)[1]) for name in ("engine", "friend", "stranger")}
    settings = {
        "bind": "tcp://127.0.0.1:0",
        "curve_secret_key": str(tmp_path / "engine/engine.key_secret"),
        "curve_clients": str(tmp_path / "friend"),
    }
    engine, friend, stranger = secrets["engine"], secrets["friend"], secrets["stranger"]
    with bound(**settings) as made:
        assert made.token is None
        attempts = {
            "a key that is not known": (engine.public, stranger),
            "a public key without its secret": (engine.public, KeyPair(friend.public, stranger.secret)),
            "another engine's key": (stranger.public, friend),
            "no CURVE at all": (None, None),
        }
        for what, (server, keys) in attempts.items():
            with dealer(made.endpoint, server, keys) as client:
                client.send_multipart([b"let", b"me in"])
                assert not made.socket.poll(NEVER), what
        with dealer(made.endpoint, engine.public, friend) as client:
            client.send_multipart([b"let", b"me in"])
            found = heard(made)
            assert found is not None and found[1:] == ([b"let", b"me in"], f"curve:{friend.public.decode()}")


def test_without_the_thread_that_knows_the_keys_nobody_gets_in(tmp_path: Path) -> None:
    """libzmq lets everybody in when nothing answers for the domain, unless it is told not to."""
    engine, friend = (read_key_pair(new_keys(tmp_path / name, name)[1]) for name in ("engine", "friend"))
    made = Bound(
        config(
            bind="tcp://127.0.0.1:0",
            curve_secret_key=str(tmp_path / "engine/engine.key_secret"),
            curve_clients=str(tmp_path / "friend/friend.key"),
        )
    )
    try:
        assert made._doorkeeper is not None
        made._doorkeeper.close()
        with dealer(made.endpoint, engine.public, friend) as client:
            client.send(b"let me in")
            assert not made.socket.poll(NEVER)
    finally:
        made.close()


def test_key_files_are_those_of_zeromq_and_are_never_overwritten(tmp_path: Path) -> None:
    public, secret = new_keys(tmp_path / "new", "mine")
    pair = read_key_pair(secret)
    assert zmq.auth.load_certificate(secret) == pair
    assert zmq.auth.load_certificate(public) == (pair.public, None)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        new_keys(tmp_path / "new", "mine")
    public.unlink()
    with pytest.raises(FileExistsError):
        new_keys(tmp_path / "new", "mine")
    assert read_key_pair(secret) == pair and not public.exists()
    (tmp_path / "link").symlink_to(secret)
    for taken in (secret, tmp_path / "link"):
        with pytest.raises(FileExistsError):
            write_new(taken, "another", 0o600)
    assert read_key_pair(secret) == pair


def test_files_that_hold_no_keys_are_refused(tmp_path: Path) -> None:
    public, secret = new_keys(tmp_path, "mine")
    public.chmod(0o600)
    with pytest.raises(ConfigError, match="lacks the secret key"):
        read_key_pair(public)
    secret.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644"):
        read_key_pair(secret)
    secret.chmod(0o600)
    secret.write_text(secret.read_text().replace('key = "', 'key = "x'))
    with pytest.raises(ConfigError, match="no CURVE key of 40 characters"):
        read_key_pair(secret)
    (tmp_path / "none").mkdir()
    given = {"bind": "tcp://127.0.0.1:0", "curve_secret_key": str(new_keys(tmp_path, "engine")[1])}
    for clients in (tmp_path / "none", tmp_path / "not there", Path(__file__)):
        with pytest.raises(ConfigError, match=str(clients)):
            Bound(config(**given, curve_clients=str(clients)))


def test_a_message_of_too_many_or_too_long_frames_is_cut_and_the_next_one_is_whole() -> None:
    with bound() as made, dealer(made.endpoint) as client:
        client.send_multipart([b"x"] * 10_000)
        client.send_multipart([b"y" * (MAX_FRAME - 1)] * 4)
        client.send_multipart([b"a", b"b"])
        many, long, good = (heard(made) for _ in range(3))
        assert many is not None and long is not None and good is not None
        assert len(many[1]) == MAX_FRAMES + 1
        assert len(long[1]) == MAX_FRAMES + 1 and sum(map(len, long[1])) <= 2 * MAX_FRAME
        assert good[1] == [b"a", b"b"]


def test_a_client_that_names_its_connection_is_refused() -> None:
    with bound() as made, zmq.Context() as context, context.socket(zmq.DEALER) as named, dealer(made.endpoint) as other:
        named.linger = 0
        named.routing_id = b"worker-1"
        named.connect(made.endpoint)
        named.send_multipart([b"a", b"b"])
        assert heard(made) is None
        assert named.poll(ARRIVES)
        error, _ = wire.decode_from_engine(named.recv_multipart())
        assert isinstance(error, wire.Error) and error.code == wire.Code.UNAUTHENTICATED and "ROUTING_ID" in error.message
        other.send_multipart([b"c", b"d"])
        found = heard(made)
        assert found is not None and found[1] == [b"c", b"d"]


def test_a_frame_above_the_limit_costs_its_sender_the_connection_and_nobody_else_anything() -> None:
    with bound() as made, dealer(made.endpoint) as bad, dealer(made.endpoint) as good:
        bad.send_multipart([b"x" * (MAX_FRAME + 1), b"b"])
        assert heard(made, NEVER) is None
        good.send_multipart([b"y" * MAX_FRAME, b"b"])
        found = heard(made)
        assert found is not None and found[1] == [b"y" * MAX_FRAME, b"b"]


def test_a_peer_that_does_not_read_is_full_and_one_that_is_gone_is_gone() -> None:
    with bound() as made:
        router = Router(made.socket, made.principal)
        assert router.send(b"nobody", [b"x"]) is Sent.GONE
        with dealer(made.endpoint) as client:
            client.send(b"hello")
            found = heard(made)
            assert found is not None
            results = {router.send(found[0], [b"x" * 65536]) for _ in range(10_000)}
            assert results == {Sent.OK, Sent.FULL}
