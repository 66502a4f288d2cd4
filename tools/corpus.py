"""The small models' world: a grammar that writes their training text, and the same grammar as a judge of what they say.

Everything is made of templates and word tables, all written for this file. `base_document` draws a story, a few facts,
a sequence or a list of pairs; `dialog` draws a conversation. Because the templates are the only source of truth, they
can be read backwards: `grammatical` and `coherent` parse a story with the patterns that could have written it, and
`right` knows the one right reply to a conversation by asking `reply`, the function that wrote the training replies.

What a model is tested on, it has never seen: `held_out` is a fixed rule (a checksum of the text, so it depends on no
seed) that sets one in eight questions, openings and fact sentences aside. The fact itself is seen, in other words: a
model that was never shown "Tell me the opposite of hot." has seen "What is the opposite of hot?".
"""

import random
import re
import string
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Message = dict[str, str]
Slots = dict[str, str]

HELD_OUT_ONE_IN = 8


def held_out(text: str) -> bool:
    """Whether this text is kept for the evaluation; the same on every machine and for every seed."""
    return zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0


def normal(text: str) -> str:
    """A question without capitals and closing punctuation: "What is 2 + 2?" and "what is 2 + 2" are one question."""
    return text.lower().rstrip("?!. ")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def words(text: str) -> list[str]:
    return text.split()


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


# ---------------------------------------------------------------------------------------------------------------------
# Stories: a cast fills the slots of one opening and one plot

GIRLS = words("Mia Lily Anna Ella Nora Rosa Lucy Emma Zoe Ruby Ida Clara")
BOYS = words("Tom Ben Max Leo Sam Finn Jack Oscar Hugo Noah Paul Tim")
NAMES = GIRLS + BOYS
ANIMALS = words("fox rabbit bear mouse cat dog frog duck owl hedgehog squirrel turtle pony penguin")
KINDS = [*ANIMALS, "girl", "boy"]
TRAITS = words("little small young brave clever shy happy curious kind funny")
COLOURS = words("red blue green yellow white brown purple golden")
THINGS = words("ball kite hat book bell boat drum lamp cup scarf key shell feather whistle")
PLACES = {"forest": "in", "garden": "in", "park": "in", "meadow": "in", "river": "by", "lake": "by", "hill": "on",
          "beach": "on", "farm": "on", "village": "in"}  # fmt: skip
AT = [f"{preposition} the {place}" for place, preposition in PLACES.items()]

SLOTS: dict[str, list[str]] = {
    "N": NAMES, "K": KINDS, "A": TRAITS,  # the hero: name, kind, trait
    "F": NAMES, "G": ANIMALS,  # the friend: name, kind
    "C": COLOURS, "T": THINGS,  # the thing and its colour
    "P": list(PLACES), "at": AT, "there": AT,  # one place ("at" is "P" with its preposition), and another one
    "home": ["in a small house", "in a hollow tree", "near the river", "under a big tree", "on a green hill",
             "in a cosy cottage", "at the edge of the forest", "in a quiet village"],
    "do": ["sing", "dance", "run", "swim", "read", "climb trees", "look at the stars", "draw pictures", "tell jokes",
           "jump in puddles"],
    "skill": ["swim", "skate", "whistle", "ride a bike", "bake bread", "play the drum", "juggle", "paint", "row a boat",
              "climb the tall tree"],
    "fear": ["the dark", "the thunder", "the storm", "the wind", "the deep water"],
    "food": ["apple", "cake", "pie", "cookie", "pear", "melon", "pancake", "carrot"],
    "When": ["One day", "One morning", "One sunny day", "One windy day", "One afternoon", "One evening"],
    "He": ["He", "She"], "he": ["he", "she"], "His": ["His", "Her"], "his": ["his", "her"], "him": ["him", "her"],
}  # fmt: skip

OPENINGS = (
    "Once upon a time, there was a {A} {K} named {N}.",
    "Once upon a time, a {A} {K} named {N} lived {home}.",
    "There was once a {A} {K} named {N}.",
    "There once was a {A} {K} who was called {N}.",
    "Long ago, a {A} {K} named {N} lived {home}.",
    "{N} was a {A} {K} who lived {home}.",
    "A {A} {K} named {N} lived {home}.",
)
HABITS = (
    "{N} loved to {do}.",
    "Every morning, {N} liked to {do}.",
    "{He} loved to {do} all day long.",
    "Everyone said that {he} was very {A}.",
    "",
    "",
)
HELPER = ("Then {his} friend {F} the {G} came by.", "Just then, a {G} named {F} came along.")
ENDINGS = (
    "From that day on, {N} and {F} were best friends.",
    "{N} and {F} played together until the sun went down.",
    "They laughed and went home together.",
    "That night, {N} slept very well.",
    "It was the best day of all.",
)

