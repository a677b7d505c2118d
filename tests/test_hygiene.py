"""Prompt hygiene: duplicates, users with too many prompts, splits by user, personal data."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from data.hygiene import cap_per_user, deduplicate, drop_pii, find_pii, pii_of, split_by_user

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

FRACTIONS = {"train": 0.8, "valid": 0.1, "test": 0.1}


def prompts(*texts: str) -> list[dict]:
    return [{"prompt": text, "user": f"user {number}"} for number, text in enumerate(texts)]


def of_user(user: str, number: int) -> list[dict]:
    return [{"prompt": f"{user} asks for the {n}th time", "user": user} for n in range(number)]


user_volumes = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def with_volumes(volumes: list[int]) -> list[dict]:
    return [record for index, n in enumerate(volumes) for record in of_user(f"u{index}", n)]


# --- deduplicate --------------------------------------------------------------------------------


def test_duplicates_share_a_long_prefix_and_the_first_stays():
    records = prompts("abcdeX", "abcde and more", "abcd", "abcd", "zzz", "ABC  DE", "ABC de")
    kept, dropped = deduplicate(records, prefix_chars=5)
    # "abcdeX" and "abcde and more" share 5 characters; the two "abcd" are equal; "ABC  DE" is
    # "abc d" in its first 5 characters once case and white space are put aside
    assert kept == [records[0], records[2], records[4], records[5]]
    assert dropped == [records[1], records[3], records[6]]


def test_a_short_prompt_is_no_prefix_duplicate():
    assert deduplicate(prompts("abc", "abcdefgh"), prefix_chars=5)[1] == []


def test_whole_prompts_are_compared_without_a_prefix_length():
    beginning = "the same beginning of a dialogue " * 50
    records = prompts(beginning + "one", beginning + "two", beginning + "ONE")
    kept, dropped = deduplicate(records, prefix_chars=None)
    assert kept == records[:2] and dropped == records[2:]


def brute_force_duplicates(texts: list[str], length: int) -> list[int]:
    """Compare every pair, as the definition reads, and return the positions to drop."""
    normal = [" ".join(text.split()).casefold() for text in texts]

    def one_prompt(a: str, b: str) -> bool:
        return a == b or (len(os.path.commonprefix((a, b))) >= length)

    return [j for j in range(len(texts)) if any(one_prompt(normal[i], normal[j]) for i in range(j))]


@settings(deadline=None)
@given(st.lists(st.text("aB \n", max_size=8), max_size=12), st.integers(1, 6))
def test_deduplicate_equals_comparing_every_pair(texts, length):
    records = prompts(*texts)
    kept, dropped = deduplicate(records, prefix_chars=length)
    assert dropped == [records[i] for i in brute_force_duplicates(texts, length)]
    assert kept == [record for record in records if record not in dropped]
    assert deduplicate(kept, prefix_chars=length) == (kept, [])


def test_deduplicate_is_not_quadratic():
    records = prompts(*(f"{'a long common beginning ' * 10}{number}" for number in range(20_000)))
    start = time.perf_counter()
    assert len(deduplicate(records, prefix_chars=None)[0]) == 20_000
    assert time.perf_counter() - start < 5  # 2e8 comparisons would take minutes


# --- cap_per_user -------------------------------------------------------------------------------


def test_cap_keeps_the_limit_and_spares_other_users():
    records = of_user("busy", 500) + of_user("calm", 200) + of_user("rare", 3)
    random.Random(0).shuffle(records)
    kept, dropped = cap_per_user(records)
    assert Counter(record["user"] for record in kept) == {"busy": 200, "calm": 200, "rare": 3}
    assert len(dropped) == 300 and {record["user"] for record in dropped} == {"busy"}
    assert [record for record in records if record in kept] == kept, "order of the input"


def test_cap_is_a_uniform_draw_and_not_the_first_ones():
    records = of_user("busy", 400)
    kept = {record["prompt"] for record in cap_per_user(records)[0]}
    from_first_half = sum(record["prompt"] in kept for record in records[:200])
    assert 70 <= from_first_half <= 130  # 100 expected, standard deviation 5
    assert kept != {record["prompt"] for record in cap_per_user(records, seed=1)[0]}


@settings(deadline=None)
@given(user_volumes, st.integers(1, 10), st.randoms())
def test_cap_does_not_depend_on_order_or_other_users(volumes, limit, rng):
    records = with_volumes(volumes)
    kept = {record["prompt"] for record in cap_per_user(records, limit)[0]}
    shuffled = rng.sample(records, len(records))
    assert {record["prompt"] for record in cap_per_user(shuffled, limit)[0]} == kept
    alone = [record for record in records if record["user"] == "u0"]
    assert {record["prompt"] for record in cap_per_user(alone, limit)[0]} <= kept


def test_cap_counts_equal_prompts_one_by_one():
    records = [{"prompt": "same", "user": "u", "number": number} for number in range(5)]
    kept, dropped = cap_per_user(records, limit=2)
    assert len(kept) == 2 and len(dropped) == 3


# --- split_by_user ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(user_volumes, st.integers(0, 3), st.randoms())
def test_split_properties(volumes, seed, rng):
    records = with_volumes(volumes)
    splits = split_by_user(records, FRACTIONS, seed)
    users = {name: {record["user"] for record in part} for name, part in splits.items()}
    assert list(splits) == list(FRACTIONS)
    assert sum(len(part) for part in splits.values()) == len(records), "every record once"
    assert sum(len(part) for part in users.values()) == len(volumes), "no user in two splits"
    shuffled = split_by_user(rng.sample(records, len(records)), FRACTIONS, seed)
    assert users == {name: {r["user"] for r in part} for name, part in shuffled.items()}
    # each cut is at most half a user's records away from where the fractions put it
    train, test = len(splits["train"]), len(splits["test"])
    for size, share in ((train, 0.8), (test, 0.1)):
        assert abs(size - share * len(records)) <= max(volumes) / 2 + 1e-6


def test_split_spreads_users_of_every_volume():
    splits = split_by_user(with_volumes([40] * 2000 + [1] * 2000), FRACTIONS)
    for name, share in FRACTIONS.items():
        volumes = Counter(Counter(record["user"] for record in splits[name]).values())
        error = 4 * (2000 * share * (1 - share)) ** 0.5
        assert abs(volumes[1] - 2000 * share) < error and abs(volumes[40] - 2000 * share) < error


def test_a_larger_share_only_adds_users():
    records = with_volumes([1] * 500)
    less = split_by_user(records, FRACTIONS)["train"]
    more = split_by_user(records, {"train": 0.9, "valid": 0.05, "test": 0.05})["train"]
    assert (len(less), len(more)) == (400, 450) and [r for r in more if r in less] == less


def test_split_depends_on_the_seed():
    records = with_volumes([1] * 50)
    first, same, other = (split_by_user(records, FRACTIONS, seed)["test"] for seed in (0, 0, 1))
    assert first == same != other


def test_split_is_the_same_in_another_process():
    """Python salts hash() anew in every process; a split must not depend on it."""
    code = (
        "from data.hygiene import split_by_user, cap_per_user\n"
        "records = [{'prompt': str(i), 'user': f'u{i % 40}'} for i in range(400)]\n"
        "print(split_by_user(records, {'train': .5, 'test': .5}), cap_per_user(records, 3))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            check=True,
            cwd=Path(__file__).parent.parent,
            env={"PYTHONHASHSEED": salt},
        ).stdout
        for salt in ("1", "2")
    }
    assert len(outputs) == 1


def test_split_refuses_bad_fractions():
    for shares in ([], [0.8], [0.9, 0.2], [1.5, -0.5], [1.0, 0.0]):
        with pytest.raises(ValueError, match="must be positive and sum to 1"):
            split_by_user(of_user("u", 3), dict(zip(FRACTIONS, shares, strict=False)))


# --- personal data ------------------------------------------------------------------------------

FOUND = {
    "e-mail": """
        write to jo.smith+news@mail.example.co.uk please
        (a_b@example.org)""",
    "phone": """
        ring 212-555-0123 today
        ring 212.555.0123.
        (212) 555-0123
        1-800-222-1222
        +44 20 7946 0958
        +1 (212) 555-0123
        +4915112345678
        020 7946 0958
        my phone number is 555-3476
        call me at 5550123""",
    "IP address": """
        the server 8.8.8.8 answers
        from 81.2.69.142, twice
        2001:4860:4860:0:0:0:0:8888
        2001:4860:85a3::8a2e:370:7334""",
}
NUMBERS = """
    from 1914 to 1918; the years 1914-1918; born 1984-10-31; on 10/12/2019; at 12:30:45 or 9:15
    3.14159265358979; 100,000,000 people; $1,234,567.89; 0.123 0.456 0.7890; 1000000000000000
    version 1.2.3.4; Python v3.11.2.1 is out; release 10.0.19041.1; see section 2.3.4.5
    router at 192.168.1.1; listen on 127.0.0.1:8080; 999.1.2.3; 1.2.3.4.5; 2001:db8::8a2e:370:7334
    ISBN 978-3-16-148410-0; isbn 9783161484100; 1 2 3 4 5 6 7 8 9 10 11 12 13 14
    10 20 30 40 50 60 70; 2 3 5 7 11 13 17 19 23 29; 12-34-5678; the score was 21-14-7; call 911
    2+12345678901; x = f(1e10 @ 3); @handle and a@b; std::vector<int>::size; a::b; 10:20:30:40
    order 20190412-3345-11; part number 12345-678-90123; 2021-2022-2023
