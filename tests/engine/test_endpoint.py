"""Where engines are found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pagefork import ConfigError
from pagefork.endpoint import MAX_SOCKET_PATH, Address, Files, find, runtime_directory


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAGEFORK_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("PAGEFORK_TOKEN", raising=False)
    return tmp_path / "run"


def test_the_runtime_directory_is_made_for_its_user_alone(runtime: Path) -> None:
    before = os.umask(0)
    try:
        assert runtime_directory() == runtime
    finally:
        os.umask(before)
    assert runtime.stat().st_mode & 0o7777 == 0o700
    assert runtime_directory() == runtime


def test_without_a_variable_it_is_that_of_the_session_else_one_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PAGEFORK_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_directory() == tmp_path / "pagefork"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "not there"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert runtime_directory() == tmp_path / f"pagefork-{os.geteuid()}"


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o500])
def test_a_runtime_directory_that_others_can_enter_is_refused(runtime: Path, mode: int) -> None:
    runtime.mkdir()
    runtime.chmod(mode)
    with pytest.raises(ConfigError, match=f"has mode {mode:04o} instead of 0700.*PAGEFORK_RUNTIME_DIR"):
        find("default")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_runtime_directory_of_another_user_is_refused(runtime: Path) -> None:
    runtime.mkdir(0o700)
    os.chown(runtime, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        runtime_directory()


def test_a_link_in_place_of_the_runtime_directory_is_refused(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir(0o700)
    runtime.symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="no directory"):
        runtime_directory()


def test_a_runtime_directory_that_cant_be_made_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PAGEFORK_RUNTIME_DIR", str(tmp_path / "no" / "such" / "parent"))
    with pytest.raises(ConfigError, match="can't be made"):
        runtime_directory()


def test_a_path_that_fits_the_address_of_a_socket_is_taken_and_a_longer_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = MAX_SOCKET_PATH - len(os.fsencode(tmp_path)) - len("//a.ipc")
    monkeypatch.setenv("PAGEFORK_RUNTIME_DIR", str(tmp_path / ("d" * room)))
    assert len(os.fsencode(Files.of("a").socket)) == MAX_SOCKET_PATH
    with pytest.raises(ConfigError, match=f"too long .* {MAX_SOCKET_PATH} bytes"):
        Files.of("ab")


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a/b", "a b", "a\n", "n" * 65, "ä"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 64"):
        find(name)


def test_a_name_stands_for_a_socket_in_the_runtime_directory(runtime: Path) -> None:
    assert find("default") == Address(f"ipc://{runtime}/default.ipc", None)


def test_an_engine_on_tcp_is_found_by_its_name_with_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files.of("far")
    files.endpoint.write_text("tcp://127.0.0.1:4711\n")
    assert find("far") == Address("tcp://127.0.0.1:4711", None)
    files.token.write_text("secret\n")
    assert find("far") == Address("tcp://127.0.0.1:4711", "secret")
    monkeypatch.setenv("PAGEFORK_TOKEN", "another")
    assert find("far").token == "another"


def test_an_endpoint_stands_for_itself(monkeypatch: pytest.MonkeyPatch, runtime: Path) -> None:
    monkeypatch.setenv("PAGEFORK_TOKEN", "secret")
    assert find("tcp://10.0.0.1:5555") == Address("tcp://10.0.0.1:5555", "secret")
    assert find("ipc:///tmp/x") == Address("ipc:///tmp/x", "secret")
    assert not runtime.exists()
    with pytest.raises(ConfigError, match="ipc:// or tcp://"):
        find("http://localhost")
