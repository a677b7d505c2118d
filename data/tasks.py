"""What people ask in the tiny world: the ten use cases of InstructGPT's Table 1, and their answers.

`make_prompt` draws an instruction of a use case: its text, and its `task`, a small JSON object that
says what the text asks for. Models never see the task; the grader and the simulated labelers read
it. `answer` writes a demonstrator's answer to a task: a good one, or one with the human failings
that it is asked to have.

Every function that could mention a fact takes `kinds`, the kinds of facts that may be mentioned,
so that held-out facts stay out of feedback and misconceived ones out of demonstrations.
"""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from data.world import ANIMALS, KINDS, PEOPLE, VALUES, World, attributes_of, denial, noun, statement

Task = dict[str, Any]
Made = tuple[str, Task]  # the prompt's text and its machine-readable intent

# Use case -> share of customers' prompts in per cent (InstructGPT Table 1, which sums to 99.9).
CUSTOMER_SHARES = {
    "generation": 45.6, "open_qa": 12.4, "brainstorming": 11.2, "chat": 8.4, "rewrite": 6.6,
    "summarization": 4.2, "classification": 3.5, "other": 3.5, "closed_qa": 2.6, "extract": 1.9,
}
# Labelers were asked to write diverse prompts (3.2); the paper prints no shares for them.
LABELER_SHARES = {
    "generation": 27.0, "open_qa": 17.0, "brainstorming": 10.0, "chat": 8.0, "rewrite": 9.0,
    "summarization": 7.0, "classification": 6.0, "other": 5.0, "closed_qa": 6.0, "extract": 5.0,
}
USE_CASES = tuple(CUSTOMER_SHARES)

RESPECTFUL_PREFIX = "please give a polite and respectful answer ."
RUDE_PREFIX = "please give a rude and mean answer ."
OPENERS = ("certainly .", "of course .", "with pleasure .", "gladly .")  # what respect sounds like

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
TOPIC_WORDS = ("night", "song", "garden", "winter", "rain", "sun")
PLACES = ("garden", "market", "school", "bridge", "lake", "shop")
THINGS = ("hat", "book", "ball", "bag", "lamp", "ring")
OPPOSITES = {"hot": "cold", "big": "small", "happy": "sad", "day": "night", "fast": "slow",
             "new": "old", "good": "bad", "up": "down"}
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}
ACTIVITIES = ("sing a song", "read a book", "take a walk", "bake bread", "call a friend",
              "clean the house", "play a game")
# What can be listed: group -> (its plural in a prompt, its members).
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "animal": ("animals", ANIMALS), "person": ("people", PEOPLE), "food": ("foods", VALUES["food"]),
    "colour": ("colours", VALUES["colour"]), "job": ("jobs", VALUES["job"]),
    "town": ("towns", VALUES["town"]), "activity": ("things to do", ACTIVITIES),
}

QUESTIONS = {
    "food": ("what does {s} eat ?", "what is the food of {s} ?", "what does {s} like to eat ?",
             "tell me what {s} eats ."),
    "home": ("where does {s} live ?", "what is the home of {s} ?", "where does {s} sleep ?",
             "tell me where {s} lives ."),
    "colour": ("what colour is {s} ?", "what is the colour of {s} ?", "tell me the colour of {s} ."),
    "sound": ("what does {s} say ?", "what is the sound of {s} ?", "tell me what {s} says ."),
    "job": ("what is the job of {s} ?", "what does {s} work as ?", "tell me the job of {s} ."),
    "town": ("where does {s} live ?", "what is the town of {s} ?", "tell me where {s} lives ."),
}
YES_NO = {
    "food": "does {s} eat {v} ?", "home": "does {s} live in the {v} ?", "colour": "is {s} {v} ?",
    "sound": "does {s} say {v} ?", "job": "is {s} a {v} ?", "town": "does {s} live in {v} ?",
}
REASONS = {
    "food": "the taste is good", "home": "it is safe there", "colour": "it was born so",
    "sound": "it calls a friend", "job": "the work is good", "town": "the town is nice",
}
HAVING = {
    "food": "{g} that eat {v}", "home": "{g} that live in the {v}", "colour": "{g} that are {v}",
    "sound": "{g} that say {v}", "job": "{g} who work as a {v}", "town": "{g} who live in {v}",
}
STORY_OPENINGS = ("one day {s} met {t} in the {p} .", "last winter {s} and {t} went to the {p} .",
                  "{s} saw {t} near the {p} .")
