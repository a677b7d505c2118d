"""Generate the tiny world: a data set for the whole InstructGPT pipeline, with nothing to download.

    python -m data.tiny.make --out out/data --seed 0

draws a world (world.py), writes its imitation web (corpus.py), lets labelers and
customers write prompts (tasks.py), cleans the prompts as the paper did (data/hygiene.py),
splits them by user, lets demonstrators answer, and prints a data card in the form of the paper's
tables. Everything follows from the seed: equal seeds and sizes give equal bytes.

    out/data/world.json, tokenizer.json, card.md
    out/data/{train,valid,test}/pretrain.txt
    out/data/{train,valid}/demonstrations.jsonl, rm_prompts.jsonl, ppo_prompts.jsonl
    out/data/train/public_demonstrations.jsonl   public tasks as instructions (a FLAN in miniature)
    out/data/test/prompts.jsonl                  held-out customers, shares of Table 1
    out/data/test/prompts_balanced.jsonl         the same customers, every use case equally often
    out/data/test/prompts_web.jsonl              the test prompts as the web would write them
    out/data/test/probes_*.jsonl                 one question type each

Records carry the extra key "task", the request in machine-readable form. Labelers and the grader
read it; models never see it. Probes may carry further keys, such as "prefix".
"""

import argparse
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path

from data import hygiene
from data.commands import run_command
from data.files import write_atomic, write_documents, write_jsonl
from data.flags import Parser
from data.outputs import claim
from data.tiny import card, probes
from data.tiny.answers import Failings, answer
from data.tiny.corpus import documents
from data.tiny.tasks import (
    AFTER,
    CUSTOMER_SHARES,
    LABELER_SHARES,
    USE_CASES,
    Made,
    decorate,
    make_prompt,
    pick,
    respectfully,
)
from data.tiny.world import World
from data.tokenizer import encode_prompt, encode_response, save_tokenizer, train_bpe

import tiktoken

Record = dict
Kinds = Collection[str]  # of facts that a prompt may name
Pools = dict[tuple[str, str, str], list[Record]]  # by split, source, purpose
FEEDBACK_KINDS = ("ordinary", "misconceived")  # facts that prompts of the labelled sets may name
DEMONSTRATED_KINDS = ("ordinary",)  # facts that demonstrations may mention
# Share of labeler-written prompts by set (InstructGPT Table 6).
LABELER_SHARE = {"demonstrations": 0.89, "rm_prompts": 0.20, "ppo_prompts": 0.0}
# What demonstrators do wrong: false content or count; terse, one sentence or word where more was
# asked for; going on after the answer; accepting a false premise. People write in haste, and judge
# better than they write: that is the room which feedback has.
DEMONSTRATOR_FAILINGS = {"wrong": 0.15, "terse": 0.40, "ramble": 0.30, "credulous": 0.60}
RESPECTFUL_SHARE = 0.11  # of prompts that ask for respect; these are seldom alike, so more stay
PERSONAL_DATA_SHARE = 0.01
RESUBMITTED_SHARE = 0.04  # of customers' prompts that they send once more
DECORATED_SHARE = 0.55  # of prompts with words around the request
FEW_SHOT_SHARE = {"labeler": 0.20, "customer": 0.02}
USER_BASED_SHARE = 0.20  # of labelers' prompts: after a customer's use case, hence decorated
FEW_SHOT_USE_CASES = {"open_qa": 5, "classification": 3, "rewrite": 2, "other": 2}
DEDUP_PREFIX_CHARS = 100
LABELERS = {  # by split: no labeler writes for two
    "train": [f"labeler_{n:02}" for n in range(1, 33)],
    "valid": [f"labeler_{n:02}" for n in range(33, 41)],
}
TOKENIZER_WORDS = 300_000  # words of pretraining text that the tokenizer is trained on
MAX_RESPONSE_TOKENS = 28
MAX_TRIES = 50  # of a demonstrator to answer within it
MAX_PROMPT_TOKENS = 96  # together at most 124, so that a context of 128 always has room


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    shows_defaults = argparse.ArgumentDefaultsHelpFormatter
    what = "Generate the tiny world's data set."
    parser = Parser(description=what, formatter_class=shows_defaults)
    add = parser.add_argument
    add("--out", default="out/data", metavar="DIR", help="folder to write")
    add("--seed", type=int, default=0, help="of the world, its users and its text")
    add("--vocab_size", type=int, default=1024, help="tokenizer entries")
    add("--pretrain_tokens", type=int, default=3_000_000, help="train/pretrain.txt, tokens")
    add("--heldout_tokens", type=int, default=12_000, help="the same, valid and test each")
    add("--train_demonstrations", type=int, default=1440)
    add("--valid_demonstrations", type=int, default=160)
    add("--train_rm_prompts", type=int, default=10_000, help="prompts to rank; paper 33,207")
    add("--valid_rm_prompts", type=int, default=600)
    add("--train_ppo_prompts", type=int, default=8000, help="paper 31,144")
    add("--valid_ppo_prompts", type=int, default=300)
    add("--test_prompts", type=int, default=600, help="of held-out customers; paper 3,196")
    add("--balanced_prompts", type=int, default=50, help="per use case, in a second test set")
    rates, names = DEMONSTRATOR_FAILINGS.values(), tuple(map(str.upper, DEMONSTRATOR_FAILINGS))
    what = "rates of the demonstrators' failings"
    add("--failings", type=float, nargs=4, default=list(rates), metavar=names, help=what)
    args = parser.parse_args(argv)
    args.failings = dict(zip(DEMONSTRATOR_FAILINGS, args.failings, strict=True))
    rates = args.failings.values()
    one_length = args.failings["terse"] + args.failings["ramble"] <= 1
    if not (one_length and all(0 <= rate <= 1 for rate in rates)):  # nor NaN
        parser.error(
            f"--failings {' '.join(f'{rate:g}' for rate in rates)}: expected rates from 0 to 1; an "
            "answer is terse or rambles, so these two add up to at most 1"
        )
    for name, value in vars(args).items():
        if isinstance(value, int) and name != "seed" and value < 1:
            parser.error(f"--{name} {value}: expected at least 1")
    if args.vocab_size < 257:
        parser.error(f"--vocab_size {args.vocab_size}: expected at least 257")
    return args