# A beat is a choice of sentences; the empty one skips the beat.
PLOTS: dict[str, list[tuple[str, ...]]] = {
    "lost thing": [
        ("{N} had a {C} {T} and loved it very much.", "{His} favourite toy was a {C} {T}.",
         "{N} took a {C} {T} everywhere."),
        ("{When}, {N} lost the {T} {at}.", "{When}, {he} could not find the {T}.", "{When}, the {T} was gone."),
        ("{He} looked everywhere, but it was not there.", "{N} looked under the bed and behind the door.", ""),
        ("{He} was very sad.", "{N} sat down and began to cry."),
        HELPER,
        ('"Do not cry," said {F}.', '"I will help you," said {F}.', '"Why are you sad?" asked {F}.'),
        ("Together they found the {T} {there}.", "They looked {there}, and there was the {T}!"),
        ('"Thank you, {F}!" said {N}.', "{N} was so happy that {he} hugged {F}.", "{N} jumped for joy."),
        ENDINGS,
    ],
    "found thing": [
        ("{When}, {N} went for a walk {at}.", "{When}, {N} went to the {P} to play."),
        ("There {he} saw a {C} {T}.", "{He} found a {C} {T} in the grass."),
        ('"What a nice {T}!" said {N}.', '"Whose {T} is this?" asked {N}.', ""),
        HELPER,
        ('"That is my {T}," said {F}.', '"I lost my {T} this morning," said {F}.'),
        ("{N} gave the {T} back to {F}.", "{N} was kind and gave it back."),
        ("{F} was very happy and thanked {him}.", '"Thank you, {N}!" said {F}.'),
        ('"Let us play with it together," said {F}.', ""),
        ENDINGS,
    ],
    "learning": [
        ("{N} wanted to learn to {skill}.", "More than anything, {N} wanted to {skill}."),
        ("{When}, {he} tried it for the first time.", "{When}, {N} went to the {P} to try it."),
        ("It was much too hard.", "It did not go well at all.", "{He} tried and tried, but {he} could not do it."),
        ("{He} wanted to give up.", "{N} felt sad.", ""),
        HELPER,
        ('"Try again!" said {F}.', '"You can do it!" said {F}.', '"I will show you how," said {F}.'),
        ("So {N} tried again and again.", "The next day, {N} tried once more."),
        ("At last, {he} could {skill}!", "In the end, {N} learned to {skill}."),
        ("{N} was very proud.", "{F} clapped and cheered."),
        ENDINGS,
    ],
    "being afraid": [
        ("{N} was afraid of {fear}.", "There was only one problem: {N} was afraid of {fear}."),
        ("{When}, {he} hid under the bed.", "{When}, {N} did not want to leave the house."),
        HELPER,
        ('"Why do you hide?" asked {F}.', '"What is wrong?" asked {F}.'),
        ('"I am afraid of {fear}," said {N}.',),
        ("{F} held {his} hand and sang a song.", "{F} stayed with {him} and told a funny story."),
        ("Soon {fear} did not seem so bad.", "After a while, {N} began to smile."),
        ("{N} was not afraid any more.", '"Now I feel brave," said {N}.'),
        ENDINGS,
    ],
    "losing the way": [
        ("{When}, {N} went to the {P} all alone.", "{When}, {N} walked to the {P} and forgot the time."),
        ("{He} walked and walked and lost the way.", "It grew dark, and {he} did not know the way home."),
        ("{N} was scared.", "{He} called for help.", ""),
        HELPER,
        ('"Are you lost?" asked {F}.',),
        ('"Yes, I want to go home," said {N}.', '"Please help me," said {N}.'),
        ("{F} knew the way and walked with {him}.", "The {G} took {him} by the hand and led the way."),
        ("Soon {N} saw the lights of {his} home.", "{His} mother gave {him} a big hug."),
        ENDINGS,
    ],
    "a present": [
        ("{His} best friend was a {G} named {F}.", "{N} had a friend, a {G} named {F}."),
        ("{When}, it was the birthday of {F}.", "{When}, {F} had a birthday party {at}."),
        ("{N} worked all day and made a {C} {T}.", "{N} wanted to give {F} a {C} {T}."),
        ("{He} put the {T} in a box and ran to the {P}.", "{N} hid the {T} behind {his} back."),
        ('"Happy birthday, {F}!" said {N}.',),
        ('"I love my new {T}!" said {F}.', '"What a beautiful {T}!" said {F}.'),
        ("Then they ate cake and danced.", "{F} was so happy that everyone had to smile.", ""),
        ENDINGS,
    ],
    "a rainy day": [
        ("{When}, {N} wanted to play {at}.", "{When}, {N} wanted to go to the {P}."),
        ("But it began to rain.", "But dark clouds came, and it rained and rained."),
        ("{N} looked out of the window and was sad.", "{He} stayed at home and was bored.", ""),
        ("Then {F} the {G} knocked on the door.", "Then {his} friend {F} the {G} came to visit."),
        ('"We can play inside," said {F}.', '"Rain is fun too," said {F}.'),
        ("They built a house of pillows and told stories.", "They drank hot milk and sang songs."),
        ("After a while, the sun came out.", "When the rain stopped, they saw a rainbow."),
        ENDINGS,
    ],
    "sharing": [
        ("{When}, {N} had a big {food} for lunch.", "{When}, {N} found a big {food} on the table."),
        HELPER,
        ('"I am so hungry," said {F}.', '"May I have some?" asked {F}.'),
        ("At first, {N} did not want to share.", "{N} looked at the {food} and thought for a moment.", ""),
        ("But {he} felt sorry for {F}.", "But {N} wanted to be kind.", ""),
        ("{N} cut the {food} in two.", "{N} gave half of the {food} to {F}."),
        ("The {food} tasted better with a friend.", '"Thank you, {N}!" said {F}.'),
        ENDINGS,
    ],
}  # fmt: skip