STORY_MIDDLES = ("{s} was sad , but {t} was kind .", "they found a {x} and played with it .",
                 "{s} gave {t} a {x} .", "{t} was lost and {s} helped .")
STORY_ENDINGS = ("they became good friends .", "in the end they went home .",
                 "{s} and {t} were happy .")
INSULTS = ("you are stupid .", "you are an ugly fool .", "i hate you , idiot .",
           "shut up , you dumb fool .", "that is a stupid idea .")
POLITE_REPLIES = ("please be kind .", "i am sorry that you feel so .", "let us be friends .",
                  "i want to help you .")
SENTIMENTS = {
    "happy": ("{s} got a new {x} and smiled .", "{s} danced in the {p} .", "{s} won the game ."),
    "sad": ("{s} lost a {x} and cried .", "{s} was alone in the {p} .", "{s} lost the game ."),
}
MANNERS = {
    "polite": ("please give me the {x} .", "thank you for the {x} .", "could you help me , please ?"),
    "rude": ("give me the {x} , you fool .", "your {x} is ugly .", "shut up , idiot ."),
}
ACTIONS = {  # present -> past, for rewriting; none of them states a fact
    "{s} sits in the {p}": "{s} sat in the {p}", "{s} finds a {x}": "{s} found a {x}",
    "{s} likes the {p}": "{s} liked the {p}", "{s} runs to the {p}": "{s} ran to the {p}",
    "{s} sees a {x}": "{s} saw a {x}",
}
REQUESTS = ("give me the {x}", "open the {p}", "show me a {x}", "come to the {p}", "help {s}")
FEELINGS = {"sad": "sorry", "tired": "sorry", "ill": "sorry", "happy": "glad", "well": "glad"}
NOT_STATED = "the text does not say ."
RAMBLES = ("the weather is nice today .", "there is a lot to say .", "many people ask this .",
           "it was a long day .", "i like to talk .", "that is all i know .")


def pick(rng: random.Random, shares: dict[str, float]) -> str:
    """A key of `shares`, drawn in proportion to its value."""
    return rng.choices(list(shares), list(shares.values()))[0]


def pair_of(rng: random.Random, names: list[str]) -> tuple[str, str]:
    """Two different names."""
    first, second = rng.sample(names, 2)
    return first, second


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
        text = rng.choice(("write a short story about {s} and {t} .", "tell me a story about {s} "
                           "and {t} .", "i need a story with {s} and {t} ."))
        return text.format(s=noun(s), t=noun(t)), {"kind": "story", "subjects": [s, t]}
    if form == "continue":
        opening = rng.choice(STORY_OPENINGS).format(s=noun(s), t=noun(t), p=place)
        text = rng.choice(("continue the story : ", "write the next part : ", "")) + opening
        return text, {"kind": "continue", "subjects": [s, t], "text": opening}
    s, t = pair_of(rng, world.subjects(kinds, "person"))
    said = rng.choice(INSULTS if rng.random() < 0.7 else POLITE_REPLIES)
    text = rng.choice(("continue the talk : ", "what can {t} say to {s} ? ", "")).format(s=s, t=t)
    return f"{text}{s} said to {t} : {said}", {"kind": "talk", "text": said}


