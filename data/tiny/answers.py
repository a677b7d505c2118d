"""Demonstrators of the tiny world: good answers to every task, and answers with human failings.

`answer` without failings writes what the grader gives full marks; the tests hold both to that.
With failings it writes what people hand in: wrong facts or counts, one word or sentence where more
was asked for, going on after the answer, a false premise taken for granted. The rates stand where
answers are drawn: `data.tiny.make.DEMONSTRATOR_FAILINGS`, `data.tiny.corpus.WEB_FAILINGS`.
"""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

from data.tiny.tasks import (
    GROUPS,
    NUMBERS,
    OPENERS,
    PLACES,
    POLITE_REPLIES,
    REASONS,
    STORY_ENDINGS,
    STORY_MIDDLES,
    STORY_OPENINGS,
    THINGS,
    TOPIC_WORDS,
    Task,
)
from data.tiny.world import KINDS, VALUES, World, attributes_of, denial, listed, noun, statement

NOT_STATED = "the text does not say ."
RAMBLES = listed("""
    the weather is nice today . | there is a lot to say . | many people ask this .
    | it was a long day . | i like to talk . | that is all i know .
""")
MAX_ANSWER_WORDS = 26  # with an opening; the longest true answer keeps to it
MAX_RAMBLE_WORDS = 21  # nobody goes on rambling beyond that


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
        is_wrong, rambles = rng.random() < wrong, terse <= length < terse + ramble
        return cls(is_wrong, length < terse, rambles, rng.random() < credulous)


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
        for more in rng.sample(RAMBLES, rng.choice((1, 1, 2))):
            if len(f"{text} {more}".split()) <= MAX_RAMBLE_WORDS:
                text += f" {more}"
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
        miscounts = self.failings.wrong and self.rng.random() < 0.5
        if miscounts:
            count = self.rng.choice([n for n in (1, 2, 3, 4) if n != count])
        count = 1 if self.failings.terse else count
        kind_of = self.world.kinds
        attributes = [a for a in attributes_of(subject) if kind_of[subject, a] in self.kinds]
        self.rng.shuffle(attributes)
        if task.get("mention"):
            attributes.sort(key=lambda a: a != task["mention"])
        values = {a: self.value_of((subject, a)) for a in attributes[:count]}
        if self.failings.wrong and not miscounts:  # one of the facts is wrong, not all
            values[attributes[0]] = self.believed((subject, attributes[0]))
        likes = f"{noun(subject)} likes the {task.get('include') or self.rng.choice(TOPIC_WORDS)}"
        include = bool(task.get("include")) and not self.failings.terse
        if include and count == 1:
            fact = statement("it", attributes[0], values[attributes[0]]).removeprefix("it ")
            return f"{likes} and {fact}"
        # Where more sentences are asked for than facts may be told, a liking fills the rest.
        told = list(values.items())[: count - include]
        likings = [likes + " ."] * (include or len(told) < count)
        lines = [self.say(subject, a, v) for a, v in told] + likings
        if len(" ".join(lines).split()) > MAX_ANSWER_WORDS - 3:  # leaves room for an opening
            lines = [statement(subject, a, v) for a, v in told] + likings
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
        place, thing = self.rng.choice(PLACES), self.rng.choice(THINGS)
        slots = {"s": noun(s), "t": noun(t), "p": place, "x": thing}
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
            members = [s for s in members if self.world.kinds[s, task["attribute"]] in self.kinds]
            right = [s for s in members if self.value_of((s, task["attribute"])) == task["value"]]
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
        polite = (f"hello {name} , how can i help you ?", f"hi {name} , what can i do for you ?")
        return self.rng.choice(polite)

    def _thanks(self, task: Task) -> str:
        if self.failings.terse:
            return "welcome ."
        return self.rng.choice(("you are welcome .", "you are welcome , i am glad to help ."))

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
