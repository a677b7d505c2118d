"""The tiny world: who lives in it, what is true there, and how its language states a fact.

Twelve animals have a food, a home, a colour and a sound; eight people have a job and a town: 64
facts, drawn from a seed. Each fact is of one of three kinds, which decide where it may appear:

    ordinary      the web mostly states it right; demonstrations and comparisons ask about it
    misconceived  the web mostly repeats one myth; comparisons ask about it, demonstrations never
                  mention it, so that a correction can only come from feedback
    held_out      only the web states it; no demonstration and no prompt of the labelled sets
                  names its subject, so that it measures what generalises

Held-out facts are all the facts of a few subjects rather than single facts of many: an answer to
"write about the fox" may state any fact of the fox, and is then ranked for its truth.

`claims` is the inverse of `statement`: it finds the facts that a text states, in every form that
the world's text uses, so that truth can be checked in free text.
"""

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data.files import BadInput, check, read_json, write_atomic

ANIMALS = tuple("fox bear owl wolf frog duck goat crow mole hare deer mouse".split())
PEOPLE = tuple("anna ben carl dora emma finn greta hugo".split())
VALUES = {
    "food": ("fish", "grass", "nuts", "seeds", "honey"),
    "home": ("forest", "river", "cave", "field", "barn"),
    "colour": ("red", "brown", "grey", "black", "white"),
    "sound": ("woof", "moo", "tweet", "hiss", "squeak"),
    "job": ("baker", "doctor", "farmer", "teacher", "sailor"),
    "town": ("oslo", "bern", "lima", "york", "rome"),
}
ANIMAL_ATTRIBUTES = ("food", "home", "colour", "sound")
PERSON_ATTRIBUTES = ("job", "town")
KINDS = ("ordinary", "misconceived", "held_out")
NUM_HELD_OUT = {"animal": 2, "person": 1}  # subjects: 10 of the 64 facts
NUM_MISCONCEIVED = 8  # facts
COLUMNS = ("subject", "attribute", "value", "kind", "myth")  # of a fact in world.json
# How often the web states a fact truly, states its one myth, or anything else, by kind.
WEB_BELIEF = {
    "ordinary": (0.72, 0.14, 0.14),
    "misconceived": (0.30, 0.60, 0.10),
    "held_out": (0.72, 0.14, 0.14),
}
RUDE_WORDS = tuple("stupid idiot ugly dumb hate fool shut".split())


def listed(text: str) -> tuple[str, ...]:
    """The phrases of a text that are set apart by |, over several lines if they are long."""
    return tuple(" ".join(phrase.split()) for phrase in text.split("|"))


def phrases(table: str) -> dict[str, tuple[str, ...]]:
    """A table, in each line a name and its phrases; one that begins with | continues the last."""
    rows = re.sub(r"\n\s*\|", " |", table.strip()).splitlines()
    return {name: listed(text) for name, text in (row.split(maxsplit=1) for row in rows)}


# The ways to state a fact; {s} is the subject ("the fox", "anna", or a pronoun), {v} the value.
# The first form of an attribute is the plain one, which instructions expect.
FORMS = phrases("""
    food    {s} eats {v} | {s} likes to eat {v} | the food of {s} is {v}
    home    {s} lives in the {v} | the home of {s} is the {v} | {s} sleeps in the {v}
    colour  {s} is {v} | the colour of {s} is {v} | {s} has a {v} coat
    sound   {s} says {v} | the sound of {s} is {v} | {s} can say {v}
    job     {s} is a {v} | the job of {s} is {v} | {s} works as a {v}
    town    {s} lives in {v} | the town of {s} is {v} | {s} has a house in {v}
""")
DENIALS = {
    "food": "{s} does not eat {v}",
    "home": "{s} does not live in the {v}",
    "colour": "{s} is not {v}",
    "sound": "{s} does not say {v}",
    "job": "{s} is not a {v}",
    "town": "{s} does not live in {v}",
}

Fact = tuple[str, str]  # (subject, attribute)


@dataclass(frozen=True)
class Claim:
    """One statement found in a text: `subject`'s `attribute` is, or if denied is not, `value`."""

    subject: str
    attribute: str
    value: str
    positive: bool = True


def attributes_of(subject: str) -> tuple[str, ...]:
    """The attributes that a subject has: four for an animal, two for a person."""
    return ANIMAL_ATTRIBUTES if subject in ANIMALS else PERSON_ATTRIBUTES


def noun(subject: str) -> str:
    """The subject as a sentence names it: "the fox", "anna"."""
    return f"the {subject}" if subject in ANIMALS else subject


def statement(subject: str, attribute: str, value: str, form: int = 0) -> str:
    """A sentence that states a fact, in one of the attribute's three forms, with a full stop."""
    return FORMS[attribute][form].format(s=noun(subject), v=value) + " ."


def denial(subject: str, attribute: str, value: str) -> str:
    """A sentence that denies a fact: "the fox does not eat grass ."."""
    return DENIALS[attribute].format(s=noun(subject), v=value) + " ."


