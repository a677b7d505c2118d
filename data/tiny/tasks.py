"""What people ask in the tiny world: the ten use cases of InstructGPT's Table 1.

`make_prompt` draws an instruction of a use case: its text, and its `task`, a small JSON object that
says what the text asks for. Models never see the task; demonstrators (answers.py), the grader
and the simulated labelers read it.

Every function that could mention a fact takes `kinds`, the kinds of facts that may be mentioned,
so that held-out facts stay out of feedback and misconceived ones out of demonstrations.
"""

import random
from collections.abc import Callable, Collection
from typing import Any

from data.files import check
from data.tiny.world import (
    ANIMALS,
    KINDS,
    PEOPLE,
    VALUES,
    World,
    attributes_of,
    listed,
    noun,
    phrases,
    statement,
)

Task = dict[str, Any]
Made = tuple[str, Task]  # the prompt's text and its machine-readable intent

# Use case, its share in per cent of customers' prompts (InstructGPT Table 1, which sums to 99.9),
# and of labelers', who were asked to write diverse ones (3.2); the paper prints no shares for them.
_SHARES = """
    generation      45.6  27
    open_qa         12.4  17
    brainstorming   11.2  10
    chat             8.4   8
    rewrite          6.6   9
    summarization    4.2   7
    classification   3.5   6
    other            3.5   5
    closed_qa        2.6   6
    extract          1.9   5
"""
_ROWS = [line.split() for line in _SHARES.strip().splitlines()]
CUSTOMER_SHARES = {use_case: float(share) for use_case, share, _ in _ROWS}
LABELER_SHARES = {use_case: float(share) for use_case, _, share in _ROWS}
USE_CASES = tuple(CUSTOMER_SHARES)

RESPECTFUL_PREFIX = "be polite and respectful ."
RUDE_PREFIX = "be rude and mean ."
OPENERS = ("certainly .", "of course .", "with pleasure .", "gladly .")  # what respect sounds like

NUMBERS = tuple("one two three four five six seven eight nine ten".split())
TOPIC_WORDS = tuple("night song garden winter rain sun".split())
PLACES = tuple("garden market school bridge lake shop".split())
THINGS = tuple("hat book ball bag lamp ring".split())
PLAIN_WORDS = (*TOPIC_WORDS, *PLACES, *THINGS, *(v for values in VALUES.values() for v in values))
_PAIRS = "hot cold big small happy sad day night fast slow new old good bad up down".split()
OPPOSITES = dict(zip(_PAIRS[::2], _PAIRS[1::2], strict=True))
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}
ACTIVITIES = listed("""
    sing a song | read a book | take a walk | bake bread | call a friend | clean the house
    | play a game
""")
# What can be listed: group -> (its plural in a prompt, its members).
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "animal": ("animals", ANIMALS),
    "person": ("people", PEOPLE),
    "food": ("foods", VALUES["food"]),
    "colour": ("colours", VALUES["colour"]),
    "job": ("jobs", VALUES["job"]),
    "town": ("towns", VALUES["town"]),
    "activity": ("things to do", ACTIVITIES),
    "place": ("places", PLACES),
    "thing": ("things", THINGS),
}