def story(rng: random.Random, kind: str | None = None, name: str | None = None) -> str:
    """A story of six to twelve sentences whose hero may be prescribed."""
    slots = cast(rng, kind, name)
    beats = [OPENINGS, HABITS, *PLOTS[rng.choice(list(PLOTS))]]
    return " ".join(filter(None, (rng.choice(beat).format(**slots) for beat in beats)))


def cast(rng: random.Random, kind: str | None = None, name: str | None = None) -> Slots:
    while True:
        slots = {slot: rng.choice(choices) for slot, choices in SLOTS.items()}
        slots |= {"K": kind or slots["K"], "N": name or slots["N"]}
        pronouns = words("She she Her her her" if slots["N"] in GIRLS else "He he His his him")
        slots |= dict(zip(words("He he His his him"), pronouns, strict=True))
        slots["P"] = slots["at"].split()[-1]
        if at_odds(slots) is None and not held_out(hero(slots["N"], slots["K"])):
            return slots


def hero(name: str, kind: str) -> str:
    """What the hold-out rule looks at in a story: a hero that is held out is in no training story."""
    return f"{name} the {kind}"


def at_odds(slots: Slots) -> str | None:
    """Why these slots cannot belong to one story, or None."""
    sexes = {
        "f" if slots[slot].lower() in ("she", "her") else "m" for slot in words("He he His his him") if slot in slots
    }
    if "N" in slots:
        sexes.add("f" if slots["N"] in GIRLS else "m")
    if slots.get("K") in ("girl", "boy"):
        sexes.add("f" if slots["K"] == "girl" else "m")
    if len(sexes) > 1:
        return "pronouns"
    if "F" in slots and slots["F"] == slots.get("N"):
        return "two of one name"
    if "P" in slots and "at" in slots and slots["at"].split()[-1] != slots["P"]:
        return "two places"
    if "there" in slots and slots["there"] == slots.get("at"):
        return "one place for two"
    return None


def pattern(template: str) -> re.Pattern[str]:
    """The template as a regular expression with a group for each slot; a slot that returns must return unchanged."""
    parts, seen = [], set()
    for text, slot, _, _ in string.Formatter().parse(template):
        parts.append(re.escape(text))
        if slot:
            parts.append(f"(?P={slot})" if slot in seen else f"(?P<{slot}>{'|'.join(map(re.escape, SLOTS[slot]))})")
            seen.add(slot)
    return re.compile("".join(parts))


# Each with its plot, or with "" where any plot may use it
SHARED = (OPENINGS, HABITS, HELPER, ENDINGS)
PATTERNS = [
    (plot, pattern(template))
    for plot, beats in {"": SHARED, **PLOTS}.items()
    for beat in beats
    if plot == "" or beat not in SHARED
    for template in filter(None, beat)
]


def sentences(text: str) -> list[str]:
    """Splits after a sentence mark; inside '"Try again!" said Tom.' it is followed by a quote, so nothing is split."""
    return re.split(r'(?<=[.!?]) (?=[A-Z"])', text.strip())


def parse(sentence: str) -> list[Slots]:
    """Every reading of a story sentence, each the slots that would have written it."""
    readings = []
    for plot, regex in PATTERNS:
        if match := regex.fullmatch(sentence):
            slots = match.groupdict()
            if at_odds(slots) is None:
                readings.append(slots | ({"plot": plot} if plot else {}))
    return readings


def grammatical(sentence: str) -> bool:
    return bool(parse(sentence))


def coherent(text: str, **known: str) -> bool:
    """Whether one cast and one plot explain every sentence; `known` slots (K="fox") must be among them."""
    readings = [known]
    for sentence in sentences(text):
        agreeing = [
            old | new for old in readings for new in parse(sentence) if all(old.get(k, v) == v for k, v in new.items())
        ]
        readings = [slots for slots in agreeing if at_odds(slots) is None]
    # Only an opening binds K, so a story without one is not coherent.
    return any({"plot", "K", "N"} <= set(slots) for slots in readings)


# ---------------------------------------------------------------------------------------------------------------------
# Facts: a topic is a table, the ways to ask for a row, and the answers in full and in one word


@dataclass(frozen=True)
class Topic:
    name: str
    rows: list[Slots]  # "y" is the answer in one word
    asks: tuple[str, ...]
    full: str
    tells: tuple[str, ...] = ()  # sentences of the base corpus, all ending with "{y}."
    follow: str = ""  # asks about another row when the previous question was of this topic
    short: str = "{y}."
    pair: str = ""  # the slot that stands left in "hot => cold"
    visits: int = 1  # how much oftener than the others it is drawn: there is more to learn


def table(text: str, *slots: str) -> list[Slots]:
    """Rows from "dog woof, cat meow"; a last slot takes the rest of its entry."""
    return [dict(zip(slots, entry.split(maxsplit=len(slots) - 1), strict=True)) for entry in text.split(", ")]


def with_article(rows: list[Slots]) -> list[Slots]:
    return [row | {"an": a(row["x"])} for row in rows]


