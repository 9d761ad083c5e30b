"""Short film reviews from a seeded probabilistic grammar whose every probability is known.

A review is an opening sentence that names a film, two or three sentences of judgement, and
sometimes a verdict; now and then the opening holds a rating. Each judgement is about one aspect of
the film and has a valence from −2 to 2, so the sentiment of a review is known from how it was made.
A text can be made in one way only, so the probability of a text is that of its derivation, the
entropy of the language is a sum, and `parse` reads any text back.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import zlib
from bisect import bisect
from collections.abc import Hashable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

from rlhf_helpers._validate import check_seed, check_text, check_texts, has, in_range, one_of

SPLITS = ("train", "validation", "held_out")
VALENCES = (-2, -1, 0, 1, 2)
_VALENCES = frozenset(VALENCES)


def _list(words: str) -> list[str]:
    return words.split()


ORIGINS = _list("""French Danish Korean Irish Polish Japanese Mexican Italian Swedish Indian Spanish
Chilean Turkish Greek Finnish Scottish Canadian Brazilian Czech Icelandic Dutch Kenyan""")
# genre: plural, the aspect that only this genre has
GENRES = {
    "thriller": ("thrillers", "suspense"),
    "comedy": ("comedies", "jokes"),
    "drama": ("dramas", "quarrels"),
    "western": ("westerns", "landscapes"),
    "musical": ("musicals", "songs"),
    "romance": ("romances", "chemistry"),
    "mystery": ("mysteries", "clues"),
    "fantasy": ("fantasies", "creatures"),
    "war film": ("war films", "battles"),
    "heist film": ("heist films", "heist"),
    "road movie": ("road movies", "scenery"),
    "ghost story": ("ghost stories", "scares"),
}
# who the film is about: the phrase of the opening, and the noun that a judgement uses
SUBJECTS = {
    "a retired detective": "detective",
    "a lonely baker": "baker",
    "a stubborn farmer": "farmer",
    "a nervous pilot": "pilot",
    "a blind pianist": "pianist",
    "a country doctor": "doctor",
    "a night nurse": "nurse",
    "a small-town mayor": "mayor",
    "a failed magician": "magician",
    "a young widow": "widow",
    "a travelling salesman": "salesman",
    "a deaf boxer": "boxer",
    "an exiled poet": "poet",
    "an honest lawyer": "lawyer",
    "a tired sheriff": "sheriff",
    "a runaway bride": "bride",
    "a ship's cook": "cook",
    "a museum guard": "guard",
    "a chess champion": "champion",
    "a train driver": "driver",
    "a former spy": "spy",
    "a lighthouse keeper": "keeper",
    "a street singer": "singer",
    "a village priest": "priest",
    "two rival chefs": "chefs",
    "two old friends": "friends",
    "three sisters": "sisters",
    "twin brothers": "brothers",
    "four bank robbers": "robbers",
    "a family of acrobats": "acrobats",
    "a forgotten painter": "painter",
    "an ageing dancer": "dancer",
}
# aspect: what it can be called when it is good, and when it is bad
ASPECTS = {
    "plot": ("clever gripping original tight", "thin confusing predictable silly"),
    "acting": ("convincing honest restrained warm", "wooden stiff hammy shrill"),
    "music": ("catchy haunting stirring delicate", "loud bland repetitive cheesy"),
    "pace": ("brisk lively steady confident", "sluggish slow uneven hectic"),
    "ending": ("moving satisfying surprising bold", "rushed abrupt sentimental lazy"),
    "dialogue": ("sharp witty natural crisp", "clumsy stilted wordy lifeless"),
    "script": ("smart subtle inventive elegant", "messy shallow careless preachy"),
    "photography": ("beautiful luminous striking graceful", "murky ugly drab shaky"),
    "humour": ("charming playful gentle daring", "crude childish stale cruel"),
    "costumes": ("colourful gorgeous authentic stylish", "cheap gaudy shabby fake"),
    "editing": ("fluent precise nimble rhythmic", "choppy frantic sloppy jarring"),
    "cast": ("talented strong balanced charismatic", "bored miscast colourless tense"),
}
OF_THE_GENRE = ("exciting memorable intense imaginative", "tame tedious contrived lame")
OF_THE_LEAD = ("sympathetic believable fascinating funny", "annoying unconvincing boring hollow")
PLURALS = {"costumes", "jokes", "quarrels", "landscapes", "songs", "clues", "creatures", "battles"}
PLURALS |= {"scares", "chefs", "friends", "sisters", "brothers", "robbers", "acrobats"}

# valence: adjectives that fit every aspect
ADJECTIVES = {
    2: _list("superb wonderful brilliant excellent outstanding magnificent perfect fantastic"),
    1: _list("good fine solid nice pleasant decent likeable effective"),
    0: _list("ordinary average unremarkable acceptable standard conventional passable"),
    -1: _list("weak poor disappointing dull flat forgettable mediocre tired"),
    -2: _list("terrible awful dreadful horrible atrocious abysmal hopeless unbearable"),
}
STRONGER = {
    1: _list("very really truly remarkably wonderfully"),
    -1: _list("very really painfully terribly annoyingly"),
}
WEAKER = _list("fairly rather quite somewhat")
UTTERLY = _list("absolutely simply utterly just")
VERBS = {
    2: ["I loved", "I adored", "I could watch a whole evening of"],
    1: ["I liked", "I enjoyed", "I was glad of"],
    0: ["I hardly noticed", "I have no opinion about", "I can live with"],
    -1: ["I disliked", "I did not like", "I was tired of"],
    -2: ["I hated", "I could not stand", "I want to forget"],
}
DID = {
    2: ["took my breath away", "stayed with me for days", "made my week"],
    1: ["grew on me", "worked well", "made me smile"],
    0: ["did the job", "left no impression", "surprised nobody"],
    -1: ["left me cold", "got in the way", "made me yawn"],
    -2: ["ruined everything", "made me angry", "drove me out of the room"],
}
# stars: closing sentences; {a} is the genre, {s} its plural
VERDICTS = {
    5: [
        "A masterpiece.",
        "See it twice.",
        "One of the best {s} of the year.",
        "I want more {s} like this.",
    ],
    4: [
        "Worth your evening.",
        "I recommend it.",
        "A {a} worth seeing.",
        "Most {s} are not this good.",
    ],
    3: [
        "It will do.",
        "You might like it.",
        "A {a} like many others.",
        "Only for people who love {s}.",
    ],
    2: ["You can skip it.", "I expected more.", "Not a {a} to remember.", "There are better {s}."],
    1: ["Avoid it.", "A waste of time.", "The worst {a} in years.", "It put me off {s} for good."],
}

DETERMINERS = ["this", "the new", "another"]
PLACES = """last night|on a rainy Sunday|on the train home|with two colleagues|at a small festival
after a long week|with my parents|in an empty cinema|on a late flight|during the holidays"""
PERSONS = _list("neighbour dentist teacher cousin boss grandmother barber librarian")
DATES = ["in March", "last autumn", "two years ago", "this week", "at Easter", "in a few towns"]

# S: one judgement a sentence, C: two that disagree, J: two that agree
TEMPLATES = {"SS": 0.28, "SC": 0.17, "CS": 0.17, "SSS": 0.2, "JS": 0.1, "C": 0.08}
SENTENCES = {
    "S": [("{0}.", 1.0)],
    "C": [("{0}, but {1}.", 0.5), ("{0}, yet {1}.", 0.2), ("Although {0}, {1}.", 0.3)],
    "J": [("{0} and {1}.", 1.0)],
}
# How the author felt, from 1 to 5, and the valences that this makes likely. The mood is never seen.
MOODS = [
    {-2: 0.55, -1: 0.35, 0: 0.1},
    {-2: 0.15, -1: 0.6, 0: 0.1, 1: 0.15},
    {-1: 0.3, 0: 0.4, 1: 0.3},
    {2: 0.15, 1: 0.6, 0: 0.1, -1: 0.15},
    {2: 0.55, 1: 0.35, 0: 0.1},
]
# where a rating stands: nowhere, in front of the opening ('4 stars: I saw …'), or inside it ('this
# 4-star Danish thriller')
RATINGS = {"none": 0.7, "front": 0.15, "inside": 0.15}
WITH_VERDICT = 0.7
# How a form of judgement is chosen; a form that does not exist at a valence gives its share to the
# others.
FORMS = {"adjective": 0.4, "intensified": 0.25, "negated": 0.15, "did": 0.1, "verb": 0.1}


class Film(NamedTuple):
    """What the opening of a review says about the film."""

    origin: str
    genre: str
    subject: str

    def __str__(self) -> str:
        return f"{self.origin} {self.genre} about {self.subject}"


class Judgement(NamedTuple):
    """One judgement: of which aspect, how good (−2 to 2), in which words."""

    aspect: str
    valence: int
    text: str


class Review(NamedTuple):
    """A review with its derivation."""

    text: str
    opening: str  # with its rating, if it has one; "" in a response to an instruction
    film: Film | None
    judgements: tuple[Judgement, ...]
    stars: int  # 1 to 5
    log_prob: float  # of the text, nats
    body_log_prob: float  # of what follows the opening, given the opening, nats

    @property
    def body(self) -> str:
        """What follows the opening, with the space before it."""
        return self.text[len(self.opening) :]

    @property
    def sentiment(self) -> float:
        """Mean valence of the judgements, scaled to [−1, 1]."""
        return sum(j.valence for j in self.judgements) / (2 * len(self.judgements))


class Instruction(NamedTuple):
    """A request for a review, one response to it, and what was asked for."""

    prompt: str
    response: str
    topic: str
    stars: int


class Choices:
    """A finite distribution: values with probabilities, drawn by bisection."""

    def __init__(self, pairs: Iterable[tuple[Hashable, float]]) -> None:
        merged: dict = {}
        try:
            for value, weight in pairs:
                merged[value] = merged.get(value, 0.0) + weight
            total = sum(merged.values())
            shares = 0 < total < math.inf and min(merged.values()) >= 0
        except (TypeError, ValueError) as error:
            raise TypeError(f"pairs is no list of (value, weight): {error}") from error
        if not shares:
            raise ValueError("pairs has weights that are no shares; pass some ≥ 0, not all 0")
        self.probs = {value: weight / total for value, weight in merged.items() if weight}
        self.values = list(self.probs)
        self.edges = list(itertools.accumulate(self.probs.values()))[:-1]

    def draw(self, rng: random.Random):
        try:
            place = rng.random()
        except AttributeError:  # asked only now, since a text takes many draws
            has(rng, "rng", "a random.Random", "random")
            raise
        return self.values[bisect(self.edges, place)]

    def log_prob(self, value) -> float:
        try:
            return math.log(self.probs[value])
        except (KeyError, TypeError) as error:
            raise ValueError(f"value={value!r} is none of the choices; pass one of them") from error

    def entropy(self) -> float:
        return -sum(p * math.log(p) for p in self.probs.values())


# --- the distributions ---------------------------------------------------------------------------


def stars_of(valences: Iterable[int]) -> int:
    """3 plus the mean valence, rounded half away from zero: 1 to 5."""
    has(valences, "valences", "numbers from −2 to 2", "__iter__")
    valences = valences.tolist() if hasattr(valences, "tolist") else list(valences)
    if not valences:
        raise ValueError("valences is empty; pass at least one number from −2 to 2")
    try:
        known = _VALENCES.issuperset(valences) and [int(one) for one in valences]
    except TypeError:  # what has no hash, or is complex
        known = False
    if not known:
        raise ValueError(f"valences={valences!r}; pass whole numbers from −2 to 2")
    total, count = sum(known), len(known)
    size = (2 * abs(total) + count) // (2 * count)
    return 3 + (size if total >= 0 else -size)


@cache
def _plans() -> Choices:
    """Pairs (template, valences), with the unseen mood summed out."""

    def weight(template: str, valences: tuple[int, ...]) -> float:
        position = 0
        for unit in template:
            pair = valences[position : position + 2]
            if unit == "C" and not pair[0] * pair[1] < 0:
                return 0.0
            if unit == "J" and not pair[0] * pair[1] > 0:
                return 0.0
            position += 1 if unit == "S" else 2
        return sum(math.prod(mood.get(v, 0.0) for v in valences) for mood in MOODS)

    pairs = []
    for template, share in TEMPLATES.items():
        count = sum(1 if unit == "S" else 2 for unit in template)
        weights = {v: weight(template, v) for v in itertools.product(VALENCES, repeat=count)}
        total = sum(weights.values())
        pairs += [((template, v), share * w / total) for v, w in weights.items()]
    return Choices(pairs)


@cache
def _plans_with(stars: int) -> Choices:
    pairs = _plans().probs.items()
    return Choices((plan, p) for plan, p in pairs if stars_of(plan[1]) == stars)


@cache
def _openings() -> Choices:
    """Opening sentences with {film} in the place of the film."""
    places = PLACES.replace("\n", "|").split("|")
    parts = [
        (0.3, [f"I saw {{det}} {{film}} {place}." for place in places]),
        (0.3, [f"We watched {{det}} {{film}} {place}." for place in places]),
        (0.2, [f"My {person} recommended {{det}} {{film}}." for person in PERSONS]),
        (0.2, [f"{{Det}} {{film}} came out {date}." for date in DATES]),
    ]
    pairs = []
    for share, frames in parts:
        for frame, det in itertools.product(frames, DETERMINERS):
            text = frame.replace("{det}", det).replace("{Det}", det[0].upper() + det[1:])
            pairs.append((text, share / len(frames) / len(DETERMINERS)))
    return Choices(pairs)


@cache
def _films() -> dict[str, Film]:
    films = itertools.starmap(Film, itertools.product(ORIGINS, GENRES, SUBJECTS))
    return {str(film): film for film in films}


def split_of(film: Film) -> str:
    """The split a film belongs to: one in twenty is held out, one in twenty for validation."""
    has(film, "film", "a Film", *Film._fields)
    bucket = zlib.crc32(str(film).encode()) % 20
    return {0: "held_out", 1: "validation"}.get(bucket, "train")


@cache
def _films_of(split: str) -> list[Film]:
    return [film for film in _films().values() if split_of(film) == split]


def aspects_of(film: Film | None) -> list[str]:
    """What can be judged: twelve aspects of any film, and with a film its genre's own and its
    hero."""
    if film is None:
        return list(ASPECTS)
    has(film, "film", "a Film", *Film._fields)
    return [*ASPECTS, GENRES[film.genre][1], SUBJECTS[film.subject]]


def _special_adjectives(aspect: str) -> tuple[list[str], list[str]]:
    heroes = set(SUBJECTS.values())
    good, bad = ASPECTS.get(aspect, OF_THE_LEAD if aspect in heroes else OF_THE_GENRE)
    return _list(good), _list(bad)


@cache
def _judgements(aspect: str, valence: int) -> Choices:
    """The ways to judge an aspect at a valence: texts without capital and full stop."""
    good, bad = _special_adjectives(aspect)
    fitting = dict(ADJECTIVES)
    fitting[1], fitting[-1] = fitting[1] + good, fitting[-1] + bad
    the = f"the {aspect}"
    be = f"{the} {'are' if aspect in PLURALS else 'is'}"
    forms = {
        "adjective": [f"{be} {word}" for word in fitting[valence]],
        "intensified": [],
        "negated": [],
        "did": [f"{the} {words}" for words in DID[valence]],
        "verb": [f"{words} {the}" for words in VERBS[valence]],
    }
    if valence == 0:
        forms["negated"] = [f"{be} neither good nor bad", f"{be} nothing special"]
    elif abs(valence) == 2:
        sign = valence // 2
        forms["intensified"] = [
            *(f"{be} {much} {word}" for much in STRONGER[sign] for word in fitting[sign]),
            *(f"{be} {much} {word}" for much in UTTERLY for word in fitting[valence]),
        ]
    else:
        forms["intensified"] = [f"{be} {bit} {w}" for bit in WEAKER for w in fitting[valence]]
        opposite = ["bad", *bad] if valence == 1 else ["good", *good]
        turned = "anything but" if valence == 1 else "far from"
        forms["negated"] = [
            *(f"{be} not {word} at all" for word in opposite),
            *(f"{be} {turned} {word}" for word in opposite[1:]),
        ]
    return Choices(
        (text, share / len(forms[form]))
        for form, share in FORMS.items()
        if forms[form]
        for text in forms[form]
    )


@cache
def _verdicts(stars: int, genre: str | None) -> Choices:
    """Closing sentences, "" for none; without a genre only those that do not name one."""
    texts = VERDICTS[stars]
    if genre is None:
        texts = [text for text in texts if "{" not in text]
    else:
        texts = [text.replace("{a}", genre).replace("{s}", GENRES[genre][0]) for text in texts]
    return Choices([("", 1 - WITH_VERDICT), *((t, WITH_VERDICT / len(texts)) for t in texts)])


@cache
def _sentences(unit: str) -> Choices:
    return Choices(SENTENCES[unit])


def entropy() -> float:
    """Entropy of the language, nats a review: exact, summed over the derivation, films of all
    splits."""
    opening = _openings().entropy() + math.log(len(_films()))
    return opening + Choices(RATINGS.items()).entropy() + body_entropy()


def body_entropy() -> float:
    """Mean entropy of what follows an opening without a rating, given the opening, nats; exact.

    With a rating in front, and averaged over ratings, the opening has told the stars already: what
    remains is less by the entropy of the stars. `entropy` counts both together, which is the same
    with and without a rating, since the stars follow from the body.
    """
    plans = _plans()
    genres, heroes = list(GENRES), list(SUBJECTS.values())
    total = plans.entropy()
    pools = [
        [*ASPECTS, GENRES[genre][1], hero] for genre, hero in itertools.product(genres, heroes)
    ]
    spread = {
        valence: sum(
            sum(_judgements(aspect, valence).entropy() for aspect in pool) / len(pool)
            for pool in pools
        )
        / len(pools)
        for valence in VALENCES
    }
    for (template, valences), p in plans.probs.items():
        # every aspect is equally likely at every place, so the mean over the pool is the
        # expectation
        order = sum(math.log(len(pools[0]) - i) for i in range(len(valences)))
        units = sum(_sentences(unit).entropy() for unit in template)
        stars = stars_of(valences)
        close = sum(_verdicts(stars, genre).entropy() for genre in genres) / len(genres)
        total += p * (order + units + close + sum(spread[v] for v in valences))
    return total


# --- writing -------------------------------------------------------------------------------------


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _write(
    rng: random.Random, film: Film | None, plan: tuple, first: str | None = None
) -> tuple[str, tuple[Judgement, ...]]:
    """The judgements and the verdict of a plan, in words, each sentence with a space before it."""
    template, valences = plan
    pool = aspects_of(film)
    aspects = rng.sample(pool, len(valences))
    if first is not None:
        rest = rng.sample([aspect for aspect in pool if aspect != first], len(valences) - 1)
        aspects = [first, *rest]
    judgements = tuple(
        Judgement(aspect, valence, _judgements(aspect, valence).draw(rng))
        for aspect, valence in zip(aspects, valences, strict=True)
    )
    left = iter(judgements)
    sentences = []
    for unit in template:
        frame = _sentences(unit).draw(rng)
        words = [next(left).text for _ in range(1 if unit == "S" else 2)]
        sentences.append(_capital(frame.format(*words)))
    verdict = _verdicts(stars_of(valences), film.genre if film else None).draw(rng)
    return "".join(f" {s}" for s in [*sentences, verdict] if s), judgements


def _body_log_prob(
    film: Film | None, plan: tuple, judgements: tuple[Judgement, ...], frames: list, verdict: str
) -> float:
    """log P(what follows the opening | plan, film)."""
    template, valences = plan
    pool = len(aspects_of(film))
    total = -sum(math.log(pool - i) for i in range(len(valences)))
    total += sum(_judgements(j.aspect, j.valence).log_prob(j.text) for j in judgements)
    total += sum(_sentences(u).log_prob(f) for u, f in zip(template, frames, strict=True))
    return total + _verdicts(stars_of(valences), film.genre if film else None).log_prob(verdict)


def sample(n: int, seed: int = 0, split: str = "train") -> list[Review]:
    """n reviews of films of one split. The same seed gives the same reviews on every machine.

    Raises: ValueError on an unknown split or n < 1.
    """
    return list(itertools.islice(stream(seed, split), _positive(n)))


def stream(seed: int = 0, split: str = "train") -> Iterator[Review]:
    """Reviews of films of one split without end.

    Raises: ValueError on an unknown split.
    """
    one_of(split, SPLITS, "split")
    check_seed(seed)
    rng = random.Random(f"{split} {seed}")
    films = _films_of(split)
    while True:
        film, frame, plan = rng.choice(films), _openings().draw(rng), _plans().draw(rng)
        place = Choices(RATINGS.items()).draw(rng)
        opening = _rate(frame.replace("{film}", str(film)), film, place, stars_of(plan[1]))
        body, _ = _write(rng, film, plan)
        review = parse(opening + body)
        assert review is not None
        yield review


def _rate(opening: str, film: Film, place: str, stars: int) -> str:
    """The opening with its rating in the given place."""
    if place == "front":
        return f"{stars} star{'s' if stars > 1 else ''}: {opening}"
    if place == "inside":
        return opening.replace(str(film), f"{stars}-star {film}", 1)
    return opening


def _positive(n: int) -> int:
    in_range(n, "n", 1)
    return n


def texts(split: str, n: int, seed: int = 0) -> list[str]:
    """The texts of n reviews.

    Raises: ValueError on an unknown split or n < 1.
    """
    return [review.text for review in sample(n, seed, split)]


def openings(split: str, n: int, seed: int = 0) -> list[str]:
    """n distinct openings without a rating, to be used as prompts.

    Raises: ValueError on an unknown split or n < 1.
    """
    one_of(split, SPLITS, "split")
    check_seed(seed)
    rng = random.Random(f"openings {split} {seed}")
    films, found = _films_of(split), {}
    limit = len(films) * len(_openings().values)
    in_range(n, "n", 1, limit)
    while len(found) < n:
        found[_openings().draw(rng).replace("{film}", str(rng.choice(films)))] = None
    return list(found)


def instructions(split: str, n: int, seed: int = 0) -> list[Instruction]:
    """n requests such as 'Write a 4-star review about the music.' with one right response each.

    Stars and topic are uniform; the response begins with the topic. They name no film, so splits
    differ by their random stream alone.

    Raises: ValueError on an unknown split or n < 1.
    """
    one_of(split, SPLITS, "split")
    check_seed(seed)
    rng = random.Random(f"instructions {split} {seed}")
    found = []
    for _ in range(_positive(n)):
        stars, topic = rng.randint(1, 5), rng.choice(list(ASPECTS))
        response, _ = _write(rng, None, _plans_with(stars).draw(rng), first=topic)
        prompt = f"Write a {stars}-star review about the {topic}.\n"
        found.append(Instruction(prompt, response[1:], topic, stars))
    return found


def kept_back(request: Instruction) -> bool:
    """Whether a request is of a kind that stays out of training, so that a model that follows it
    has put topic and stars together by itself: of each topic one of the five numbers of stars."""
    has(request, "request", "an Instruction", "topic", "stars")
    return request.stars == 1 + zlib.crc32(request.topic.encode()) % 5


# --- reading -------------------------------------------------------------------------------------


@cache
def _known(aspect: str) -> dict[str, Judgement]:
    return {
        text: Judgement(aspect, valence, text)
        for valence in VALENCES
        for text in _judgements(aspect, valence).values
    }


def _read_judgement(text: str, film: Film | None) -> Judgement | None:
    plain = text if text.startswith("I ") else text[:1].lower() + text[1:]
    for aspect in aspects_of(film):
        if plain in _known(aspect):
            return _known(aspect)[plain]
    return None


def _read_sentence(
    sentence: str, film: Film | None
) -> tuple[str, str, tuple[Judgement, ...]] | None:
    """(unit, frame, judgements) of a sentence without its full stop, or None."""
    cuts = [("C", "{0}, but {1}.", ", but "), ("C", "{0}, yet {1}.", ", yet ")]
    cuts.append(("J", "{0} and {1}.", " and "))
    unit, frame, parts = "S", "{0}.", [sentence]
    for name, one, cut in cuts:
        if cut in sentence:
            unit, frame, parts = name, one, sentence.split(cut)
    if sentence.startswith("Although "):
        unit, frame = "C", "Although {0}, {1}."
        parts = sentence.removeprefix("Although ").split(", ")
    read = [_read_judgement(part, film) for part in parts]
    if any(one is None for one in read) or len(parts) != (1 if unit == "S" else 2):
        return None
    rebuilt = _capital(frame.format(*(one.text for one in read)))
    return (unit, frame, tuple(read)) if rebuilt == f"{sentence}." else None


def _read_opening(text: str) -> tuple[str, str, Film, str, int] | None:
    """(opening, its frame, film, place of the rating, stars or 0) of the text's beginning, or
    None."""
    found = re.match(r"(?:(\d) stars?: )?(.+?\.)", text)
    if found is None:
        return None
    opening, front, sentence = found[0], found[1], found[2]
    inside = re.search(r"(\d)-star ", sentence)
    plain = sentence.replace(inside[0], "", 1) if inside else sentence
    place = "front" if front else "inside" if inside else "none"
    stars = int(front or (inside[1] if inside else 0))
    for frame in _openings().values:
        before, after = frame.split("{film}")
        if plain.startswith(before) and plain.endswith(after):
            film = _films().get(plain[len(before) : len(plain) - len(after)])
            if film is not None:
                exact = opening == _rate(plain, film, place, stars)
                return (opening, frame, film, place, stars) if exact else None
    return None


def parse(text: str) -> Review | None:
    """The derivation of a whole review that begins with an opening; None if the grammar cannot
    write it."""
    check_text(text, "text")
    head = _read_opening(text)
    if head is None:
        return None
    opening, frame, film, place, rating = head
    read = _read_body(text[len(opening) :], film)
    if read is None:
        return None
    plan, judgements, inner = read
    stars = stars_of(plan[1])
    if place != "none" and rating != stars:
        return None
    given = _plans() if place == "none" else _plans_with(stars)
    body = given.log_prob(plan) + inner
    whole = _openings().log_prob(frame) - math.log(len(_films())) + _plans().log_prob(plan) + inner
    whole += math.log(RATINGS[place])
    return Review(text, opening, film, judgements, stars, whole, body)


def _read_body(text: str, film: Film | None) -> tuple[tuple, tuple[Judgement, ...], float] | None:
    """(plan, judgements, log P(text | plan, film)) of the sentences after the opening, or None."""
    if not text.startswith(" ") or not text.endswith("."):
        return None
    template, judgements, frames, verdict = "", (), [], ""
    sentences = text[1:-1].split(". ")
    for number, sentence in enumerate(sentences):
        one = _read_sentence(sentence, film)
        if one is None:
            if number < len(sentences) - 1 or not judgements:
                return None
            verdict = f"{sentence}."
            break
        template += one[0]
        frames.append(one[1])
        judgements += one[2]
    plan = (template, tuple(j.valence for j in judgements))
    genre = film.genre if film else None
    if plan not in _plans().probs or verdict not in _verdicts(stars_of(plan[1]), genre).probs:
        return None
    if len({j.aspect for j in judgements}) < len(judgements):
        return None
    return plan, judgements, _body_log_prob(film, plan, judgements, frames, verdict)


def parse_response(text: str, topic: str | None = None) -> Review | None:
    """The derivation of a response to an instruction; None if the grammar cannot write it.

    Its `log_prob` is that of the text given its stars and its topic, the first aspect it judges.
    """
    check_text(text, "text")
    if topic is not None:
        check_text(topic, "topic")
    read = _read_body(f" {text}", None)
    if read is None or topic not in (None, read[1][0].aspect):
        return None
    plan, judgements, inner = read
    stars = stars_of(plan[1])
    # the first aspect is given, not drawn
    log_prob = _plans_with(stars).log_prob(plan) + inner + math.log(len(ASPECTS))
    return Review(text, "", None, judgements, stars, log_prob, log_prob)


def follows(instruction: Instruction, completion: str) -> bool:
    """Whether a completion is a review that begins with the topic and has the stars asked for."""
    has(instruction, "instruction", "an Instruction", "topic", "stars")
    check_text(completion, "completion")
    review = parse_response(completion, instruction.topic)
    return review is not None and review.stars == instruction.stars


def surprise(instructions: Iterable[Instruction]) -> list[float]:
    """−log P(response | stars, topic) under the grammar, nats: no model can be less surprised on
    average."""
    has(instructions, "instructions", "a list of Instructions", "__iter__")
    instructions = list(instructions)
    for index, one in enumerate(instructions):
        has(one, f"instructions[{index}]", "an Instruction", "response", "topic")
    read = (parse_response(one.response, one.topic) for one in instructions)
    return [math.inf if one is None else -one.log_prob for one in read]


# --- judging -------------------------------------------------------------------------------------

_UNREADABLE = 0


@cache
def _verdict_valences(genre: str | None) -> dict[str, int]:
    texts = {stars: _verdicts(stars, genre).values for stars in range(1, 6)}
    return {text: stars - 3 for stars, found in texts.items() for text in found if text}


def _valences(text: str, film: Film | None) -> list[float]:
    """Valence of each judgement, each verdict and each sentence that cannot be read."""
    verdicts, found = _verdict_valences(film.genre if film else None), []
    for sentence in re.findall(r"[^.]+\.?", text):
        sentence = sentence.strip()
        read = _read_sentence(sentence[:-1], film) if sentence.endswith(".") else None
        if read is not None:
            found += [float(judgement.valence) for judgement in read[2]]
        elif sentence:
            found.append(float(verdicts.get(sentence, _UNREADABLE)))
    return found


def quality(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """How good each completion says the film is, on a scale from −2 to 2, in words that make sense:
    the true utility of this world.

    The mean valence of the judgements and the verdict; it is a mean, so repeating a sentence gains
    nothing. A sentence that the grammar could not have written says nothing and counts 0, and so
    does a completion without any. The prompt tells which film is meant, if it is an opening.
    """
    check_texts(prompts=prompts, completions=completions)
    scored = []
    for prompt, completion in zip(prompts, completions, strict=True):
        head = _read_opening(prompt)
        found = _valences(completion, head[2] if head else None) or [_UNREADABLE]
        scored.append(sum(found) / len(found))
    return scored