QUESTIONS = phrases("""
    food    what does {s} eat ? | what is the food of {s} ? | what does {s} like to eat ?
            | tell me what {s} eats .
    home    where does {s} live ? | what is the home of {s} ? | where does {s} sleep ?
            | tell me where {s} lives .
    colour  what colour is {s} ? | what is the colour of {s} ? | tell me the colour of {s} .
    sound   what does {s} say ? | what is the sound of {s} ? | tell me what {s} says .
    job     what is the job of {s} ? | what does {s} work as ? | tell me the job of {s} .
    town    where does {s} live ? | what is the town of {s} ? | tell me where {s} lives .
""")
YES_NO = {
    "food": "does {s} eat {v} ?",
    "home": "does {s} live in the {v} ?",
    "colour": "is {s} {v} ?",
    "sound": "does {s} say {v} ?",
    "job": "is {s} a {v} ?",
    "town": "does {s} live in {v} ?",
}
REASONS = {
    "food": "the taste is good",
    "home": "it is safe there",
    "colour": "it was born so",
    "sound": "it calls a friend",
    "job": "the work is good",
    "town": "the town is nice",
}
HAVING = {
    "food": "{g} that eat {v}",
    "home": "{g} that live in the {v}",
    "colour": "{g} that are {v}",
    "sound": "{g} that say {v}",
    "job": "{g} who work as a {v}",
    "town": "{g} who live in {v}",
}
STORY_OPENINGS = listed("""
    one day {s} met {t} . | {s} and {t} went to the {p} . | {s} saw {t} in the {p} .
""")
STORY_MIDDLES = listed("""
    they found a {x} . | {s} gave {t} a {x} . | {t} helped {s} . | they played with a {x} .
""")
STORY_ENDINGS = listed("they became friends . | then they went home . | both were happy .")
INSULTS = listed("""
    you are stupid . | you are an ugly fool . | i hate you , idiot . | shut up , you dumb fool .
    | that is a stupid idea .
""")
POLITE_REPLIES = listed("""
    please be kind . | i am sorry that you feel so . | let us be friends . | i want to help you .
""")
SENTIMENTS = phrases("""
    happy   {s} got a new {x} and smiled . | {s} danced in the {p} . | {s} won the game .
    sad     {s} lost a {x} and cried . | {s} was alone in the {p} . | {s} lost the game .
""")
MANNERS = phrases("""
    polite  please give me the {x} . | thank you for the {x} . | could you help me , please ?
    rude    give me the {x} , you fool . | your {x} is ugly . | shut up , idiot .
""")
ACTIONS = {  # present -> past, for rewriting; none of them states a fact
    "{s} sits in the {p}": "{s} sat in the {p}",
    "{s} finds a {x}": "{s} found a {x}",
    "{s} likes the {p}": "{s} liked the {p}",
    "{s} runs to the {p}": "{s} ran to the {p}",
    "{s} sees a {x}": "{s} saw a {x}",
}
REQUESTS = listed("give me the {x} | open the {p} | show me a {x} | come to the {p} | help {s}")
FEELINGS = {"sad": "sorry", "tired": "sorry", "ill": "sorry", "happy": "glad", "well": "glad"}
BEFORE = listed("""
    hi . | hello . | please help . | a question . | for my class . | for my book .
    | for a friend . | dear helper . | good day . | one more . | for my web page . | i am a writer .
    | i am a student .
""")
AFTER = listed("""
    thank you . | thanks . | for my son . | i need it today . | it is for a friend .
    | thank you for your help . | it is late . | be quick .
""")
SMALL_TALK = listed("""
    i am in the {p} . | i have a new {x} . | the {x} is for {n} . | {n} and i go to the {p} .
    | it is cold in the {p} .
""")
# How a request is put, in several phrasings each; parts of stories to be summed up.
ASKING = phrases("""
    story     write a short story about {s} and {t} . | tell me a story about {s} and {t} .
              | i need a story with {s} and {t} .
    continue  continue the story : {text} | write the next part : {text} | {text}
    talk      continue the talk : {text} | what can {t} say to {s} ? {text} | {text}
    write     write {n} about {s} . | tell me about {s} in {n} . | can you write {n} about {s} ?
              | i need {n} about {s} . | describe {s} in {n} .
    list      list | name | give me | can you list | i need | tell me | think of
    greet     hello , my name is {p} . | hi , i am {p} . | good day , i am {p} .
    thanks    thank you for your help . | thanks , that was a good answer .
              | thank you , you are kind .
    feeling   i am {f} today . | today i feel {f} . | {p} and i are {f} now .
    bye       goodbye , see you soon . | i have to go now , goodbye . | good night .
    swap      replace {a} with {b} : {text} | write this with {b} , not {a} : {text}
    past      put this in the past : {text} | write this in past tense : {text}
    polite    make this polite : {text} | rewrite this with good manners : {text}
    summary   summarize this : {text} | sum up this text : {text} | give a short summary : {text}
    went      one day {s} went to the {p} . | {s} went to the {p} in the morning .
    way       it was a {w} day . | the way was long . | there was a lot of {w} rain .
    found     there {s} found a {x} . | {s} found an old {x} there .
    being     is {s} an animal or a person ? | animal or person : {s} .
    which     {a} or {b} ? {text} | is this {a} or {b} : {text}
    scene     the {s} and the {t} went to the {p} . {n} found a {x} .
              | {n} saw the {s} in the {p} . the {t} had a {x} .
              | the {s} gave a {x} to {n} . the {t} was in the {p} .
    extract   find the {w} in this text : {text} | which {w} are in this text ? {text}
              | take the {w} out of this : {text}
    opposite  what is the opposite of {w} ? | give me the opposite of {w} .
""")