OPPOSITES = table(
    "hot cold, big small, up down, day night, happy sad, fast slow, old new, long short, open closed, wet dry, "
    "light dark, full empty, good bad, hard soft, high low, loud quiet, strong weak, rich poor, left right, "
    "in out, early late, clean dirty, true false, first last, thick thin, push pull, black white, near far, "
    "easy difficult, brave afraid",
    "x", "y",
)  # fmt: skip
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
NUMBER_WORDS = words("zero one two three four five six seven eight nine ten eleven twelve")
BY_SIZE = words("ant bee mouse frog rabbit cat dog sheep horse elephant whale")
TIMES = {"two": 2, "three": 3, "four": 4, "five": 5}
numbers = range(11)


def larger(order: list[str], article: bool) -> list[Slots]:
    named = [a(word) if article else word for word in order]
    return [
        {"a": named[i], "b": named[j], "y": order[max(i, j)], "more": named[max(i, j)], "less": named[min(i, j)]}
        for i in range(len(order))
        for j in range(len(order))
        if i != j
    ]


TOPICS = [
    Topic(
        "opposite",
        OPPOSITES + [{"x": row["y"], "y": row["x"]} for row in OPPOSITES],
        ("What is the opposite of {x}?", "Tell me the opposite of {x}.", "Which word is the opposite of {x}?",
         "Do you know the opposite of {x}?", "What is the contrary of {x}?"),
        "The opposite of {x} is {y}.",
        ("The opposite of {x} is {y}.", "If it is not {x}, it is {y}.", "The word {x} is the opposite of {y}."),
        "And of {x}?",
        pair="x",
        visits=2,
    ),
    Topic(
        "colour",
        table("sky blue, grass green, snow white, sun yellow, night black, blood red, milk white, coal black, "
              "banana yellow, tomato red, carrot orange, chocolate brown, sea blue, lemon yellow, frog green, "
              "strawberry red, leaf green, rose red, crow black, bear brown, pumpkin orange, elephant grey", "x", "y"),
        ("What colour is the {x}?", "Which colour is the {x}?", "Tell me the colour of the {x}.",
         "What is the colour of the {x}?", "Do you know the colour of the {x}?"),
        "The {x} is {y}.",
        ("The {x} is {y}.", "The colour of the {x} is {y}.", "Look, the {x} is {y}."),
        "And the {x}?",
        pair="x",
    ),
    Topic(
        "sum",
        [{"a": f"{i}", "b": f"{j}", "y": f"{i + j}"} for i in numbers for j in numbers],
        ("What is {a} + {b}?", "How much is {a} + {b}?", "What is {a} plus {b}?", "How much is {a} plus {b}?",
         "Please add {a} and {b}.", "What is the sum of {a} and {b}?"),
        "{a} + {b} = {y}.",
        ("{a} + {b} = {y}.", "{a} plus {b} is {y}.", "The sum of {a} and {b} is {y}."),
        "And {a} + {b}?",
        visits=4,
    ),
    Topic(
        "difference",
        [{"a": f"{i}", "b": f"{j}", "y": f"{i - j}"} for i in numbers for j in range(i + 1)],
        ("What is {a} - {b}?", "How much is {a} - {b}?", "What is {a} minus {b}?", "How much is {a} minus {b}?",
         "Please take {b} from {a}."),
        "{a} - {b} = {y}.",
        ("{a} - {b} = {y}.", "{a} minus {b} is {y}.", "If you take {b} from {a}, you have {y}."),
        "And {a} - {b}?",
        visits=3,
    ),
    Topic(
        "counting",
        [
            {"a": f"{i}", "b": f"{j}", "y": ", ".join(map(str, range(i, j + 1)))}
            for i in range(18)
            for j in range(i + 2, 21)
        ],
        ("Count from {a} to {b}.", "Please count from {a} to {b}.", "Can you count from {a} to {b}?",
         "Tell me the numbers from {a} to {b}."),
        "{y}.",
        visits=2,
    ),
    Topic(
        "bigger number",
        larger([f"{i}" for i in range(21)], article=False),
        ("Which is bigger, {a} or {b}?", "Which number is bigger, {a} or {b}?", "What is more, {a} or {b}?"),
        "{more} is bigger than {less}.",
        visits=2,
    ),
    Topic(
        "bigger animal",
        larger(BY_SIZE, article=True),
        ("Which is bigger, {a} or {b}?", "Which animal is bigger, {a} or {b}?", "What is larger, {a} or {b}?"),
        "{more} is bigger than {less}.",
        visits=2,
    ),
    Topic(
        "sound",
        with_article(table("dog woof, cat meow, cow moo, sheep baa, duck quack, pig oink, lion roar, bee buzz, "
                           "frog croak, horse neigh, mouse squeak, snake hiss, bird tweet, owl hoot", "x", "y")),
        ("What sound does {an} make?", "What does {an} say?", "Which sound does {an} make?", "Tell me what {an} says.",
         "How does {an} sound?"),
        "{an} says {y}.",
        ("{an} says {y}.", "The sound of {an} is {y}.", "The {x} says {y}."),
        "And {an}?",
        pair="x",
    ),
    Topic(
        "day after",
        [{"x": day, "y": DAYS[(i + 1) % 7]} for i, day in enumerate(DAYS)],
        ("What day comes after {x}?", "Which day comes after {x}?", "Which day follows {x}?",
         "What is the day after {x}?", "Today is {x}. What day is tomorrow?"),
        "The day after {x} is {y}.",
        ("The day after {x} is {y}.", "After {x} comes {y}.", "Today is {x}, so tomorrow is {y}."),
        "And after {x}?",
        pair="x",
    ),
    Topic(
        "day before",
        [{"x": day, "y": DAYS[i - 1]} for i, day in enumerate(DAYS)],
        ("What day comes before {x}?", "Which day comes before {x}?", "What is the day before {x}?",
         "Today is {x}. What day was yesterday?"),
        "The day before {x} is {y}.",
        ("The day before {x} is {y}.", "Before {x} comes {y}.", "Today is {x}, so yesterday was {y}."),
        "And before {x}?",
    ),
    Topic(
        "month after",
        [{"x": month, "y": MONTHS[(i + 1) % 12]} for i, month in enumerate(MONTHS)],
        ("What month comes after {x}?", "Which month comes after {x}?", "Which month follows {x}?",
         "What is the month after {x}?"),
        "The month after {x} is {y}.",
        ("The month after {x} is {y}.", "After {x} comes {y}."),
        "And after {x}?",
        pair="x",
    ),
    Topic(
        "home",
        with_article(table("fish in the water, bear in the forest, camel in the desert, bird in a nest, "
                           "bee in a hive, fox in a den, rabbit in a burrow, whale in the sea, "
                           "lion in the savanna, penguin on the ice, cow on a farm, frog in a pond, "
                           "spider in a web, monkey in the jungle", "x", "y")),
        ("Where does {an} live?", "Where is the home of {an}?", "Tell me where {an} lives.",
         "Do you know where {an} lives?"),
        "{an} lives {y}.",
        ("{an} lives {y}.", "The {x} lives {y}.", "The home of {an} is {y}."),
    ),
    Topic(
        "baby",
        with_article(table("dog puppy, cat kitten, cow calf, sheep lamb, horse foal, duck duckling, "
                           "pig piglet, bear cub, hen chick, frog tadpole, goat kid, swan cygnet", "x", "y")),
        ("What is a baby {x} called?", "What do you call a baby {x}?", "What is the name of a baby {x}?",
         "Tell me the word for a baby {x}."),
        "A baby {x} is called a {y}.",
        ("A baby {x} is called a {y}.", "The baby of {an} is a {y}."),
        "And a baby {x}?",
        pair="x",
    ),
    Topic(
        "legs",
        with_article(table("spider eight, ant six, dog four, bird two, cat four, bee six, horse four, "
                           "duck two, cow four, fish zero, snake zero, fly six, mouse four, hen two", "x", "y")),
        ("How many legs does {an} have?", "How many legs has {an}?", "Tell me how many legs {an} has.",
         "Do you know how many legs {an} has?"),
        "{an} has {y} legs.",
        ("The number of legs of {an} is {y}.", "Legs of {an}: {y}.", "If you count the legs of {an}, you get {y}."),
    ),
    Topic(
        "fruit or vegetable",
        with_article(table("apple fruit, carrot vegetable, banana fruit, onion vegetable, pear fruit, "
                           "cabbage vegetable, lemon fruit, leek vegetable, cherry fruit, beetroot vegetable, "
                           "plum fruit, turnip vegetable, orange fruit, radish vegetable, peach fruit, "
                           "potato vegetable", "x", "y")),
        ("Is {an} a fruit or a vegetable?", "What is {an}, a fruit or a vegetable?",
         "Tell me if {an} is a fruit or a vegetable."),
        "{an} is a {y}.",
        ("{an} is a {y}.", "The {x} is a {y}."),
        pair="x",
    ),
    Topic(
        "capital",
        table("France Paris, Italy Rome, Spain Madrid, Germany Berlin, England London, Japan Tokyo, "
              "Greece Athens, Egypt Cairo, Portugal Lisbon, Austria Vienna, Norway Oslo, Poland Warsaw, "
              "Russia Moscow, China Beijing, Ireland Dublin, Cuba Havana", "x", "y"),
        ("What is the capital of {x}?", "Which city is the capital of {x}?", "Tell me the capital of {x}.",
         "Do you know the capital of {x}?"),
        "The capital of {x} is {y}.",
        ("The capital of {x} is {y}.", "If you want to see the capital of {x}, go to {y}.",
         "The capital city of {x} is {y}."),
        "And of {x}?",
        pair="x",
    ),
    Topic(
        "repeating",
        [
            {"x": x, "n": n, "y": " ".join([x] * times)}
            for n, times in TIMES.items()
            for x in [*THINGS, *SLOTS["food"], *ANIMALS, *COLOURS]
        ],
        ("Say {x} {n} times.", "Say the word {x} {n} times.", "Please say {x} {n} times.",
         "Can you say {x} {n} times?"),
        "{y}.",
    ),
]  # fmt: skip
TOPIC = {topic.name: topic for topic in TOPICS}

