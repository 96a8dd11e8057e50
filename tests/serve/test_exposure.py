"""What a server asks of callers, and tells them, by who can reach it."""

from pathlib import Path

import pytest

from prerank.errors import BundleError, ConfigError
from prerank.serve.exposure import Exposure
from prerank.serve.http import create_app, serve
from tests.serve.client import Client
from tests.serve.fake import FakeFunnel, error_of

TOKEN = "0123456789abcdef"
CALLS = {
    "/v1/events": {"events": [{"user_id": 1, "item_id": 5, "event": "impression"}]},
    "/v1/items": {"items": [{"item_id": 5, "on": False}]},
}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_on_this_machine_alone_no_token_is_needed(host: str) -> None:
    assert Exposure.of(host, None, {}) == Exposure(None, True)
    with Client(create_app(FakeFunnel(), exposure=Exposure.of(host, None, {}))) as client:
        for path, body in CALLS.items():
            assert client.post(path, json=body).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "", "ranker.example", "localhost.example"])
def test_elsewhere_a_server_does_not_start_without_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match=r"--host .*: other machines .* --admin-token-file, or set PRERANK_ADMIN_TOK"):
        Exposure.of(host, None, {})
    assert Exposure.of(host, None, {"PRERANK_ADMIN_TOKEN": TOKEN}) == Exposure(TOKEN, False)


def test_the_server_itself_asks_before_it_loads_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRERANK_ADMIN_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="needs an admin token"):
        serve(tmp_path / "no store", host="0.0.0.0")


def test_the_token_is_that_of_the_file_before_that_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert Exposure.of("0.0.0.0", file, {"PRERANK_ADMIN_TOKEN": "another one of its kind"}).token == TOKEN
    with pytest.raises(ConfigError, match="none such: expected a file that holds the admin token: "):
        Exposure.of("127.0.0.1", tmp_path / "none such", {})


@pytest.mark.parametrize("token", ["", "short", "0123456789 abcdef", "0123456789abcdé0", "0123456789\nabcdef0"])
def test_a_token_that_is_none_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(
        ConfigError, match=r"PRERANK_ADMIN_TOKEN: expected an admin token, 16 or more .* got \d+"
    ) as said:
        Exposure.of("127.0.0.1", None, {"PRERANK_ADMIN_TOKEN": token})
    assert not token or token not in str(said.value)


@pytest.mark.parametrize(
    ("shown", "came"),
    [
        ({}, "none"),
        ({"authorization": "Bearer"}, "none"),
        ({"authorization": TOKEN}, "none"),
        ({"authorization": f"Bearer {TOKEN[:-1]}"}, "another token"),
        ({"authorization": f"Bearer {TOKEN}0"}, "another token"),
        ({"authorization": f"Basic {TOKEN}"}, "another token"),
        ({"authorization": b"Bearer \xff\xfe"}, "another token"),
    ],
)
def test_without_the_token_nothing_changes(shown: dict[str, str], came: str) -> None:
    funnel = FakeFunnel()
    with Client(create_app(funnel, exposure=Exposure(TOKEN, False))) as client:
        for path, body in CALLS.items():
            response = client.post(path, json=body, headers=shown)
            message = f"authorization: expected `Bearer` and the admin token, got {came}"
            assert error_of(response) == (401, "Unauthorized", message)
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.post("/v1/recommend", json={"user_id": 1, "k": 1}).status_code == 200
    assert not funnel.happened
    assert not funnel.changed


def test_with_the_token_it_does(tmp_path: Path) -> None:
    funnel = FakeFunnel()
    with Client(create_app(funnel, exposure=Exposure(TOKEN, True))) as client:
        for path, body in CALLS.items():
            assert client.post(path, json=body).status_code == 401, "where there is a token it is needed here too"
            for shown in (f"Bearer {TOKEN}", f"bearer  {TOKEN} "):
                assert client.post(path, json=body, headers={"authorization": shown}).status_code == 200
    assert len(funnel.changed) == 2


def test_other_machines_are_not_told_what_files_there_are() -> None:
    error = BundleError("/secret/store/versions/x/scorer.safetensors: expected sha256 1, found 2")
    with Client(create_app(error, exposure=Exposure(TOKEN, False))) as client:
        said = error_of(client.get("/readyz"))
        assert said == (503, "NotReady", "BundleError: the server's log says why")
        for path in ("/", "/docs", "/openapi.json", "/metrics", "/healthz"):
            assert "secret" not in client.get(path, follow_redirects=True).text
    with Client(create_app(error)) as client:
        assert "/secret/store" in error_of(client.get("/readyz"))[2]