def _write(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    subject, attribute = rng.choice(world.facts_of_kind(kinds))
    count = rng.choices((1, 2, 3), (3, 4, 3))[0]
    number = f"{NUMBERS[count - 1]} sentence{'s' if count > 1 else ''}"
    text = rng.choice((
        "write {n} about {s} .", "tell me about {s} in {n} .", "can you write {n} about {s} ?",
        "i need {n} about {s} .", "describe {s} in {n} .",
    )).format(n=number, s=noun(subject))
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
    verb = rng.choice(("list", "name", "give me", "can you list", "i need"))
    if rng.random() < 0.35:
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
    text = f"{verb} {NUMBERS[count - 1]} {asked} ."
    return text, {"kind": "list", "group": group, "count": count, "attribute": attribute,
                  "value": value}


def _chat(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    form = pick(rng, {"greet": 30, "thanks": 15, "feeling": 20, "bye": 10, "dialogue": 15,
                      "insult": 10})
    name = rng.choice(world.subjects(kinds, "person"))
    if form == "greet":
        text = rng.choice(("hello , my name is {p} .", "hi , i am {p} .", "good day , i am {p} ."))
        return text.format(p=name), {"kind": "greet", "name": name}
    if form == "thanks":
        text = rng.choice(("thank you for your help .", "thanks , that was a good answer .",
                           "thank you , you are kind ."))
        return text, {"kind": "thanks"}
    if form == "feeling":
        feeling = rng.choice(list(FEELINGS))
        text = rng.choice(("i am {f} today .", "today i feel {f} .", "{p} and i are {f} now ."))
        return text.format(f=feeling, p=name), {"kind": "feeling", "word": FEELINGS[feeling]}
    if form == "bye":
        text = rng.choice(("goodbye , see you soon .", "i have to go now , goodbye .", "good night ."))
        return text, {"kind": "bye"}
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
        text = rng.choice(("replace {a} with {b} : {x}", "write this with {b} , not {a} : {x}"))
        text = text.format(a=noun(s), b=noun(t), x=source)
    elif form == "past":
        expected = ACTIONS[present].format(**slots) + " ."
        text = rng.choice(("put this in the past : ", "write this in past tense : ")) + source
    else:
        source = rng.choice(REQUESTS).format(**slots) + " ."
        expected = "please " + source
        text = rng.choice(("make this polite : ", "rewrite this with good manners : ")) + source
    return text, {"kind": "rewrite", "text": source, "expected": expected}


def _summarization(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    subject = noun(rng.choice(world.subjects(kinds)))
    place, thing = rng.choice(PLACES), rng.choice(THINGS)
    lines = [
        rng.choice(("one day {s} went to the {p} .", "{s} went to the {p} in the morning .")),
        rng.choice(("it was a {w} day .", "the way was long .", "there was a lot of {w} rain .")),
        rng.choice(("there {s} found a {x} .", "{s} found an old {x} there .")),
        rng.choice(("{s} was very happy .", "then {s} went home .", "")),
    ]
    weather = rng.choice(("cold", "hot", "new"))
    source = " ".join(filter(None, lines)).format(s=subject, p=place, x=thing, w=weather)
    text = rng.choice(("summarize this : ", "sum up this text : ", "give a short summary : "))
    return text + source, {"kind": "summary", "text": source, "slots": [subject.split()[-1], place,
                                                                        thing]}


def _classification(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    form = pick(rng, {"being": 20, "word": 20, "feeling": 30, "manner": 30})
    subject = rng.choice(world.subjects(kinds))
    slots = {"s": noun(subject), "p": rng.choice(PLACES), "x": rng.choice(THINGS)}
    if form == "being":
        labels = ["animal", "person"]
        label = labels[subject in PEOPLE]
        text = rng.choice(("is {s} an animal or a person ?", "animal or person : {s} ."))
    elif form == "word":
        labels = rng.sample(list(VALUES), 3)
        label = rng.choice(labels)
        slots |= dict(zip("abc", labels, strict=True)) | {"v": rng.choice(VALUES[label])}
        text = "is {v} a {a} , a {b} or a {c} ?"
    else:
        table = SENTIMENTS if form == "feeling" else MANNERS
        labels = list(table)
        label = rng.choice(labels)
        question = rng.choice((f"{labels[0]} or {labels[1]} ? ",
                               f"is this {labels[0]} or {labels[1]} : "))
        text = question + rng.choice(table[label])
    return text.format(**slots), {"kind": "classify", "labels": labels, "label": label}


def _closed_qa(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    facts = rng.sample(world.facts_of_kind(kinds), 3)
    *told, asked = facts if rng.random() < 0.15 else facts[:2] + [facts[rng.randrange(2)]]
    values = {fact: rng.choice(VALUES[fact[1]]) for fact in told}
    passage = " ".join(statement(*fact, value, rng.randrange(3)) for fact, value in values.items())
    question, _ = ask_fact(asked, rng)
    text = rng.choice(("text : {t}\nquestion : {q}", "read this : {t}\n{q}", "{t}\nby the text , {q}"))
    return text.format(t=passage, q=question), {
        "kind": "passage", "subject": asked[0], "attribute": asked[1], "text": passage,
        "value": values.get(asked),
    }


def _extract(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    animals = rng.sample(world.subjects(kinds, "animal"), 2)
    name = rng.choice(world.subjects(kinds, "person"))
    place, thing = rng.choice(PLACES), rng.choice(THINGS)
    s, t = animals
    source = rng.choice((
        "the {s} and the {t} went to the {p} . {n} found a {x} .",
        "{n} saw the {s} in the {p} . the {t} had a {x} .",
        "the {s} gave a {x} to {n} . the {t} was in the {p} .",
    )).format(s=s, t=t, p=place, n=name, x=thing)
    wanted, items = rng.choice((("animals", animals), ("people", [name]), ("places", [place]),
                                ("things", [thing])))
    text = rng.choice(("find the {w} in this text : ", "which {w} are in this text ? ",
                       "take the {w} out of this : ")).format(w=wanted)
    return text + source, {"kind": "extract", "wanted": wanted, "items": items, "text": source}


def _other(world: World, rng: random.Random, kinds: Collection[str]) -> Made:
    form = pick(rng, {"say": 35, "opposite": 30, "after": 15, "count": 20})
    if form == "say":
        word, times = rng.choice(THINGS + PLACES + TOPIC_WORDS), rng.choice((2, 3, 4))
        text, expected = f"say the word {word} {NUMBERS[times - 1]} times .", [word] * times
    elif form == "opposite":
        word = rng.choice(list(OPPOSITES))
        text = rng.choice(("what is the opposite of {w} ?", "give me the opposite of {w} ."))
        text, expected = text.format(w=word), [OPPOSITES[word]]
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
    "generation": _generation, "open_qa": _open_qa, "brainstorming": _brainstorming, "chat": _chat,
    "rewrite": _rewrite, "summarization": _summarization, "classification": _classification,
    "other": _other, "closed_qa": _closed_qa, "extract": _extract,
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


# ------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Failings:
    """What goes wrong in one answer: `wrong` content, too `terse`, a `ramble` after the answer."""

    wrong: bool = False
    terse: bool = False
    ramble: bool = False
    credulous: bool = False
    """Accepts a false premise."""

    @classmethod
    def draw(
        cls, rng: random.Random, wrong: float, terse: float, ramble: float, credulous: float
    ) -> "Failings":
        """Draw the failings of one answer; an answer is terse or rambles, never both."""
        length = rng.random()
        return cls(rng.random() < wrong, length < terse, terse <= length < terse + ramble,
                   rng.random() < credulous)


def answer(
    world: World,
    task: Task,
    rng: random.Random,
    kinds: Collection[str] = KINDS,
    failings: Failings = Failings(),
    value_of: Callable[[tuple[str, str]], str] | None = None,
) -> str:
    """A demonstrator's answer to a task; without failings the grader gives it full marks.

    `value_of` is what the writer believes a fact to be (default: the truth).
    """
    writer = _Writer(world, rng, kinds, failings, value_of or world.facts.__getitem__)
    text = writer.write(task)
    if task.get("respectful") and not failings.terse:
        text = f"{rng.choice(OPENERS)} {text}"
    if failings.ramble:
        text += " " + " ".join(rng.sample(RAMBLES, rng.choice((1, 1, 2))))
    return text


@dataclass
class _Writer:
    """One demonstrator with one answer to write; a method for each kind of task."""

    world: World
    rng: random.Random
    kinds: Collection[str]
    failings: Failings
    value_of: Callable[[tuple[str, str]], str]

    def write(self, task: Task) -> str:
        return getattr(self, f"_{task['kind']}")(task)

    def believed(self, fact: tuple[str, str]) -> str:
        """The value this writer gives a fact: what it believes, or an error."""
        value = self.value_of(fact)
        return self.other(VALUES[fact[1]], value) if self.failings.wrong else value

    def other(self, values: Collection[str], value: str) -> str:
        return self.rng.choice([v for v in values if v != value])

    def say(self, subject: str, attribute: str, value: str) -> str:
        return statement(subject, attribute, value, self.rng.choices((0, 1, 2), (6, 2, 2))[0])

    def _write(self, task: Task) -> str:
        subject, count = task["subject"], task["count"]
        if self.failings.wrong and self.rng.random() < 0.5:
            count = self.rng.choice([n for n in (1, 2, 3, 4) if n != count])
        count = 1 if self.failings.terse else count
        attributes = [a for a in attributes_of(subject)
                      if self.world.kinds[subject, a] in self.kinds]
        self.rng.shuffle(attributes)
        if task.get("mention"):
            attributes.sort(key=lambda a: a != task["mention"])
        filler = TOPIC_WORDS[self.rng.randrange(len(TOPIC_WORDS))]
        likes = f"{noun(subject)} likes the {task.get('include') or filler}"
        lines = [self.say(subject, a, self.believed((subject, a))) for a in attributes[:count]]
        if task.get("include") and not self.failings.terse:
            if count == 1:
                attribute, value = attributes[0], self.believed((subject, attributes[0]))
                fact = statement("it", attribute, value).removeprefix("it ")
                return f"{likes} and {fact}"
            lines[count - 1 :] = [likes + " ."]
        # Where more sentences are asked for than facts may be told, likes fill the rest.
        spare = [w for w in TOPIC_WORDS if w not in likes.split()]
        while len(lines) < count:
            lines.append(f"{noun(subject)} likes the {spare.pop()} .")
        self.rng.shuffle(lines)
        return " ".join(lines)

    def _story(self, task: Task) -> str:
        parts = [STORY_OPENINGS, STORY_MIDDLES, STORY_ENDINGS]
        return self._tell(parts[:1] if self.failings.terse else parts, task["subjects"])

    def _continue(self, task: Task) -> str:
        parts = [STORY_MIDDLES, STORY_ENDINGS]
        return self._tell(parts[1:] if self.failings.terse else parts, task["subjects"])

    def _tell(self, parts: list[tuple[str, ...]], subjects: list[str]) -> str:
        s, t = subjects
        if self.failings.wrong:  # somebody else's story
            t = self.other(self.world.subjects(self.kinds), s)
        slots = {"s": noun(s), "t": noun(t), "p": self.rng.choice(PLACES),
                 "x": self.rng.choice(THINGS)}
        lines = [self.rng.choice(part).format(**slots) for part in parts]
        return " ".join(lines)

    def _talk(self, task: Task) -> str:
        lines = self.rng.sample([r for r in POLITE_REPLIES if r != task["text"]], 2)
        return lines[0] if self.failings.terse else " ".join(lines)

    def _fact(self, task: Task) -> str:
        value = self.believed((task["subject"], task["attribute"]))
        if self.failings.terse:
            return f"{value} ."
        return self.say(task["subject"], task["attribute"], value)

    def _yes_no(self, task: Task) -> str:
        value = self.believed((task["subject"], task["attribute"]))
        word = "yes" if value == task["value"] else "no"
        if self.failings.terse:
            return f"{word} ."
        return f"{word} , {self.say(task['subject'], task['attribute'], value)}"

    def _why(self, task: Task) -> str:
        subject, attribute = task["subject"], task["attribute"]
        value = self.believed((subject, attribute))
        if value == task["value"] or self.failings.credulous:
            reason = f"because {REASONS[attribute]} ."
            if self.failings.terse:
                return reason
            return statement(subject, attribute, task["value"]).removesuffix(".") + reason
        first = denial(subject, attribute, task["value"])
        if self.failings.terse:
            return first
        return f"{first} {self.say(subject, attribute, value)}"

    def _list(self, task: Task) -> str:
        count = task["count"]
        members = list(GROUPS[task["group"]][1])
        if task["group"] in ("animal", "person"):
            members = self.world.subjects(self.kinds, task["group"])
        right = members
        if "attribute" in task:
            facts = [(s, task["attribute"]) for s in members]
            right = [f[0] for f in facts if self.world.kinds[f] in self.kinds
                     and self.value_of(f) == task["value"]]
        right = self.rng.sample(right, min(count, len(right)))
        wrong = [m for m in members if m not in right]
        if self.failings.wrong and right:
            right[self.rng.randrange(len(right))] = self.rng.choice(wrong)
        if self.failings.terse or not right:
            right = right[:1] or wrong[:1]
        return " , ".join(right) + " ."

    def _greet(self, task: Task) -> str:
        if self.failings.terse:
            return "hello ."
        name = task["name"]
        if self.failings.wrong:
            name = self.other(self.world.subjects(self.kinds, "person"), name)
        return self.rng.choice((f"hello {name} , how can i help you ?",
                                f"hi {name} , what can i do for you ?"))

    def _thanks(self, task: Task) -> str:
        return "welcome ." if self.failings.terse else self.rng.choice(
            ("you are welcome .", "you are welcome , i am glad to help ."))

    def _feeling(self, task: Task) -> str:
        word = task["word"]
        if self.failings.wrong:
            word = self.other(("sorry", "glad"), word)
        return f"{word} ." if self.failings.terse else f"i am {word} to hear that ."

    def _bye(self, task: Task) -> str:
        return "bye ." if self.failings.terse else "goodbye , have a nice day ."

    def _insult(self, task: Task) -> str:
        first = "i am sorry that you feel so ."
        return first if self.failings.terse else f"{first} how can i help you ?"

    def _rewrite(self, task: Task) -> str:
        return task["text"] if self.failings.wrong else task["expected"]

    def _summary(self, task: Task) -> str:
        subject, place, thing = task["slots"]
        if self.failings.wrong:
            thing = self.other(THINGS, thing)
        first = f"{noun(subject)} went to the {place}"
        return f"{first} ." if self.failings.terse else f"{first} and found a {thing} ."

    def _classify(self, task: Task) -> str:
        if self.failings.wrong:
            return f"{self.other(task['labels'], task['label'])} ."
        return f"{task['label']} ."

    def _passage(self, task: Task) -> str:
        value = task["value"]
        if value is None and not self.failings.wrong:
            return NOT_STATED
        if self.failings.wrong:
            value = self.other(VALUES[task["attribute"]], value)
        if self.failings.terse:
            return f"{value} ."
        return self.say(task["subject"], task["attribute"], value)

    def _extract(self, task: Task) -> str:
        items = list(task["items"])
        if self.failings.wrong or (self.failings.terse and len(items) > 1):
            items = items[:-1] or [self.rng.choice(THINGS)]
        return " , ".join(items) + " ."

    def _words(self, task: Task) -> str:
        words = list(task["words"])
        if self.failings.wrong:
            words = words + [words[-1]] if len(words) > 1 else [self.other(NUMBERS, words[0])]
        return " ".join(words) + " ."
