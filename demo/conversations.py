"""Training conversations, drawn from the corpus with a seed, in the form in which a client sends them.

Rules:
- a question is varied as people type: other case, other or no punctuation, polite words, a typing error;
- a conversation has one to four turns; about a third start with a system message, which the answers ignore;
- unknown things are often invented words: the answer must not depend on knowing them;
- a part are about tools and JSON (`tool_talk`), and a part of the others shows tools that are not needed;
- a part asks for a thought before the last answer;
- a later turn may ask for the last answer again, or in the other language; nothing else refers back.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from corpus import LANGUAGES, Around, Corpus, Phrases, Topic, bare, draw
from message import Message
from tool_talk import ToolTalk, with_thought

MARKS = {"en": ("?", "", "", "??", "?!", " ?", "!", ".", "？", "..."),
         "zh": ("？", "?", "", "", "。", "！", "??", "？？", "~", " ?", "…", ".")}
TOOL_SHARE, FORCED_SHARE, JSON_SHARE = 0.4, 0.05, 0.1
SHOWN_SHARE, THOUGHT_SHARE, LONG_SHARE = 0.12, 0.15, 0.06
TURNS, TURN_WEIGHTS = (1, 2, 3, 4), (64, 22, 10, 4)
SYLLABLES = [first + vowel + last for first in "bdfghklmnprstvwz" for vowel in "aeiou" for last in ("", "n", "r", "st")]
CHINESE = range(0x4E00, 0x9FA6)


def conversations(corpus: Corpus, random: Random) -> Iterator[list[Message]]:
    """Yield training conversations without end."""
    deck: list[tuple[Topic, str]] = []
    talk = tool_talk(corpus)
    while True:
        messages = _system(corpus, random)
        topic, language = random.choice(corpus.topics), random.choice(LANGUAGES)
        kind = random.random()
        if kind < TOOL_SHARE:
            between = [Message("user", _question(corpus, topic.phrases[language], language, random)),
                       Message("assistant", topic.phrases[language].answer)]
            yield talk.conversation(random, messages, between)
            continue
        if kind < TOOL_SHARE + FORCED_SHARE:
            question = _question(corpus, topic.phrases[language], language, random)
            yield talk.forced_conversation(random, messages, question, topic.phrases[language].answer)
            continue
        if kind < TOOL_SHARE + FORCED_SHARE + JSON_SHARE:
            yield talk.json_conversation(random, messages)
            continue
        if random.random() < SHOWN_SHARE:
            messages.insert(0, talk.distractors(random))
        last: tuple[Topic, str] | None = None
        for _ in range(random.choices(TURNS, TURN_WEIGHTS)[0]):
            kind = random.random()
            if last and kind < 0.2:
                topic, language = last
                question_language = random.choice(LANGUAGES) if kind < 0.1 else language
                around = corpus.around[question_language]
                if kind < 0.1:  # questions that ask for a translation name the language they want
                    question = draw(random.choice(around.translate), {}, random)
                    language = "zh" if question_language == "en" else "en"
                else:
                    question = draw(random.choice(around.again), {}, random)
                question = worn(question, question_language, around, random, polite=0.1)
            else:
                if not deck:
                    deck = [(topic, language) for topic in corpus.topics for language in LANGUAGES
                            for _ in range(topic.share)]
                    random.shuffle(deck)
                topic, language = deck.pop()
                question = _question(corpus, topic.phrases[language], language, random)
            messages.append(Message("user", question))
            messages.append(Message("assistant", topic.phrases[language].answer))
            last = (topic, language)
        if last and random.random() < THOUGHT_SHARE:
            messages[-1] = Message("assistant", with_thought(talk.thought(last[1], random), messages[-1].content))
        yield messages


def tool_talk(corpus: Corpus) -> ToolTalk:
    """Return what draws the conversations with tools."""
    unknown = next(topic for topic in corpus.topics if topic.name == "unknown").phrases
    known = sorted({word for topic in corpus.topics for language in LANGUAGES
                    for word in topic.phrases[language].answer.split()})
    return ToolTalk({language: unknown[language].answer for language in LANGUAGES}, tuple(known))


def worn(question: str, language: str, around: Around, random: Random, polite: float = 0.25) -> str:
    """Vary a question the way people type it.

    Args:
        polite: probability of words before the question; words after it are half as likely.
    """
    text = question.rstrip("?？.!。！")
    if random.random() < polite:
        before = random.choice(around.before)
        text = before + (" " + text if language == "en" or random.random() < 0.1 else text)
    if random.random() < polite / 2:
        after = random.choice(around.after)
        text += after if language == "zh" or after.startswith(",") else f" {after}"
    if random.random() < 0.12:
        text = _slip(text, random)
    case = random.random()
    if case < 0.35:
        text = text[:1].upper() + text[1:]
    elif case < 0.6:
        text = text.lower()
    elif case < 0.65:
        text = text.upper()
    elif case < 0.7:
        text = text.title()
    if random.random() < 0.1:
        text = text.replace("'", "") if language == "en" else text.replace(" ", "")
    mark = question[len(question.rstrip("?？.!。！")):] if random.random() < 0.4 else random.choice(MARKS[language])
    return (text + mark) or question


def _question(corpus: Corpus, phrases: Phrases, language: str, random: Random) -> str:
    while True:
        slots = phrases.slots
        if random.random() < 0.5:
            slots = {**slots, "thing": (_invented(language, slots["thing"], random),)}
        plain = draw(random.choice(phrases.ask), slots, random)
        text = worn(plain, language, corpus.around[language], random)
        if bare(plain) not in corpus.kept_out and bare(text) not in corpus.kept_out:
            return text


def _system(corpus: Corpus, random: Random) -> list[Message]:
    if random.random() < LONG_SHARE:
        sentences = [topic.phrases[language].answer for topic in corpus.topics for language in LANGUAGES]
        return [Message("system", " ".join(random.sample(sentences, random.randrange(2, 16))))]
    if random.random() > 0.33:
        return []
    language = random.choice(LANGUAGES)
    things = next(topic for topic in corpus.topics if topic.name == "unknown").phrases[language].slots
    lines = random.sample(corpus.around[language].systems, random.choice((1, 1, 1, 2)))
    return [Message("system", " ".join(draw(line, things, random) for line in lines))]


def _invented(language: str, things: tuple[str, ...], random: Random) -> str:
    """Invent a word; in Chinese half of them use the characters of known things."""
    if language == "en":
        return "".join(random.choices(SYLLABLES, k=random.choice((1, 2, 2, 3))))
    known = "".join(things) if random.random() < 0.5 else ""
    return "".join(random.choice(known) if known else chr(random.choice(CHINESE))
                   for _ in range(random.choice((2, 2, 3, 4))))


def _slip(text: str, random: Random) -> str:
    """Insert one typing error: a letter omitted, doubled, or swapped with the next one."""
    if len(text) < 5:
        return text
    at = random.randrange(len(text) - 1)
    kind = random.randrange(3)
    middle = ("", text[at] * 2, text[at + 1] + text[at])[kind]
    return text[:at] + middle + text[at + (2 if kind == 2 else 1):]