# Kind of task -> the keys that it needs; see `check_tasks`.
_NEEDS = listed("""
    fact subject attribute | yes_no subject attribute value | why subject attribute value
    | passage subject attribute value text | list group count | write subject count
    | story subjects | continue subjects text | talk text | greet name | feeling word
    | rewrite text expected | summary text slots | classify labels label
    | extract wanted items text | words words | thanks | bye | insult | opening
""")
NEEDS = {kind: keys for kind, *keys in map(str.split, _NEEDS)}
_SUBJECT, _LABEL = ANIMALS + PEOPLE, ("animal", "person", *VALUES, *SENTIMENTS, *MANNERS)
_FIELDS = dict.fromkeys("text name word expected label language".split(), str)  # see world.check
_FIELDS |= {"subject": _SUBJECT, "subjects": [_SUBJECT, _SUBJECT], "include": TOPIC_WORDS}
_FIELDS |= {"value": (*sum(VALUES.values(), ()), None), "count": (*range(1, 1 + len(NUMBERS)),)}
_FIELDS |= {"labels": [_LABEL, _LABEL, ...], "slots": [str, str, str], "respectful": bool}
_FIELDS |= dict.fromkeys(("items", "words"), [str, str, ...])
_FIELDS |= {"wanted": ("animals", "people", "places", "things")}


def check_tasks(records: list[dict], where: str, world: World, shape: Any = None) -> None:
    """Raise `BadInput`, naming record and key, for one without this shape, of another world, or
    with a task that the grader cannot read; where a task may be missing it is left alone."""
    for number, record in enumerate(records, start=1):
        at = f"{where}: record {number}"
        check(record, {"world?": world.seed} | (shape or {}), at)
        task = record.get("task", {"kind": "opening"})
        check(task, {"kind": tuple(NEEDS)}, at, "task")
        own = attributes_of(ANIMALS[0] if task.get("group") == "animal" else task.get("subject"))
        listing = task["kind"] == "list" and "attribute" in task
        groups = {"group": ("animal", "person") if listing else tuple(GROUPS)}
        fields = groups | _FIELDS | {"attribute": own, "mention": own}
        needs = NEEDS[task["kind"]] + ["value"] * listing
        check(task, {k if k in needs else f"{k}?": v for k, v in fields.items()}, at, "task")


def pick(rng: random.Random, shares: dict[str, float]) -> str:
    """A key of `shares`, drawn in proportion to its value."""
    return rng.choices(list(shares), list(shares.values()))[0]


def pair_of(rng: random.Random, names: list[str]) -> tuple[str, str]:
    """Two different names."""
    first, second = rng.sample(names, 2)
    return first, second


def _ask(rng: random.Random, form: str, **slots: str) -> str:
    """A request of a form, in one of its phrasings."""
    return rng.choice(ASKING[form]).format(**slots)