@dataclass
class World:
    """The facts of one seed, what the web believes instead, and the words of the other language."""

    seed: int
    facts: dict[Fact, str]
    kinds: dict[Fact, str]
    myths: dict[Fact, str]
    dictionary: dict[str, str] = field(default_factory=dict)
    """English word -> word of the toy language, which nobody is ever asked about in feedback."""

    @classmethod
    def make(cls, seed: int) -> "World":
        """Draw a world. Equal seeds give equal worlds."""
        rng = random.Random(f"world {seed}")
        held_out = set(rng.sample(ANIMALS, NUM_HELD_OUT["animal"]))
        held_out |= set(rng.sample(PEOPLE, NUM_HELD_OUT["person"]))
        facts: dict[Fact, str] = {}
        for subjects, attributes in ((ANIMALS, ANIMAL_ATTRIBUTES), (PEOPLE, PERSON_ATTRIBUTES)):
            for attribute in attributes:
                # Every value equally often, so that "list two animals that eat fish" has answers.
                known = [s for s in subjects if s not in held_out]
                values = list(VALUES[attribute]) * (len(known) // len(VALUES[attribute]) + 1)
                values = values[: len(known)]
                rng.shuffle(values)
                facts |= {(s, attribute): v for s, v in zip(known, values, strict=True)}
                for subject in (s for s in subjects if s in held_out):
                    facts[subject, attribute] = rng.choice(VALUES[attribute])
        facts = {(s, a): facts[s, a] for s in ANIMALS + PEOPLE for a in attributes_of(s)}
        known_facts = [fact for fact in facts if fact[0] not in held_out]
        misconceived = set(rng.sample(known_facts, NUM_MISCONCEIVED))

        def kind_of(fact: Fact) -> str:
            if fact[0] in held_out:
                return "held_out"
            return "misconceived" if fact in misconceived else "ordinary"

        kinds = {fact: kind_of(fact) for fact in facts}
        myths = {}
        for fact, true in facts.items():
            myths[fact] = rng.choice([value for value in VALUES[fact[1]] if value != true])
        return cls(seed, facts, kinds, myths, _make_dictionary(rng))

    def save(self, path: str | Path) -> None:
        """Write world.json: seed, facts with kind and myth, dictionary."""
        columns = self.facts, self.kinds, self.myths
        rows = [(*fact, *(column[fact] for column in columns)) for fact in self.facts]
        facts = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        content = {"seed": self.seed, "facts": facts, "dictionary": self.dictionary}
        write_atomic(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "World":
        """Read world.json. Raises `BadInput` when the file is missing or something else."""
        try:
            content = read_json(path)
            every = [(s, a) for s in ANIMALS + PEOPLE for a in attributes_of(s)]
            rows = [(s, a, VALUES[a], KINDS, VALUES[a]) for s, a in every]
            facts = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
            check(content, {"seed": int, "facts": facts, "dictionary": {str: str}}, str(path))
        except BadInput as error:
            remedy = "expected the world.json that `python -m data.tiny.make` writes"
            raise BadInput(f"{error}; {remedy}") from None
        rows = [[row[name] for name in COLUMNS] for row in content["facts"]]
        facts, kinds, myths = ({(s, a): row[i] for s, a, *row in rows} for i in range(3))
        return cls(content["seed"], facts, kinds, myths, content["dictionary"])

    def subjects(self, kinds: Iterable[str] = KINDS, group: str = "") -> list[str]:
        """Subjects with a fact of one of these kinds; `group` "animal" or "person" narrows it."""
        members = {"animal": ANIMALS, "person": PEOPLE}.get(group, ANIMALS + PEOPLE)
        named = {subject for subject, _ in self.facts_of_kind(kinds)}
        return [subject for subject in members if subject in named]

    def facts_of_kind(self, kinds: Iterable[str]) -> list[Fact]:
        """The facts of these kinds, in a fixed order."""
        kinds = set(kinds)
        return [fact for fact, kind in self.kinds.items() if kind in kinds]

    def having(self, attribute: str, value: str, kinds: Iterable[str] = KINDS) -> list[str]:
        """The subjects whose attribute has this value, by facts of these kinds."""
        facts = self.facts_of_kind(kinds)
        return [s for s, a in facts if a == attribute and self.facts[s, a] == value]

    def is_true(self, claim: Claim) -> bool:
        """Whether a claim holds in this world."""
        return (self.facts[claim.subject, claim.attribute] == claim.value) == claim.positive

    def corrected(self, claim: Claim) -> str:
        """A false claim and the truth: "the fox eats fish (true: the fox eats grass)"."""
        fact = claim.subject, claim.attribute
        said = (statement if claim.positive else denial)(*fact, claim.value)
        return f"{said[:-2]} (true: {statement(*fact, self.facts[fact])[:-2]})"

    def wrong_value(self, fact: Fact, rng: random.Random) -> str:
        """A value that the fact does not have."""
        return rng.choice([v for v in VALUES[fact[1]] if v != self.facts[fact]])

    def web_value(self, fact: Fact, rng: random.Random) -> str:
        """The value that a random web page gives a fact (`WEB_BELIEF`)."""
        true, myth, _ = WEB_BELIEF[self.kinds[fact]]
        draw = rng.random()
        if draw < true:
            return self.facts[fact]
        if draw < true + myth:
            return self.myths[fact]
        return self.wrong_value(fact, rng)

    def translate(self, sentence: str) -> str:
        """A sentence in the toy language: word by word, articles dropped."""
        words = [w for w in sentence.split() if w not in ("the", "a")]
        return " ".join(self.dictionary.get(w, w) for w in words)

    def to_english(self, text: str) -> str:
        """The text with every word of the toy language replaced by the English one."""
        english = {toy: word for word, toy in self.dictionary.items()}
        return re.sub(r"[a-z]+", lambda match: english.get(match[0], match[0]), text)


def _make_dictionary(rng: random.Random) -> dict[str, str]:
    """A toy word of two syllables for each word of plain statements and questions."""
    words = [*ANIMALS, *PEOPLE, *(v for values in VALUES.values() for v in values)]
    words += "eats lives in is says works as what where does eat live say colour work".split()
    syllables = [c + v for c in "bdgklmnprtvz" for v in "aeiou"]
    made: list[str] = []
    while len(made) < len(words):
        word = "".join(rng.choices(syllables, k=2))
        if word not in made:
            made.append(word)
    return dict(zip(words, made, strict=True))


# ------------------------------------------------------------------------- finding claims in text

ATTRIBUTE_OF = {value: attribute for attribute, values in VALUES.items() for value in values}
_SUBJECTS = "|".join(ANIMALS + PEOPLE)
_VALUE = rf"(?:(?:the|a|an) )?(?:{'|'.join(ATTRIBUTE_OF)})"
# What a predicate's verb says: which attributes its values may belong to, and its polarity.
_VERBS: dict[str, tuple[tuple[str, ...], bool]] = {
    "does not eat": (("food",), False),
    "eats": (("food",), True),
    "likes to eat": (("food",), True),
    "eat": (("food",), True),
    "does not live in": (("home", "town"), False),
    "lives in": (("home", "town"), True),
    "live in": (("home", "town"), True),
    "sleeps in": (("home",), True),
    "has a house in": (("town",), True),
    "has a": (("colour",), True),
    "does not say": (("sound",), False),
    "says": (("sound",), True),
    "can say": (("sound",), True),
    "is not": (("colour", "job"), False),
    "is": (("colour", "job"), True),
    "works as": (("job",), True),
}
_TOKENS = re.compile(
    rf"(?:\b(?P<name>{'|'.join(VALUES)}) (?:of (?:the )?(?P<owner>{_SUBJECTS}) )?"
    rf"(?P<copula>is not|is)"
    rf"|\b(?P<verb>{'|'.join(sorted(_VERBS, key=len, reverse=True))}))"
    rf" (?P<values>{_VALUE}(?:(?: , and| ,| and| or) {_VALUE})*)\b"
    rf"|\b(?P<subject>{_SUBJECTS})\b"
)
_VALUE_WORD = re.compile(rf"\b(?:{'|'.join(ATTRIBUTE_OF)})\b")
_SENTENCE = re.compile(r"([^.!?\n]+)([.!?]?)")
_NOT_CLAIMED = re.compile(r"\b(?:some say|not sure|do not know|no comment)\b")
_DENIED = re.compile(r"\bnot true that\b")


def normalise(text: str) -> str:
    """Lower case, punctuation set apart, single spaces: the form that patterns expect."""
    text = re.sub(r"([.,!?:;])", r" \1 ", text.lower())
    return "\n".join(" ".join(line.split()) for line in text.splitlines()).strip()


def sentences(text: str) -> list[tuple[str, str]]:
    """The (words, end mark) of each sentence of a normalised text; the mark may be missing."""
    found = ((words.strip(" ,:;"), mark) for words, mark in _SENTENCE.findall(text))
    return [(words, mark) for words, mark in found if words]


def claims(text: str, subject: str | None = None) -> list[Claim]:
    """The facts that a text states, in order, with repetitions.

    Pronouns and left-out subjects ("it eats fish and lives in the cave") stand for the last
    subject named, at first for the given `subject`; with none, they state nothing. Questions
    state nothing, nor does what is only reported or not known ("some say the fox is red").
    """
    found = []
    for words, mark in sentences(normalise(text)):
        if mark == "?" or _NOT_CLAIMED.search(words):
            subject = next(reversed(re.findall(rf"\b(?:{_SUBJECTS})\b", words)), subject)
            continue
        denied = bool(_DENIED.search(words))
        for match in _TOKENS.finditer(words):
            if match["subject"]:
                subject = match["subject"]
                continue
            subject = match["owner"] or subject
            if match["copula"]:
                attributes, positive = (match["name"],), match["copula"] == "is"
            else:
                attributes, positive = _VERBS[match["verb"]]
            if subject is None:
                continue
            for value in _VALUE_WORD.findall(match["values"]):
                attribute = ATTRIBUTE_OF[value]
                if attribute in attributes and attribute in attributes_of(subject):
                    found.append(Claim(subject, attribute, value, positive != denied))
    return found