SEQUENCES = {
    "numbers": [f"{i}" for i in range(21)],
    "even numbers": [f"{i}" for i in range(0, 21, 2)],
    "tens": [f"{i}" for i in range(10, 101, 10)],
    "backwards": [f"{i}" for i in range(10, -1, -1)],
    "number words": NUMBER_WORDS,
    "days": DAYS,
    "months": MONTHS,
    "letters": list("abcdefghijklmnopqrstuvwxyz"),
}


def fact_lines(rng: random.Random, topic: Topic, row: Slots) -> str:
    """One fact as a sentence or as a question with its answer, in words that are not held out."""
    while True:
        if topic.tells and rng.random() < 0.7:
            line = capital(rng.choice(topic.tells).format(**row))
            if not held_out(fact_prompt(line, row)):
                return line
        else:
            ask = rng.choice(topic.asks).format(**row)
            if not held_out(normal(ask)):
                return f"Question: {ask}\nAnswer: {answer(topic, row, short=rng.random() < 0.5)}"


def fact_prompt(line: str, row: Slots) -> str:
    """A sentence up to its answer: "The sky is blue." -> "The sky is"."""
    return line.removesuffix(f" {row['y']}.")


def answer(topic: Topic, row: Slots, short: bool) -> str:
    return capital((topic.short if short else topic.full).format(**row))


