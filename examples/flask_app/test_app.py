"""In every test guest 1 signs, which works because each has its own database."""

from flask.testing import FlaskClient


def test_a_guest(client: FlaskClient) -> None:
    assert client.post("/guests/1", data="Ada").status_code == 201
    assert client.get("/guests").json == ["Ada"]


def test_guests_in_order(client: FlaskClient) -> None:
    client.post("/guests/2", data="Grace")
    client.post("/guests/1", data="Barbara")
    assert client.get("/guests").json == ["Barbara", "Grace"]