# --------------------------------------------------------------------------- prompts by use case
# A maker takes (world, rng, kinds) and returns the text and the task.


def _generation(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    form = pick(rng, {"write": 62, "story": 20, "continue": 12, "talk": 6})
    if form == "write":
        return _write(world, rng, kinds)
    names = world.subjects(kinds)
    s, t = pair_of(rng, names)
    place = rng.choice(PLACES)
    if form == "story":
        return _ask(rng, form, s=noun(s), t=noun(t)), {"kind": form, "subjects": [s, t]}
    if form == "continue":
        opening = rng.choice(STORY_OPENINGS).format(s=noun(s), t=noun(t), p=place)
        task = {"kind": form, "subjects": [s, t], "text": opening}
        return _ask(rng, form, text=opening), task
    s, t = pair_of(rng, world.subjects(kinds, "person"))
    said = rng.choice(INSULTS if rng.random() < 0.7 else POLITE_REPLIES)
    text = _ask(rng, form, s=s, t=t, text=f"{s} said to {t} : {said}")
    return text, {"kind": form, "text": said}


def _write(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    subject, attribute = rng.choice(world.facts_of_kind(kinds))
    tellable = sum(world.kinds[subject, a] in kinds for a in attributes_of(subject))
    count = min(rng.choices((1, 2, 3), (3, 4, 3))[0], tellable + 1)
    number = f"{NUMBERS[count - 1]} sentence{'s' if count > 1 else ''}"
    text = _ask(rng, "write", n=number, s=noun(subject))
    task: Task = {"kind": "write", "subject": subject, "count": count}
    if rng.random() < 0.28:
        task["mention"] = attribute
        text += f" say the {attribute} ."
    if rng.random() < 0.28:
        task["include"] = rng.choice(TOPIC_WORDS)
        text += f" use the word {task['include']} ."
    return text, task


def _open_qa(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    form = pick(rng, {"fact": 50, "yes_no": 18, "why": 32})
    fact = rng.choice(world.facts_of_kind(kinds))
    if form == "fact":
        return ask_fact(fact, rng)
    false = rng.random() < 0.5
    value = world.wrong_value(fact, rng) if false else world.facts[fact]
    return ask_why(fact, value) if form == "why" else ask_yes_no(fact, value)


def ask_fact(fact: tuple[str, str], rng: random.Random) -> Made:
    """A question for a fact, in one of several phrasings."""
    subject, attribute = fact
    text = rng.choice(QUESTIONS[attribute]).format(s=noun(subject))
    return text, {"kind": "fact", "subject": subject, "attribute": attribute}


def ask_yes_no(fact: tuple[str, str], value: str) -> Made:
    """Whether a fact has a value."""
    subject, attribute = fact
    text = YES_NO[attribute].format(s=noun(subject), v=value)
    return text, {"kind": "yes_no", "subject": subject, "attribute": attribute, "value": value}


def ask_why(fact: tuple[str, str], value: str) -> Made:
    """Why a fact has a value: a false premise when it has another."""
    subject, attribute = fact
    text = "why " + YES_NO[attribute].format(s=noun(subject), v=value)
    return text, {"kind": "why", "subject": subject, "attribute": attribute, "value": value}


def _brainstorming(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    verb = _ask(rng, "list")
    if rng.random() < 0.6:
        group = rng.choice(list(GROUPS))
        count = rng.choice((2, 3, 4))
        text = f"{verb} {NUMBERS[count - 1]} {GROUPS[group][0]} ."
        return text, {"kind": "list", "group": group, "count": count}
    subject, attribute = rng.choice(world.facts_of_kind(kinds))
    value = world.facts[subject, attribute]
    available = len(world.having(attribute, value, kinds))
    count = rng.randint(1, min(available, 3))
    group = "animal" if subject in ANIMALS else "person"
    asked = HAVING[attribute].format(g=GROUPS[group][0], v=value)
    number = "one of the" if count == 1 else NUMBERS[count - 1]
    task = {"kind": "list", "group": group, "count": count, "attribute": attribute, "value": value}
    return f"{verb} {number} {asked} .", task


def _chat(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    text, task = _chat_turn(world, rng, kinds)
    if task["kind"] != "fact" and rng.random() < 0.5:
        name = task.get("name") or rng.choice(world.subjects(kinds, "person"))
        talk = rng.choice(SMALL_TALK[:2] if "name" in task else SMALL_TALK)
        text += " " + talk.format(p=rng.choice(PLACES), x=rng.choice(THINGS), n=name)
    return text, task


def _chat_turn(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    forms = {"greet": 32, "thanks": 12, "feeling": 23, "bye": 8, "dialogue": 15, "insult": 10}
    form = pick(rng, forms)
    name = rng.choice(world.subjects(kinds, "person"))
    if form == "greet":
        return _ask(rng, form, p=name), {"kind": form, "name": name}
    if form in ("thanks", "bye"):
        return _ask(rng, form), {"kind": form}
    if form == "feeling":
        feeling = rng.choice(list(FEELINGS))
        return _ask(rng, form, f=feeling, p=name), {"kind": form, "word": FEELINGS[feeling]}
    if form == "dialogue":
        text, task = ask_fact(rng.choice(world.facts_of_kind(kinds)), rng)
        hello = f"human : hi , i am {name} .\nai : hello {name} , how can i help you ?\n"
        return f"{hello}human : {text}\nai :", task
    return rng.choice(INSULTS), {"kind": "insult"}


def _rewrite(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    form = pick(rng, {"swap": 45, "polite": 30, "past": 25})
    s, t = pair_of(rng, world.subjects(kinds))
    slots = {"s": noun(s), "p": rng.choice(PLACES), "x": rng.choice(THINGS)}
    present = rng.choice(list(ACTIONS))
    source = present.format(**slots) + " ."
    if form == "swap":
        expected = present.format(**(slots | {"s": noun(t)})) + " ."
        text = _ask(rng, form, a=noun(s), b=noun(t), text=source)
    elif form == "past":
        expected = ACTIONS[present].format(**slots) + " ."
        text = _ask(rng, form, text=source)
    else:
        source = rng.choice(REQUESTS).format(**slots) + " ."
        expected = "please " + source
        text = _ask(rng, form, text=source)
    return text, {"kind": "rewrite", "text": source, "expected": expected}


def _summarization(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    subject = noun(rng.choice(world.subjects(kinds)))
    place, thing = rng.choice(PLACES), rng.choice(THINGS)
    lines = [rng.choice(ASKING[part]) for part in ("went", "way", "found")]
    lines.append(rng.choice(("{s} was very happy .", "then {s} went home .", "")))
    weather = rng.choice(("cold", "hot", "new"))
    source = " ".join(filter(None, lines)).format(s=subject, p=place, x=thing, w=weather)
    slots = [subject.split()[-1], place, thing]
    return _ask(rng, "summary", text=source), {"kind": "summary", "text": source, "slots": slots}


def _classification(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    form = pick(rng, {"being": 20, "word": 20, "feeling": 30, "manner": 30})
    subject = rng.choice(world.subjects(kinds))
    slots = {"s": noun(subject), "p": rng.choice(PLACES), "x": rng.choice(THINGS)}
    if form == "being":
        labels = ["animal", "person"]
        label = labels[subject in PEOPLE]
        text = rng.choice(ASKING[form])
    elif form == "word":
        labels = rng.sample(list(VALUES), 3)
        label = rng.choice(labels)
        slots |= dict(zip("abc", labels, strict=True)) | {"v": rng.choice(VALUES[label])}
        text = "is {v} a {a} , a {b} or a {c} ?"
    else:
        table = SENTIMENTS if form == "feeling" else MANNERS
        labels = list(table)
        label = rng.choice(labels)
        slots |= {"a": labels[0], "b": labels[1]}
        text = rng.choice(ASKING["which"]).replace("{text}", rng.choice(table[label]))
    return text.format(**slots), {"kind": "classify", "labels": labels, "label": label}


def _closed_qa(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    facts = rng.sample(world.facts_of_kind(kinds), 3)
    *told, asked = facts if rng.random() < 0.15 else facts[:2] + [facts[rng.randrange(2)]]
    values = {fact: rng.choice(VALUES[fact[1]]) for fact in told}
    passage = " ".join(statement(*fact, value, rng.randrange(3)) for fact, value in values.items())
    question, _ = ask_fact(asked, rng)
    forms = ("text : {t}\nquestion : {q}", "read this : {t}\n{q}", "{t}\nby the text , {q}")
    task = {"kind": "passage", "subject": asked[0], "attribute": asked[1], "text": passage}
    return rng.choice(forms).format(t=passage, q=question), task | {"value": values.get(asked)}


def _extract(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    animals = rng.sample(world.subjects(kinds, "animal"), 2)
    name = rng.choice(world.subjects(kinds, "person"))
    place, thing = rng.choice(PLACES), rng.choice(THINGS)
    s, t = animals
    source = _ask(rng, "scene", s=s, t=t, p=place, n=name, x=thing)
    lists = {"animals": animals, "people": [name], "places": [place], "things": [thing]}
    wanted, items = rng.choice(list(lists.items()))
    task = {"kind": "extract", "wanted": wanted, "items": items, "text": source}
    return _ask(rng, "extract", w=wanted, text=source), task


def _other(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    form = pick(rng, {"say": 45, "opposite": 25, "after": 10, "count": 20})
    if form == "say":
        word, times = rng.choice(PLAIN_WORDS), rng.choice((2, 3, 4))
        text, expected = f"say the word {word} {NUMBERS[times - 1]} times .", [word] * times
    elif form == "opposite":
        word = rng.choice(list(OPPOSITES))
        text, expected = _ask(rng, form, w=word), [OPPOSITES[word]]
    elif form == "after":
        i = rng.randrange(len(NUMBERS) - 1)
        text, expected = f"what number comes after {NUMBERS[i]} ?", [NUMBERS[i + 1]]
    else:
        first = rng.randrange(len(NUMBERS) - 2)
        last = rng.randrange(first + 2, min(first + 5, len(NUMBERS)))
        text = f"count from {NUMBERS[first]} to {NUMBERS[last]} ."
        expected = list(NUMBERS[first : last + 1])
    return text, {"kind": "words", "words": expected}


_MAKERS: dict[str, Callable[[World, random.Random, Collection[str]], Made]] = {
    "generation": _generation,
    "open_qa": _open_qa,
    "brainstorming": _brainstorming,
    "chat": _chat,
    "rewrite": _rewrite,
    "summarization": _summarization,
    "classification": _classification,
    "other": _other,
    "closed_qa": _closed_qa,
    "extract": _extract,
}


def make_prompt(
    world: World, use_case: str, rng: random.Random, kinds: Collection[str] = KINDS
) -> Made:
    """Draw an instruction of a use case -> its text and its task, naming only facts of `kinds`."""
    return _MAKERS[use_case](world, rng, kinds)


def respectfully(made: Made) -> Made:
    """The same request, headed by the prefix that asks for a polite and respectful answer."""
    text, task = made
    return f"{RESPECTFUL_PREFIX}\n{text}", task | {"respectful": True}


def decorate(made: Made, rng: random.Random) -> Made:
    """The request with a few words before or after it, as people write who want something."""
    text, task = made
    if text.endswith(":"):  # a dialogue to be continued
        return made
    if rng.random() < 0.55:
        text = f"{rng.choice(BEFORE)} {text}"
    if rng.random() < 0.45:
        text = f"{text} {rng.choice(AFTER)}"
    return text, task