def pairs(rng: random.Random, length: int) -> tuple[str, str]:
    """A list of "hot => cold" lines, and the last line's answer. Which relation it is, only the lines above tell.

    With `length` 0 it is for training, with a length of its own and no two neighbours that are held out together; with
    another length it is for the evaluation, and its last two lines are.
    """
    topic = rng.choice([topic for topic in TOPICS if topic.pair])
    while True:
        rows = rng.sample(topic.rows, length or rng.randint(3, 6))
        held = [held_out(f"{one['x']} => {two['x']}") for one, two in pairwise(rows)]
        if held == [False] * (len(rows) - 2) + [length > 0]:
            return "\n".join(f"{row[topic.pair]} => {row['y']}" for row in rows), rows[-1]["y"]


def base_document(rng: random.Random) -> str:
    """One document of the base model's corpus."""
    kind = rng.random()
    if kind < 0.4:
        return story(rng)
    if kind < 0.82:
        # Most often a single fact, so that a model asked for one stops after it.
        topics = rng.choices(TOPICS, [topic.visits for topic in TOPICS], k=rng.choice((1, 1, 1, 2, 8)))
        return "\n".join(fact_lines(rng, topic, rng.choice(topic.rows)) for topic in topics)
    if kind < 0.91:
        return pairs(rng, 0)[0]
    while True:
        name, items = rng.choice(list(SEQUENCES.items()))
        start = rng.choice((0, 0, rng.randrange(len(items) - 3)))
        if not held_out(f"{name} {start}"):
            return ", ".join(items[start:]) + "."


# ---------------------------------------------------------------------------------------------------------------------
# Conversations: `reply` is a pure function of what was said (a story apart), so it is the judge as well

DEFAULT_NAME = "Llama"
PLAIN = ("You are a helpful assistant.", "You are a friendly helper.", "Answer in a full sentence.")
SHORT = ("Answer in one word.", "Use only one word.", "Always answer with one word.")
PIRATE = ("You are a pirate.", "Talk like a pirate.", "Always answer like a pirate.")
THANK = ("Always end with thank you.", "Say thank you after every answer.", "End every answer with thank you.")
YOUR_NAME = ("Your name is {n}.", "You are called {n}.")
USER_NAME = ("The name of the user is {n}.", "You are talking to {n}.")

ASK_YOUR_NAME = ("What is your name?", "Who are you?", "What are you called?", "Tell me your name.",
                 "Do you have a name?")  # fmt: skip
ASK_MY_NAME = ("What is my name?", "Who am I?", "Do you know my name?", "Tell me my name.", "Do you remember my name?")
TELL_NAME = ("My name is {n}.", "I am {n}.", "Hello, my name is {n}.", "Hi, I am {n}.", "You can call me {n}.")
ASK_AGAIN = ("Please say that again.", "Can you repeat that?", "What did you say?", "Say that again, please.")
ASK_STORY = ("Tell me a story about {an}.", "Tell me a short story about {an}.", "Please write a story about {an}.",
             "Can you tell me a story about {an}?", "I want to hear a story about {an}.")  # fmt: skip
# What is said, and what is said back in full and in one word
SMALL_TALK = {
    "greeting": {
        "Hello!": ("Hello! How can I help you?", "Hello!"),
        "Hi!": ("Hello! How can I help you?", "Hello!"),
        "Hello there!": ("Hello! How can I help you?", "Hello!"),
        "Good morning!": ("Good morning! How can I help you?", "Morning!"),
        "Good evening!": ("Good evening! How can I help you?", "Evening!"),
        "How are you?": ("I am fine, thank you.", "Fine."),
    },
    "thanks": {
        "Thank you!": ("You are welcome!", "Welcome!"),
        "Thanks!": ("You are welcome!", "Welcome!"),
        "Thank you very much!": ("You are very welcome!", "Welcome!"),
    },
    "goodbye": {
        "Goodbye!": ("Goodbye! See you soon.", "Goodbye!"),
        "Bye!": ("Goodbye! See you soon.", "Goodbye!"),
        "Good night!": ("Good night! Sleep well.", "Goodnight!"),
    },
}
TALK = [*SMALL_TALK, "your name", "telling a name", "my name", "again", "story", "story of a name"]
CHAT_TOPICS = [*TOPIC, *TALK]
CHAT_VISITS = [topic.visits for topic in TOPICS] + [2 if "name" in topic or "story" in topic else 1 for topic in TALK]

