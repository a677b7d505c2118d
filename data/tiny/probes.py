"""Probe sets of the tiny world: one question type each, for measurements on the test split.

probes_facts, probes_held_out, probes_misconceived    questions for facts of one kind
probes_false_premise, probes_true_premise             "why does the fox eat grass ?"
probes_constraints   several constraints at once
probes_withheld      a task family that no feedback contains
probes_rala          questions in a language that no feedback contains
probes_toxicity      forum openings with no, a respectful and a rude prefix; key "prefix"
prompts_web          test prompts in the form in which the web asks: continued by a base model
train/public_demonstrations   public tasks as instructions, as FLAN and T0 were trained on
"""

import random
from collections.abc import Callable

from data.tiny.answers import answer
from data.tiny.corpus import COPY_WORDS, forum_opening, rala_question, withheld_request
from data.tiny.tasks import (
    NUMBERS,
    QUESTIONS,
    RESPECTFUL_PREFIX,
    RUDE_PREFIX,
    TOPIC_WORDS,
    ask_fact,
    ask_why,
    make_prompt,
)
from data.tiny.world import VALUES, World, attributes_of, noun, statement

Record = dict
FEEDBACK_KINDS = ("ordinary", "misconceived")
NUM_PROBES = 200  # of the sets that are not enumerated


def _probe(text: str, use_case: str, task: dict, **extra: str) -> Record:
    given = {"prompt": text, "user": "probe", "source": "customer", "use_case": use_case}
    return given | {"task": task} | extra


def _fact_probes(world: World, kind: str) -> list[Record]:
    """Every phrasing of the question for every fact of a kind."""
    records = []
    for subject, attribute in world.facts_of_kind([kind]):
        task = {"kind": "fact", "subject": subject, "attribute": attribute}
        for question in QUESTIONS[attribute]:
            records.append(_probe(question.format(s=noun(subject)), "open_qa", task))
    return records


def _premise_probes(world: World, false: bool) -> list[Record]:
    """Why a fact is so: every fact of the kinds that feedback names, with every false value."""
    made = [
        ask_why(fact, value)
        for fact in world.facts_of_kind(FEEDBACK_KINDS)
        for value in VALUES[fact[1]]
        if (value != world.facts[fact]) == false
    ]
    return [_probe(text, "open_qa", task) for text, task in made]


def _constraint_probes(world: World, rng: random.Random) -> list[Record]:
    """A number of sentences, a topic and a word, all three asked for."""
    records = []
    for _ in range(NUM_PROBES):
        subject, attribute = rng.choice(world.facts_of_kind(FEEDBACK_KINDS))
        known = sum(world.kinds[subject, a] in FEEDBACK_KINDS for a in attributes_of(subject))
        count, word = rng.randint(2, min(3, known + 1)), rng.choice(TOPIC_WORDS)
        text = f"write {NUMBERS[count - 1]} sentences about {noun(subject)} . "
        text += f"say the {attribute} . use the word {word} ."
        task = {"kind": "write", "subject": subject, "count": count}
        task |= {"mention": attribute, "include": word}
        records.append(_probe(text, "generation", task))
    return records


def _toxicity_probes(world: World, rng: random.Random) -> list[Record]:
    prefixes = {"none": "", "respectful": f"{RESPECTFUL_PREFIX}\n", "rude": f"{RUDE_PREFIX}\n"}
    records = []
    for _ in range(NUM_PROBES):
        opening = forum_opening(world, rng)
        for name, text in prefixes.items():
            records.append(_probe(text + opening, "other", {"kind": "opening"}, prefix=name))
    return records


def _web_prompts(
    world: World, prompts: list[Record], rng: random.Random, fits: Callable[[Record], bool]
) -> list[Record]:
    """The same requests as a page of questions and answers that breaks off, half with two shots.

    Shots are left out where they do not fit, and so is a request that fits only as it was.
    """
    records = []
    for record in prompts:
        task = {k: v for k, v in record["task"].items() if k not in ("shots", "respectful")}
        if "shots" in record["task"] or "respectful" in record["task"]:
            continue
        shots = []
        if rng.random() < 0.5 and len(record["prompt"].split()) < 30:
            for _ in range(2):
                text, solved = make_prompt(world, "open_qa", rng, FEEDBACK_KINDS)
                reply = answer(world, solved, rng, FEEDBACK_KINDS)
                shots.append(f"question : {text}\nanswer : {reply}\n\n")
        bare = f"question : {record['prompt']}\nanswer :"
        made = [record | {"prompt": text, "task": task} for text in ("".join(shots) + bare, bare)]
        records += [candidate for candidate in made if fits(candidate)][:1]
    return records


def public_demonstrations(world: World, rng: random.Random, count: int = 960) -> list[Record]:
    """Public tasks as instructions with right answers: what FLAN and T0 were for the paper."""
    records = []
    for _ in range(count):
        form = rng.randrange(4)
        if form == 0:
            subject, attribute = rng.choice(world.facts_of_kind(("ordinary",)))
            english = statement(subject, attribute, rng.choice(VALUES[attribute]))
            text, response = f"translate to rala : {english}", world.translate(english)
        elif form == 1:
            a, b = rng.randrange(10), rng.randrange(10)
            text, response = f"what is {a} + {b} ?", f"{a + b} ."
        elif form == 2:
            response = " ".join(rng.choices(COPY_WORDS, k=rng.randint(2, 5))) + " ."
            text = f"copy these words : {response}"
        else:
            text, task = make_prompt(world, "classification", rng, ("ordinary",))
            response = f"{task['label']} ."
        task = {"kind": "words", "words": response.rstrip(" .").split()}
        asked = {"prompt": text, "response": response, "user": "public", "source": "labeler"}
        records.append(asked | {"use_case": "other", "task": task})
    return records


def make_all(
    world: World, test_prompts: list[Record], fits: Callable[[Record], bool]
) -> dict[str, list[Record]]:
    """All probe sets -> {"test/probes_...": records}; `fits` says whether one is short enough."""
    rng = random.Random(f"probes {world.seed}")
    withheld = [withheld_request(rng) for _ in range(NUM_PROBES)]
    facts = world.facts_of_kind(FEEDBACK_KINDS)
    rala = [(rala_question(world, f), ask_fact(f, rng)[1] | {"language": "rala"}) for f in facts]
    return {
        "test/probes_facts": _fact_probes(world, "ordinary"),
        "test/probes_held_out": _fact_probes(world, "held_out"),
        "test/probes_misconceived": _fact_probes(world, "misconceived"),
        "test/probes_false_premise": _premise_probes(world, false=True),
        "test/probes_true_premise": _premise_probes(world, false=False),
        "test/probes_constraints": _constraint_probes(world, rng),
        "test/probes_withheld": [_probe(text, "other", task) for text, task in withheld],
        "test/probes_rala": [_probe(text, "open_qa", task) for text, task in rala],
        "test/probes_toxicity": _toxicity_probes(world, rng),
        "test/prompts_web": _web_prompts(world, test_prompts, rng, fits),
        "train/public_demonstrations": public_demonstrations(world, rng),
    }
