import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ru.foundation.errors import UserError
from megatron_ru.launch.guard.protocol import Connection, GuardPlace, decode, encode, one_line, seconds, text, whole


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("10.0.0.1:4000:abc", GuardPlace("10.0.0.1", 4000, "abc")),
        ("fe80::1:4000:abc", GuardPlace("fe80::1", 4000, "abc")),
        ("host.cluster:1:x", GuardPlace("host.cluster", 1, "x")),
    ],
)
def test_a_place_is_read_back(written, place):
    assert GuardPlace.parsed(written) == place
    assert str(place) == written


@pytest.mark.parametrize("written", ["x", "a:b", "a:0:t", "a:70000:t", "a:1:", ":1:t", "a:-1:t", "a:1²:t"])
def test_what_is_no_place_is_one_sentence(written):
    with pytest.raises(UserError, match="is no address:port:token: unset it"):
        GuardPlace.parsed(written)


@pytest.mark.parametrize(
    "line", [b"", b"x", b"[]", b"{}", b'{"kind":1}', b"\xff\xfe", b"[" * 100_000, b'{"kind":"a"', b"9" * 5000]
)
def test_what_is_no_message(line):
    assert decode(line) is None


def test_messages_come_back():
    assert decode(encode("ping", {"step": 3, "host": "ё\n"}).strip()) == {"kind": "ping", "step": 3, "host": "ё\n"}


@given(st.dictionaries(st.sampled_from("ab"), st.none() | st.booleans() | st.floats() | st.text() | st.integers()))
def test_fields_are_of_their_kind_whatever_was_said(fields):
    for name in "ab":
        assert 0 <= whole(fields, name, most=7) <= 7
        assert 0 <= seconds(fields, name) < float("inf")
        assert len(text(fields, name, 5)) <= 5
        assert text(fields, name).isprintable()


def test_a_line_for_the_terminal_holds_nothing_that_it_would_obey():
    assert one_line("a\x1b[2J\r\nb\u202ec\tё", 50) == "a [2J b c ё"
    assert one_line("abcdef", 4) == "abc…"


@pytest.fixture
def pair():
    one, other = socket.socketpair()
    yield Connection(one), other
    one.close()
    other.close()


def test_a_connection_cuts_what_comes_into_messages(pair):
    connection, other = pair
    other.sendall(b'{"kind":"a"}\n{"kind":"b","x":1}\n{"ki')
    assert connection.receive() == [{"kind": "a"}, {"kind": "b", "x": 1}]
    other.sendall(b'nd":"c"}\n')
    assert connection.receive() == [{"kind": "c"}]
    assert connection.receive() == []
    other.sendall(b'{"kind":"last"}\n')
    other.close()
    assert connection.receive() == [{"kind": "last"}]
    assert connection.closed


@pytest.mark.parametrize(
    ("said", "trusted"), [(b"GET / HTTP/1.1\r\n\r\n", True), (b"x" * 5000, False), (b"x" * 300_000, True)]
)
def test_who_says_what_is_no_message_is_left(pair, said, trusted):
    connection, other = pair
    connection.trusted = trusted
    other.setblocking(False)
    other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1_000_000)
    sent = 0
    while sent < len(said) and not connection.closed:
        sent += other.send(said[sent : sent + 50_000])
        assert connection.receive() == []
    assert connection.closed


def test_who_reads_nothing_is_left(pair):
    connection, _ = pair
    for _ in range(200):
        connection.send("long", words="x" * 10_000)
    assert connection.closed
    connection.send("more")


def test_unsent_words_are_sent_when_the_socket_takes_them(pair):
    connection, other = pair
    while not connection.unsent:
        connection.send("long", words="x" * 10_000)
    received = b""
    other.setblocking(False)
    while connection.unsent:
        received += other.recv(1_000_000)
        connection.flush()
    received += other.recv(10_000_000)
    assert {json.loads(line)["kind"] for line in received.splitlines()} == {"long"}