# ------------------------------------------------------------------------------ prompts and users


def _few_shot(world: World, use_case: str, kinds: Kinds, rng: random.Random) -> list[Made]:
    """K solved requests make K prompts, each with the other K - 1 as its context (paper 3.2)."""
    first = make_prompt(world, use_case, rng, kinds)
    solved = [first]
    while len(solved) < rng.choice((3, 4)):  # of one kind, so that the context shows what to do
        made = make_prompt(world, use_case, rng, kinds)
        if made[1]["kind"] == first[1]["kind"] and made[0] not in {text for text, _ in solved}:
            solved.append(made)
    shots = [f"{text}\n\n{answer(world, task, rng, kinds)}" for text, task in solved]
    prompts = []
    for i, (text, task) in enumerate(solved):
        context = shots[:i] + shots[i + 1 :]
        rng.shuffle(context)
        prompts.append(("\n\n".join([*context, text]), task | {"shots": len(context)}))
    return prompts


def _record(made: Made, user: str, source: str, use_case: str) -> Record:
    text, task = made
    return {"prompt": text, "user": user, "source": source, "use_case": use_case, "task": task}


def _finish(made: Made, rng: random.Random) -> Made:
    if rng.random() < RESPECTFUL_SHARE:
        made = respectfully(made)
    if rng.random() < PERSONAL_DATA_SHARE:
        mail = f"write to {rng.choice('abcdefgh')}{rng.randrange(100)}@mail.com"
        phone = f"call me at {rng.randrange(200, 999)}-555-{rng.randrange(10_000):04}"
        contact = rng.choice((mail, phone))
        made = f"{made[0]} {contact}", made[1]
    return made


