"""Personal data by forms made here with their check digits, among text that only looks like it."""

from __future__ import annotations

import ipaddress
import random
import time

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_tools.flow import Flow
from data_tools.pii import Pii, PiiSettings
from data_tools.pii_kinds import _IBAN_SIZES, is_public


def masked(text: str, **changes: object) -> str:
    batch = pa.RecordBatch.from_pydict({"text": pa.array([text], pa.string())})
    return str(Pii(PiiSettings.model_validate(changes))(batch, Flow()).column("text")[0].as_py())


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
PEM = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEowIBAAKCAQEAxY0\n" * 5 + "-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail a.b-c+d@mail.host.org.", "mail <EMAIL>."),
        ("<x_1@host.museum>,y@host.de;", "<<EMAIL>>,<EMAIL>;"),
        ("邮箱li@qq.com。", "邮箱<EMAIL>。"),
        ("E<lt>a@cpan.orgE<gt>", "E<lt><EMAIL>E<gt>"),
        ("12345678@qq.com", "<EMAIL>"),
        ("call +49 30 1234567 now", "call <PHONE> now"),
        ("+1 (212) 555-0123, x", "<PHONE>, x"),
        ("tel:+81-3-1234-5678", "tel:<PHONE>"),
        ("+442079460958", "<PHONE>"),
        ("+491234567890123", "<PHONE>"),
        ("+1 212 555 0123 2023", "<PHONE> 2023"),
        ("(212) 555-0123 or 212.555.0123", "<PHONE> or <PHONE>"),
        ("1-800-555-0199", "<PHONE>"),
        ("Tel.: 020 7946 0958", "Tel.: <PHONE>"),
        ("Fax (0734) 751087.", "Fax <PHONE>."),
        ("电话：010-12345678", "电话：<PHONE>"),
        ("from 93.184.216.34:80.", "from <IP>:80."),
        ("63.62.61.64", "<IP>"),
        ("http://93.184.216.34/x [2a00:1450:4001:81b::200e]", "http://<IP>/x [<IP>]"),
        ("port 80 2001:67c:2564:a119::77", "port 80 <IP>"),
        ("card 4111 1111 1111 1111 ok", "card <CARD> ok"),
        ("5500005555555559", "<CARD>"),
        ("3782-822463-10005", "<CARD>"),
        ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN <IBAN>."),
        ("GB82WEST12345698765432", "<IBAN>"),
        ("key AKIAIOSFODNN7EXAMPLE;", "key <KEY>;"),
        ("AKIAIOSFODNN7EXAMPLE@mail.host.org", "<KEY>@mail.host.org"),
        ("ghp_" + "aB3" * 12, "<KEY>"),
        ("xoxb-123456789012-abcdefGHIJ", "<KEY>"),
        ("sk-proj-aB3dE5gH7jK9mN1pQ3sT5", "<KEY>"),
        ("AIza" + "Sy0-_" * 7, "<KEY>"),
        (f"Bearer {JWT}", "Bearer <KEY>"),
        (f"x\n{PEM}\ny", "x\n<KEY>\ny"),
        ('api_key = "aB3dE5gH7jK9mN1pQ3sT5"', 'api_key = "<KEY>"'),
        ("DB_PASSWORD=xY7kQ2mN8vB4cZ1wL6pT", "DB_PASSWORD=<KEY>"),
    ],
)
def test_what_is_masked(text: str, expected: str) -> None:
    assert masked(text) == expected
    assert masked(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "@",
            "a@b",
            "user@example.com",
            "a@x.example.org",
            "name@2x.png",
            "getty@tty1.service",
            "@home.org",
        ),
        *("a..b@host.com", "pkg@1.2.3", "x @ y.com", "foo@bar.baz1"),
        *(
            "version 81.2.3.94",
            "v81.2.3.94",
            "see 8.5.1.3. Enums",
            "1.2.3.4",
            "81.2.3.94.5",
            "63.62.61.60",
            "firmware: 93.1.1.1",
        ),
        *(
            "pkg-93.184.216.34",
            "93.184.216.34-2",
            "300.1.2.3",
            "10.0.0.1 192.168.1.1 127.0.0.1 203.0.113.9 224.0.0.251",
        ),
        *(
            "255.255.255.0",
            "fe80::1 ::1 2001:db8::1",
            "std::vector a::b dead::beef",
            "in 2004:: and",
            "12:34:56",
        ),
        *(
            "2023-01-15 12:34:56",
            "15.01.2023",
            "01/02/2003",
            "1,234,567,890",
            "3.14159265358979",
            "0.4111111111111111",
        ),
        *(
            "ISBN 978-3-16-148410-0",
            "ISBN 0-306-40615-2",
            "9f86d081884c7d659a2feaa0c55ad015",
            "1672531200000",
        ),
        *(
            "4111 1111 1111 1112",
            "4111 1111 1111 1111 4111",
            "1234567890123456",
            "x4111111111111111",
            "+2147483647",
            "+4912345678901234",
        ),
        *(
            "0x4111111111111111",
            "123-45-6789",
            "100-200-3000",
            "212-555-01234",
            "2+3-4",
            "-+123",
            "1 + 555",
            "+0200",
        ),
        *(
            "DE89 3704 0044 0532 0130 01",
            "XX8937040044053201300",
            "GB82WEST12345698765432X",
            "sk-spinner-double-bounce-1",
        ),
        *(
            "ghp_short",
            "task-force-is-here-and-now-12",
            "token: 9f86d081884c7d659a2feaa0c55ad015",
            "password = correct",
        ),
        "-----BEGIN PUBLIC KEY-----\n" + "MIIEowIBAAKCAQEAxY0\n" * 5 + "-----END PUBLIC KEY-----",
        "-----BEGIN RSA PRIVATE KEY-----\n...\n-----END RSA PRIVATE KEY-----",
        "git 7f3a9b2c4d5e6f708192a3b4c5d6e7f801234567 sha256:2c26b46b68ffc68ff99b453c1d304134134",
    ],
)
def test_what_is_left_alone(text: str) -> None:
    assert masked(text) == text