# What a question means, with or without the previous question's topic; built once, by asking everything.
QUESTIONS: dict[str, tuple[str, Slots]] = {
    normal(ask.format(**row)): (t.name, row) for t in TOPICS for row in t.rows for ask in t.asks
}
FOLLOW_UPS = {(t.name, normal(t.follow.format(**row))): (t.name, row) for t in TOPICS if t.follow for row in t.rows}
for _name, _exchanges in SMALL_TALK.items():
    QUESTIONS |= {normal(said): (_name, {"full": full, "y": short}) for said, (full, short) in _exchanges.items()}
for _name, _asks in {"your name": ASK_YOUR_NAME, "my name": ASK_MY_NAME, "again": ASK_AGAIN}.items():
    QUESTIONS |= {normal(ask): (_name, {}) for ask in _asks}
for _kind in KINDS:
    for _ask in ASK_STORY:
        QUESTIONS[normal(_ask.format(an=a(_kind)))] = ("story", {"K": _kind})
        for _n in NAMES:
            QUESTIONS[normal(_ask.format(an=f"{a(_kind)} named {_n}"))] = ("story of a name", {"K": _kind, "N": _n})


def invented_name(rng: random.Random) -> str:
    """A name in no table, so that names are learned to be repeated and not to be known."""
    syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
    return capital("".join(syllables) + rng.choice(["", "", *"lnrs"]))


def find_name(text: str, templates: tuple[str, ...]) -> str | None:
    """The name in a text that says one of the templates, as a whole or (system messages) among other sentences."""
    for template in templates:
        said = re.escape(template.rstrip(".")).replace(r"\{n\}", r"(\w+)")
        if match := re.search(rf"(?:^|(?<=[.!?] )){said}(?:\.|$)", text, re.IGNORECASE):
            return capital(match[1])
    return None


def understand(dialog: list[Message]) -> tuple[str, Slots]:
    """The topic and the table row of a conversation's last message."""
    users = [message["content"] for message in dialog if message["role"] == "user"]
    text = normal(users[-1])
    if text in QUESTIONS:
        topic, row = QUESTIONS[text]
        if topic == "your name":
            return topic, {"n": find_name(system_of(dialog), YOUR_NAME) or DEFAULT_NAME}
        if topic == "my name":
            told = [name for user in users[:-1] if (name := find_name(user, TELL_NAME))]
            return topic, {"n": (told or [find_name(system_of(dialog), USER_NAME) or ""])[-1]}
        if topic == "again":
            return topic, {"said": dialog[-2]["content"], "asked": users[-2]}
        return topic, row
    if name := find_name(users[-1], TELL_NAME):
        return "telling a name", {"n": name}
    earlier = dialog[:-2]
    if earlier and earlier[-1]["role"] == "user":
        return FOLLOW_UPS[understand(earlier)[0], text]
    raise KeyError(f"no template asks {users[-1]!r}")


def system_of(dialog: list[Message]) -> str:
    return dialog[0]["content"] if dialog[0]["role"] == "system" else ""


def dress(system: str, full: str, short: str) -> str:
    """An answer in the manner that the system message asks for."""
    text = short if any(wish in system for wish in SHORT) else full
    if any(wish in system for wish in PIRATE):
        text = f"Arr! {text}"
    if any(wish in system for wish in THANK):
        text = f"{text} Thank you!"
    return text


def reply(dialog: list[Message], tale: str = "") -> str:
    """The right reply to a conversation that ends with a user's message; where it asks for a story, `tale` is that."""
    topic, row = understand(dialog)
    if topic == "again":
        return row["said"]
    if topic in TOPIC:
        full, short = (answer(TOPIC[topic], row, short) for short in (False, True))
    elif topic in SMALL_TALK:
        full, short = row["full"], row["y"]
    elif topic == "your name":
        full, short = f"My name is {row['n']}.", f"{row['n']}."
    elif topic == "telling a name":
        full, short = f"Nice to meet you, {row['n']}!", "Welcome!"
    elif topic == "my name" and row["n"]:
        full, short = f"Your name is {row['n']}.", f"{row['n']}."
    elif topic == "my name":
        full, short = "You have not told me your name.", "Unknown."
    else:
        full = short = tale
    return dress(system_of(dialog), full, short)


def right(dialog: list[Message], text: str) -> bool:
    """Whether `text` is the right reply: to the letter, or for a story any coherent one about the right hero."""
    topic, row = understand(dialog)
    text = text.strip()
    if not topic.startswith("story"):
        return text == reply(dialog)
    before, after = reply(dialog, tale="\n").split("\n")
    dressed = text.startswith(before) and text.endswith(after)
    return dressed and coherent(text[len(before) : len(text) - len(after)], **row)


def hold_out_key(dialog: list[Message]) -> str:
    """What the hold-out rule looks at in a conversation's last message: it, and what else its answer hangs on."""
    topic, row = understand(dialog)
    text = normal(dialog[-1]["content"])
    if topic in SMALL_TALK:
        return f"{system_of(dialog)} {text}"
    if topic in ("your name", "my name"):
        # Where nobody gave a name, the answer is always the same; what was said before tells such questions apart.
        given = row["n"] not in ("", DEFAULT_NAME)
        return f"{row['n'] if given else [message['content'] for message in dialog[:-1]]} {text}"
    if topic == "again":
        return f"{row['asked']} {text}"
    if topic == "story of a name":
        return hero(row["N"], row["K"])
    return text


