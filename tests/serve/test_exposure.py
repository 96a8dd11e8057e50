"""What a server asks of callers, and tells them, by who can reach it."""

import json
from base64 import b64encode
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


READS = ("/v1/traces", "/v1/trace/r", "/traces", "/trace/r")
ASKED = {"user_id": 98_765_432_101, "k": 1}


def basic(password: str) -> dict[str, str]:
    return {"authorization": "Basic " + b64encode(f"anybody:{password}".encode()).decode()}


@pytest.mark.parametrize("path", READS)
@pytest.mark.parametrize(
    ("shown", "came"),
    [
        ({}, "none"),
        ({"authorization": f"Bearer {TOKEN}0"}, "another token"),
        ({"authorization": TOKEN}, "none"),
        ({"authorization": f"Digest {TOKEN}"}, "another token"),
        ({"authorization": "Basic !"}, "another token"),
        ({"authorization": f"Basic {TOKEN}"}, "another token"),
        (basic(TOKEN[:-1]), "another token"),
    ],
)
def test_where_there_is_a_token_nobody_reads_of_users_without_it(path: str, shown: dict[str, str], came: str) -> None:
    with Client(create_app(FakeFunnel(), exposure=Exposure(TOKEN, False))) as client:
        client.post("/v1/recommend", json=ASKED, headers={"x-request-id": "r"})
        response = client.get(path, headers=shown)
        status, kind, message = error_of(response)
        assert (status, kind) == (401, "Unauthorized")
        assert message.endswith(f"`Basic` and it as the password, got {came}")
        assert "Basic realm=" in response.headers["www-authenticate"], "a browser asks then"
        assert "98765432101" not in response.text


@pytest.mark.parametrize("path", READS)
def test_with_the_token_or_with_it_as_a_password_they_do(path: str) -> None:
    with Client(create_app(FakeFunnel(), exposure=Exposure(TOKEN, False))) as client:
        client.post("/v1/recommend", json=ASKED, headers={"x-request-id": "r"})
        for shown in ({"authorization": f"Bearer {TOKEN}"}, basic(TOKEN)):
            assert client.get(path, headers=shown).status_code == 200
        for path, body in CALLS.items():
            assert client.post(path, json=body, headers=basic(TOKEN)).status_code == 401, "a browser sends that unasked"


PAGES = [
    ({"origin": "http://evil.example"}, "origin: a page of 'http://evil.example' may change nothing here; expected"),
    ({"origin": "http://localhost:3000"}, "origin: a page of 'http://localhost:3000' may change nothing here"),
    ({"origin": "http://127.0.0.1"}, "origin: a page of"),
    ({"origin": "null"}, "origin: a page of 'null' may change nothing here"),
    ({"origin": "http://[evil"}, "origin: a page of"),
    ({"sec-fetch-site": "cross-site"}, "sec-fetch-site: expected same-origin, for a page of this server, got 'cross-s"),
    ({"sec-fetch-site": "same-site"}, "sec-fetch-site: expected same-origin"),
]
NAMES = [
    ({"host": "evil.example:8000"}, "host: expected 127.0.0.1, localhost or what --allow-host names, got 'evil.exampl"),
    ({"host": "localhost.evil.example"}, "host: expected 127.0.0.1, localhost or"),
    ({"host": "evil@127.0.0.1.example"}, "host: expected 127.0.0.1, localhost or"),
    ({"host": "[evil"}, "host: expected 127.0.0.1, localhost or"),
    ({"host": "evil.example", "origin": "http://evil.example", "sec-fetch-site": "same-origin"}, "host: expected"),
]


@pytest.mark.parametrize(("headers", "says"), [*PAGES, *NAMES])
def test_a_page_of_others_in_a_browser_changes_nothing(headers: dict[str, str], says: str) -> None:
    funnel = FakeFunnel()
    with Client(create_app(funnel)) as client:
        for path, body in CALLS.items():
            # as a form or fetch without preflight can send it
            sent = {**headers, "content-type": "text/plain"}
            status, kind, message = error_of(client.post(path, content=json.dumps(body), headers=sent))
            assert (status, kind) == (403, "CrossSite")
            assert message.startswith(says)
    assert not funnel.happened
    assert not funnel.changed


@pytest.mark.parametrize("path", READS)
def test_by_a_name_that_is_not_this_machines_nobody_reads_of_users(path: str) -> None:
    with Client(create_app(FakeFunnel())) as client:
        client.post("/v1/recommend", json=ASKED, headers={"x-request-id": "r"})
        for headers, says in NAMES:
            response = client.get(path, headers=headers)
            assert error_of(response)[:2] == (403, "CrossSite")
            assert error_of(response)[2].startswith(says)
            assert "98765432101" not in response.text
        link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        assert client.get(path, headers=link).status_code == 200, "a link to it may stand anywhere"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", ""])
def test_its_own_pages_and_what_is_no_browser_may(host: str) -> None:
    with Client(create_app(FakeFunnel())) as client:
        own = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
        for headers in ({"host": host}, own, {"host": host, "sec-fetch-site": "none"}):
            for path, body in CALLS.items():
                assert client.post(path, json=body, headers=headers).status_code == 200


def test_a_name_that_is_allowed_is_as_good_as_this_machines() -> None:
    exposure = Exposure.of("127.0.0.1", None, {}, ["Ranker.example", "[2001:db8::7]"])
    with Client(create_app(FakeFunnel(), exposure=exposure)) as client:
        for host in ("ranker.example", "RANKER.example:8000", "[2001:db8::7]:80"):
            for path, body in CALLS.items():
                for headers in ({"host": host}, {"host": host, "origin": f"https://{host}"}):
                    assert client.post(path, json=body, headers=headers).status_code == 200
        assert client.get("/v1/traces", headers={"host": "other.example"}).status_code == 403
    for wrong in ("http://ranker.example", "ranker.example:80", "*.example", "", "a b"):
        with pytest.raises(ConfigError, match=r"--allow-host '.*': expected a name such as"):
            Exposure.of("127.0.0.1", None, {}, [wrong])


def test_who_shows_the_token_may_whatever_the_name() -> None:
    headers = {"authorization": f"Bearer {TOKEN}", "host": "ranker.example", "origin": "https://app.example"}
    with Client(create_app(FakeFunnel(), exposure=Exposure(TOKEN, True))) as client:
        for path, body in CALLS.items():
            assert client.post(path, json=body, headers=headers).status_code == 200
        assert client.get("/v1/traces", headers=headers).status_code == 200


def test_other_machines_are_not_told_what_files_there_are() -> None:
    error = BundleError("/secret/store/versions/x/scorer.safetensors: expected sha256 1, found 2")
    with Client(create_app(error, exposure=Exposure(TOKEN, False))) as client:
        said = error_of(client.get("/readyz"))
        assert said == (503, "NotReady", "BundleError: the server's log says why")
        for path in ("/", "/docs", "/openapi.json", "/metrics", "/healthz"):
            assert "secret" not in client.get(path, follow_redirects=True).text
    with Client(create_app(error)) as client:
        assert "/secret/store" in error_of(client.get("/readyz"))[2]