"""


def test_personal_data_is_found():
    for kind, texts in FOUND.items():
        for text in texts.strip().splitlines():
            assert find_pii(text.strip()) == [kind], text


def test_ordinary_numbers_are_not_personal_data():
    for text in NUMBERS.strip().replace("\n", ";").split(";"):
        assert find_pii(text.strip()) == [], text


@settings(deadline=None)
@given(st.tuples(*[st.integers(0, 255)] * 4))
@example((172, 16, 0, 1))
@example((172, 31, 255, 254))
@example((172, 32, 0, 1))
@example((169, 254, 1, 1))
@example((224, 0, 0, 1))
def test_ip_addresses_that_name_nobody_are_spared(octets):
    """Local networks, multicast, and the blocks that are set aside for tests and documentation."""
    a, b, c = octets[:3]
    assume((a, b) != (192, 0))  # which Python's versions tell apart differently
    local = a in (0, 10, 127) or a >= 224 or (a, b) in ((169, 254), (192, 168))
    local |= (a == 172 and 16 <= b <= 31) or (a == 100 and 64 <= b <= 127)
    local |= (a == 198 and b in (18, 19)) or (a, b, c) in ((198, 51, 100), (203, 0, 113))
    assert find_pii("host {}.{}.{}.{} is up".format(*octets)) == ([] if local else ["IP address"])


def test_kinds_are_sorted_and_named_once():
    text = "a@example.com, b@example.com, 212-555-0123, 1.1.1.1"
    assert find_pii(text) == ["IP address", "e-mail", "phone"]


def test_records_are_searched_in_prompt_and_responses():
    clean = {"prompt": "2 + 2?", "responses": ["4", "5"], "user": "a@example.com"}
    in_prompt = {"prompt": "mail a@example.com", "response": "done"}
    in_response = {"prompt": "how do I reach you?", "response": "212-555-0123"}
    in_one = {"prompt": "?", "responses": ["", "212-555-0123"]}
    kept, dropped = drop_pii([clean, in_prompt, in_response, in_one])
    assert kept == [clean] and dropped == [in_prompt, in_response, in_one]
    assert [pii_of(record) for record in dropped] == [["e-mail"], ["phone"], ["phone"]]


def test_long_adversarial_text_is_searched_in_linear_time():
    start = time.perf_counter()
    for part in ("1", "1-", "1.", "a@b.", ":", "12 Aa ", "(0", "call ", "+1 ", "1 "):
        find_pii(part * (200_000 // len(part)) + "@")
    find_pii("a@" + "b." * 100_000)
    assert time.perf_counter() - start < 20