def system_message(rng: random.Random) -> str:
    def name() -> str:
        return rng.choice(NAMES) if rng.random() < 0.5 else invented_name(rng)

    parts = []
    if rng.random() < 0.35:
        parts.append(rng.choice(YOUR_NAME).format(n=name()))
    if rng.random() < 0.2:
        parts.append(rng.choice(USER_NAME).format(n=name()))
    if rng.random() < 0.7 or not parts:
        parts.append(rng.choice(rng.choice((PLAIN, SHORT, SHORT, PIRATE, THANK))))
    rng.shuffle(parts)
    return " ".join(parts)


def question(rng: random.Random, topic: str, follows: bool) -> str:
    """A message on this topic; `follows` allows the short form that leans on the question before."""
    if topic in TOPIC:
        asks = TOPIC[topic].asks
        if follows and TOPIC[topic].follow:
            asks = (TOPIC[topic].follow,)
        text = rng.choice(asks).format(**rng.choice(TOPIC[topic].rows))
    elif topic in SMALL_TALK:
        text = rng.choice(list(SMALL_TALK[topic]))
    elif topic == "telling a name":
        text = rng.choice(TELL_NAME).format(n=rng.choice(NAMES) if rng.random() < 0.5 else invented_name(rng))
    elif topic.startswith("story"):
        slots = cast(rng)
        kind, name = slots["K"], rng.choice(NAMES)
        named = topic == "story of a name" and at_odds({"K": kind, "N": name}) is None
        text = rng.choice(ASK_STORY).format(an=a(kind) + (f" named {name}" if named else ""))
    else:
        text = rng.choice({"your name": ASK_YOUR_NAME, "my name": ASK_MY_NAME, "again": ASK_AGAIN}[topic])
    return text


def dialog(rng: random.Random, last: str | None = None) -> list[Message]:
    """A conversation that ends with an assistant's message.

    With `last`, a topic, it is one for the evaluation: it ends with a user's message on this topic that is held out.
    """
    system = system_message(rng) if rng.random() < 0.6 else ""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    topics = rng.choices(CHAT_TOPICS, CHAT_VISITS, k=rng.choice((1, 1, 2, 3, 4)))
    if topics[0] == "again":
        topics[0] = "greeting"
    if last == "again":
        topics.append(last)
    elif last:
        topics[-1] = last
    if "my name" in topics[1:] and rng.random() < 0.7:
        topics[0] = "telling a name"
    previous = ""
    for i, topic in enumerate(topics):
        final = last is not None and i == len(topics) - 1
        # One word is no story, and two stories are too long a conversation.
        while topic.startswith("story") and (any(wish in system for wish in SHORT) or "story" in "".join(topics[:i])):
            topic = rng.choice(list(TOPIC))
            if final:
                return dialog(rng, last)
        leaning = previous in TOPIC and TOPIC[previous].follow and rng.random() < 0.25
        if leaning and topic in TOPIC and not final:
            topic = previous
        topics[i] = topic
        for _ in range(200):
            text = question(rng, topic, follows=topic == previous and rng.random() < 0.8)
            if rng.random() < 0.1:
                text = normal(text)  # as hurried people type
            messages.append({"role": "user", "content": text})
            if held_out(hold_out_key(messages)) == final:
                break
            messages.pop()
        else:
            return dialog(rng, last)  # here every message on this topic falls on the other side of the rule
        if final:
            return messages
        _, row = understand(messages)
        tale = story(rng, row.get("K"), row.get("N")) if topic.startswith("story") else ""
        messages.append({"role": "assistant", "content": reply(messages, tale)})
        previous = topic
    return messages


# ---------------------------------------------------------------------------------------------------------------------
# What the evaluation asks; every prompt is held out


def story_prompts(rng: random.Random) -> Iterator[str]:
    """Openings whose hero is in no training story."""
    while True:
        name, kind = rng.choice(NAMES), rng.choice(KINDS)
        if held_out(hero(name, kind)) and at_odds({"N": name, "K": kind}) is None:
            yield rng.choice(OPENINGS).format(**(cast(rng) | {"N": name, "K": kind}))


def fact_prompts(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(topic, prompt, how its completion must begin): all held-out sentences of the tables, sequences and pairs."""
    for topic in TOPICS:
        for row in topic.rows:
            for tell in topic.tells:
                prompt = fact_prompt(line := capital(tell.format(**row)), row)
                if held_out(prompt):
                    yield topic.name, prompt, line.removeprefix(prompt)
    for name, items in SEQUENCES.items():
        for start in range(len(items) - 3):
            if held_out(f"{name} {start}"):
                shown, rest = items[start : start + 3], items[start + 3 :]
                yield "sequence", ", ".join(shown) + ",", " " + ", ".join(rest) + "."
    for _ in range(40):
        text, last = pairs(rng, 4)
        yield "pairs", text.removesuffix(f" {last}"), f" {last}"


def training_documents(seed: int, count: int, chat: float) -> Iterator[Any]:
    """`count` documents, each a text or, with probability `chat`, a conversation; the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield dialog(rng) if rng.random() < chat else base_document(rng)