def luhn(digits: str) -> str:
    total = sum(int(d) if i % 2 else sum(divmod(2 * int(d), 10)) for i, d in enumerate(reversed(digits)))
    return digits + str(-total % 10)


def one_of_each(draw: random.Random) -> list[tuple[str, str]]:
    """Made-up data of every kind, and numbers that are none, with what is to become of them."""
    name = "".join(draw.choices("abcdefgh", k=5))
    card = luhn("4" + "".join(draw.choices("0123456789", k=14)))
    country = draw.choice(sorted(_IBAN_SIZES))
    account = "".join(draw.choices("0123456789ABC", k=_IBAN_SIZES[country] - 4))
    check = 98 - int("".join(str(int(c, 36)) for c in account + country + "00")) % 97
    address = ipaddress.IPv4Address(draw.getrandbits(32))
    address = address if max(address.packed) >= 64 else ipaddress.IPv4Address("93.184.216.34")
    public = address.is_global and not address.is_multicast
    six = ipaddress.IPv6Address((0x2A << 120) | draw.getrandbits(120))
    return [
        (f"{name}.x@{name}.org", "<EMAIL>"),
        (card, "<CARD>"),
        (" ".join(card[i : i + 4] for i in range(0, 16, 4)), "<CARD>"),
        (f"{country}{check:02d}{account}", "<IBAN>"),
        (str(address), "<IP>" if public else str(address)),
        (six.exploded, "<IP>"),
        (six.compressed, "<IP>"),
        (f"(2{draw.randrange(100):02d}) 555-{draw.randrange(10000):04d}", "<PHONE>"),
        (f"+49 {draw.randrange(100, 999)} {draw.randrange(10**6, 10**7)}", "<PHONE>"),
        ("AKIA" + "".join(draw.choices("ABCDEFGH234567", k=16)), "<KEY>"),
        *(
            (same, same)
            for same in (name, f"{draw.randrange(10**6)}", "2023-01-15", "3.25", f"{draw.getrandbits(64):x}x")
        ),
    ]


def test_all_kinds_are_found_among_each_other() -> None:
    draw = random.Random(1)
    for _ in range(150):
        pieces = [draw.choice(one_of_each(draw)) for _ in range(8)]
        joint = draw.choice([", ", "\n", " – ", "，", "; "])
        assert masked(joint.join(text for text, _ in pieces)) == joint.join(mask for _, mask in pieces)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.text("0123456789@.:+-() /aAbB_=<>é", max_size=30), max_size=4),
    st.integers(0, 1 << 32),
)
def test_masking_twice_is_masking_once(noise: list[str], seed: int) -> None:
    draw = random.Random(seed)
    known = [draw.choice(one_of_each(draw))[0] for _ in noise]
    text = "".join(part for pair in zip(noise, known, strict=True) for part in pair)
    assert masked(masked(text)) == masked(text)


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "1",
            "1 ",
            "1.1.",
            "1-",
            "a",
            "a@",
            "@",
            "a.",
            "a@a.",
            "+1 (",
            f"+{'1' * 120} ",
            "+123456.123456.",
            "(2",
            "2001:",
            ":",
            "2a00::",
            "A1/",
            "a1+",
            "eyJ",
        ),
        *(
            "-----BEGIN RSA PRIVATE KEY-----",
            "-----BEGIN ",
            "sk-",
            "ghp_a1",
            "AKIA",
            "DE89 ",
            "tel ",
            "tel 1",
            "secret=A1a",
        ),
        *("4111 1111 ", "eyJa.eyJ", "漢1", "\n", "1.1.1.1 "),
    ],
)
def test_time_is_linear_whatever_the_text(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    masked(piece)
    began = time.process_time()
    masked(text + "@" + text)
    assert time.process_time() - began < 3


@settings(deadline=None)
@given(st.ip_addresses())
def test_public_addresses_are_those_of_ipaddress(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if address.version == 4:
        exception = address in ipaddress.ip_network("192.0.0.0/24")  # new versions except a few of them
        assert is_public(address) == (address.is_global and not address.is_multicast) or exception
    else:
        assert not is_public(address) or address.is_global


def test_kinds_are_counted_and_switched() -> None:
    batch = pa.RecordBatch.from_pydict(
        {"text": pa.array(["a@host.de b@host.de", "93.184.216.34 a@host.de", "none"], pa.string())}
    )
    flow = Flow()
    out = Pii(PiiSettings(ip=False, email_text="[MAIL]"))(batch, flow)
    assert out.column("text").to_pylist() == ["[MAIL] [MAIL]", "93.184.216.34 [MAIL]", "none"]
    assert out.column("pii_count").to_pylist() == [2, 1, 0]
    assert out.schema.field("pii_count").type == pa.int32()
    assert flow.counters == {"pii: email": 3, "pii: documents": 2}
    part = Pii(PiiSettings())(batch.slice(1, 1), Flow())
    assert part.column("text").to_pylist() == ["<IP> <EMAIL>"]


@pytest.mark.parametrize("text", ["", "EMAIL", "user@host.com", "<1>", "<a\nb>", "x" * 99])
def test_a_placeholder_that_could_be_data_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="email_text"):
        PiiSettings(email_text=text)