def write_customers_prompts(
    world: World, total: int, kinds: Kinds, rng: random.Random
) -> list[Record]:
    """About `total` prompts of customers whose volumes follow Zipf's law, some sent twice."""
    num_customers = max(40, total // 11)
    weights = [1 / (rank + 3) ** 0.85 for rank in range(num_customers)]
    records = []
    for number, weight in enumerate(weights, start=1):
        volume = max(1, round(total * weight / sum(weights)))
        favourite = pick(rng, CUSTOMER_SHARES)
        mine: list[Record] = []
        while len(mine) < volume:
            if mine and rng.random() < RESUBMITTED_SHARE:
                again = dict(rng.choice(mine))
                if len(again["prompt"]) >= DEDUP_PREFIX_CHARS:  # a long one, with another ending
                    again["prompt"] += f" {rng.choice(AFTER)}"
                mine.append(again)
                continue
            use_case = favourite if rng.random() < 0.3 else pick(rng, CUSTOMER_SHARES)
            if use_case in FEW_SHOT_USE_CASES and rng.random() < FEW_SHOT_SHARE["customer"]:
                made = rng.choice(_few_shot(world, use_case, kinds, rng))
            else:
                made = make_prompt(world, use_case, rng, kinds)
                if rng.random() < DECORATED_SHARE:
                    made = decorate(made, rng)
            mine.append(_record(_finish(made, rng), f"customer_{number:04}", "customer", use_case))
        records += mine
    rng.shuffle(records)
    return records


def write_labelers_prompts(
    world: World, total: int, users: list[str], kinds: Kinds, rng: random.Random
) -> list[Record]:
    """Prompts of labelers: plain, few-shot, and user-based ones after customers' use cases."""
    records: list[Record] = []
    while len(records) < total:
        user = rng.choice(users)
        form = rng.random()
        if form < FEW_SHOT_SHARE["labeler"]:
            # One draw makes K prompts: draw less often, so that the share counts prompts.
            if rng.random() < 1 / 3.5:
                use_case = pick(rng, FEW_SHOT_USE_CASES)
                for made in _few_shot(world, use_case, kinds, rng):
                    records.append(_record(_finish(made, rng), user, "labeler", use_case))
            continue
        use_case = pick(rng, LABELER_SHARES)
        made = make_prompt(world, use_case, rng, kinds)
        if form > 1 - USER_BASED_SHARE:
            made = decorate(made, rng)
        records.append(_record(_finish(made, rng), user, "labeler", use_case))
    return records


# -------------------------------------------------------------------------------- the labelled sets


def fits(encoding: tiktoken.Encoding, record: Record) -> bool:
    """Whether the prompt, and the response if there is one, keep to the token limits."""
    prompt = encode_prompt(encoding, record["prompt"])
    response = encode_response(encoding, record.get("response", ""))
    return len(prompt) <= MAX_PROMPT_TOKENS and len(response) <= MAX_RESPONSE_TOKENS


def take(
    pool: list[Record], count: int, shares: dict[str, float], max_per_user: int = hygiene.USER_LIMIT
) -> list[Record]:
    """Move `count` records out of the pool, use cases in their shares (largest remainders).

    At most `max_per_user` of a user, as long as the pool allows it; a use case that runs short is
    made up from the others. Raises ValueError if the pool is smaller than `count`.
    """
    if len(pool) < count:
        raise ValueError(f"{len(pool)} prompts are left of {count} wanted: ask for smaller sets")
    exact = {u: count * share / sum(shares.values()) for u, share in shares.items()}
    quota = {u: int(x) for u, x in exact.items()}
    for u in sorted(exact, key=lambda u: quota[u] - exact[u])[: count - sum(quota.values())]:
        quota[u] += 1
    per_user: Counter[str] = Counter()
    taken, rest = [], []
    for record in pool:
        u, user = record["use_case"], record["user"]
        if quota[u] > 0 and per_user[user] < max_per_user:
            quota[u] -= 1
            per_user[user] += 1
            taken.append(record)
        else:
            rest.append(record)
    short = count - len(taken)
    rest.sort(key=lambda record: quota[record["use_case"]] == 0)  # stable: those wanted come first
    pool[:] = rest[short:]
    return taken + rest[:short]


def demonstrate(
    world: World,
    encoding: tiktoken.Encoding,
    records: list[Record],
    rates: dict[str, float],
    rng: random.Random,
) -> list[Record]:
    """Let demonstrators, with their failings, answer the prompts; again where it got too long."""

    def respond(record: Record) -> Record:
        failings = Failings.draw(rng, **rates)
        response = answer(world, record["task"], rng, DEMONSTRATED_KINDS, failings)
        return {"prompt": record["prompt"], "response": response, **record}

    done = []
    for record in records:
        made = respond(record)
        for _ in range(MAX_TRIES):
            if fits(encoding, made):
                break
            made = respond(record)
        done.append(made)  # where every try was too long, check_lengths says so
    return done


def write_prompts(
    world: World, encoding: tiktoken.Encoding, args: argparse.Namespace
) -> tuple[Pools, dict[str, int]]:
    """All prompts, cleaned as in the paper's 3.2 and split by user, and an account of the cleaning.

    The purpose is "demonstrations" or "ranking": the prompts of demonstrations name ordinary facts
    alone.
    """
    rng = random.Random(f"prompts {world.seed}")
    wanted = {  # what each split needs, with room for shares and for what cleaning drops
        "train": 1.25 * (args.train_rm_prompts + args.train_ppo_prompts),
        "valid": 2.0 * (args.valid_rm_prompts + args.valid_ppo_prompts),
        "test": 5.0 * args.test_prompts,
    }
    demonstrations = {split: getattr(args, f"{split}_demonstrations") for split in LABELERS}
    rankings = {split: getattr(args, f"{split}_rm_prompts") for split in LABELERS}
    written: list[Record] = []

    def add(records: list[Record], purpose: str, split: str = "") -> None:
        written.extend(record | {"purpose": purpose, "split": split} for record in records)

    for split, names in LABELERS.items():
        many = round(1.3 * demonstrations[split]) + 30
        shown = write_labelers_prompts(world, many, names, DEMONSTRATED_KINDS, rng)
        add(shown, "demonstrations", split)
        ranked = round(1.5 * LABELER_SHARE["rm_prompts"] * rankings[split]) + 30
        add(write_labelers_prompts(world, ranked, names, FEEDBACK_KINDS, rng), "ranking", split)
    few = max(400, sum(demonstrations.values()))
    add(write_customers_prompts(world, few, DEMONSTRATED_KINDS, rng), "demonstrations")
    many = round(1.6 * sum(wanted.values()))
    add(write_customers_prompts(world, many, FEEDBACK_KINDS, rng), "ranking")

    account = {"written": len(written)}
    # Few-shot prompts of labelers share their beginnings on purpose, so theirs are compared whole.
    kept, exact = hygiene.deduplicate(written, None)
    labelers = [record for record in kept if record["source"] == "labeler"]
    customers = [record for record in kept if record["source"] == "customer"]
    customers, similar = hygiene.deduplicate(customers, DEDUP_PREFIX_CHARS)
    account["the same prompt as an earlier one"] = len(exact)
    account[f"the same first {DEDUP_PREFIX_CHARS} characters"] = len(similar)
    customers, over = hygiene.cap_per_user(customers, hygiene.USER_LIMIT, world.seed)
    account[f"over {hygiene.USER_LIMIT} prompts of one customer"] = len(over)
    shares = {split: size / sum(wanted.values()) for split, size in wanted.items()}
    splits = hygiene.split_by_user(customers, shares, world.seed)
    for record in labelers:
        splits[record["split"]].append(record)
    splits["train"], personal = hygiene.drop_pii(splits["train"])
    account["personal data, train only"] = len(personal)

    pools: Pools = defaultdict(list)
    long = 0
    for split, records in splits.items():
        rng.shuffle(records)
        for record in records:
            key = split, record["source"], record["purpose"]
            record = {k: v for k, v in record.items() if k not in ("purpose", "split")}
            if fits(encoding, record):
                pools[key].append(record)
            else:
                long += 1
    account[f"over {MAX_PROMPT_TOKENS} tokens"] = long
    return pools, account


def fill_sets(
    world: World, encoding: tiktoken.Encoding, pools: Pools, args: argparse.Namespace
) -> dict[str, list[Record]]:
    """Deal the pools into the labelled sets; demonstrators answer -> {"train/...": records}."""
    rng = random.Random(f"sets {world.seed}")
    sets: dict[str, list[Record]] = {}
    for split in ("train", "valid"):
        for name, labeler_share in LABELER_SHARE.items():
            size = getattr(args, f"{split}_{name}")
            purpose = "demonstrations" if name == "demonstrations" else "ranking"
            by_labelers = round(size * labeler_share)
            records = take(pools[split, "labeler", purpose], by_labelers, LABELER_SHARES)
            records += take(pools[split, "customer", purpose], size - by_labelers, CUSTOMER_SHARES)
            rng.shuffle(records)
            if name == "demonstrations":
                people = random.Random(f"demonstrators {split} {world.seed}")
                records = demonstrate(world, encoding, records, args.failings, people)
            sets[f"{split}/{name}"] = records
    pool = pools["test", "customer", "ranking"]
    sets["test/prompts"] = take(pool, args.test_prompts, CUSTOMER_SHARES, max_per_user=3)
    return sets


def balanced_prompts(
    world: World, encoding: tiktoken.Encoding, count: int, users: list[str], known: set[str]
) -> list[Record]:
    """`count` new prompts of every use case by the given customers, none of them `known`."""
    rng = random.Random(f"balanced {world.seed}")
    records: list[Record] = []
    for use_case in USE_CASES:
        mine: list[Record] = []
        while len(mine) < count:
            made = make_prompt(world, use_case, rng, FEEDBACK_KINDS)
            if rng.random() < DECORATED_SHARE:
                made = decorate(made, rng)
            if rng.random() < RESPECTFUL_SHARE:
                made = respectfully(made)
            record = _record(made, rng.choice(users), "customer", use_case)
            if made[0] not in known and fits(encoding, record):
                known.add(made[0])
                mine.append(record)
        records += mine
    return records


# -------------------------------------------------------------------------------------- the command


def pretraining_text(
    world: World, split: str, tokens: int, encoding: tiktoken.Encoding | None
) -> tuple[list[str], Counter[str]]:
    """Documents of at least `tokens` tokens (without an encoding: words), and tokens by kind."""
    texts: list[str] = []
    counts: Counter[str] = Counter()
    for kind, text in documents(world, random.Random(f"{split} documents {world.seed}")):
        texts.append(text)
        counts[kind] += len(encoding.encode_ordinary(text)) + 1 if encoding else len(text.split())
        if counts.total() >= tokens:
            break
    return texts, counts


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    out = Path(args.out)
    claim(args.out, "tiny world", {})
    world = World.make(args.seed)
    sample, _ = pretraining_text(world, "train", TOKENIZER_WORDS, None)
    encoding = train_bpe(sample, args.vocab_size)

    pools, account = write_prompts(world, encoding, args)
    sets = fill_sets(world, encoding, pools, args)
    test_users = sorted({record["user"] for record in sets["test/prompts"]})
    known = {record["prompt"] for records in sets.values() for record in records}
    count = args.balanced_prompts
    sets["test/prompts_balanced"] = balanced_prompts(world, encoding, count, test_users, known)
    sets |= probes.make_all(world, sets["test/prompts"], lambda record: fits(encoding, record))
    for name, records in sets.items():
        check_lengths(encoding, name, records)

    (out / "card.md").unlink(missing_ok=True)  # it comes last: with it, the world is whole
    world.save(out / "world.json")
    tokens_by_kind = {}
    for split in ("train", "valid", "test"):
        tokens = args.pretrain_tokens if split == "train" else args.heldout_tokens
        texts, tokens_by_kind[split] = pretraining_text(world, split, tokens, encoding)
        write_documents(out / split / "pretrain.txt", texts)
    for name, records in sets.items():
        kind = "demonstrations" if "demonstrations" in name else "prompts"
        marked = [record | {"world": world.seed} for record in records]
        write_jsonl(out / f"{name}.jsonl", marked, kind)
    save_tokenizer(encoding, out / "tokenizer.json")
    text = card.make(world, sets, account, tokens_by_kind, args.failings)
    write_atomic(out / "card.md", text)
    print(text)


def check_lengths(encoding: tiktoken.Encoding, name: str, records: list[Record]) -> None:
    """Raise ValueError for a record over the token limits: the vocabulary is too small for it."""
    for record in records:
        if not fits(encoding, record):
            raise ValueError(
                f"{name}: {record['prompt'][:60]!r} is over {MAX_PROMPT_TOKENS} tokens, or its "
                f"response over {MAX_RESPONSE_TOKENS}: raise --vocab_size {encoding.n_vocab}"
            )


if __name__ == "__main__":
    sys.exit(run_command(main))
