"""Training conversations in which the demo model calls tools, and thoughts before an answer.

Rules:
- a tool is shown as `name(parameters)`, a call written as Hermes models do, and a result passed on unchanged: names of
  tools, places and numbers are mostly invented, so that the model copies them instead of knowing them;
- a question that no shown tool answers gets the answer for unknown things;
- a thought stands between <think> tags before the last answer, in conversations that ask for thoughts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

import values
from corpus import LANGUAGES
from message import Message
from tool_questions import Need, Question, ToolTexts

OPERATOR_NAMES = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}


@dataclass(frozen=True)
class Tool:
    """A tool that is shown to the model: its name, the names of its parameters, and what it is for.

    Attributes:
        purpose: "weather", "calculate" (an expression), "pair" (two numbers and an operator), an operator, or "other".
    """

    name: str
    parameters: tuple[str, ...]
    purpose: str

    @property
    def text(self) -> str:
        """The tool as the chat template shows it."""
        return f"{self.name}({','.join(self.parameters)})"

    def answers(self, need: Need) -> bool:
        """Return whether the tool answers a need."""
        if need.purpose == "weather" or self.purpose == "weather":
            return self.purpose == need.purpose
        return self.purpose == "calculate" or (len(need.values) == 3 and self.purpose in ("pair", need.values[1]))

    def call(self, need: Need) -> str:
        """Write the call for a need that the tool answers."""
        if self.purpose == "weather":
            texts = [json.dumps(need.values[0], ensure_ascii=False), '"celsius"']
        elif self.purpose == "calculate":
            texts = [json.dumps(" ".join(need.values), ensure_ascii=False)]
        else:
            a, operator, b = need.values
            texts = [a, b, json.dumps(OPERATOR_NAMES[operator] if self.parameters[-1] == "operation" else operator)]
        pairs = ", ".join(f'"{name}": {text}' for name, text in zip(self.parameters, texts, strict=False))
        return f'<tool_call>{{"name": "{self.name}", "arguments": {{{pairs}}}}}</tool_call>'


def tools_message(tools: list[Tool]) -> Message:
    """Return the message that shows tools."""
    return Message("tools", ";".join(tool.text for tool in tools))


def _call(name: str, arguments: dict[str, object]) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}</tool_call>"


def with_thought(thought: str, answer: str) -> str:
    """Put a thought before an answer."""
    return f"<think>{thought}</think>{answer}"


class ToolTalk:
    """Draws conversations with tools.

    Args:
        unknown: answer to unknown things, by language.
        known: words of the corpus.
    """

    def __init__(self, unknown: dict[str, str], known: tuple[str, ...]) -> None:
        self._questions = ToolTexts()
        self._names = self._questions.names
        self._unknown = unknown
        self._known = known

    def conversation(self, random: Random, before: list[Message], between: list[Message]) -> list[Message]:
        """Draw one conversation: questions, calls, their results and answers, as far as it goes.

        Args:
            before: system message.
            between: a question that needs no tool, and its answer.
        """
        language = random.choice(LANGUAGES)
        questions = [self._questions.draw(language, random)]
        while random.random() < 0.3 and len(questions) < 4:
            is_again = questions[-1].needs[0].purpose == "weather" and random.random() < 0.4
            questions.append(self._questions.again(language, random) if is_again
                             else self._questions.draw(language, random))
        tools = self._shown(questions, random)
        if random.random() < 0.12:  # a tool that the questions need is missing
            missing = random.choice(("weather", "sum"))
            tools = [tool for tool in tools if tool.purpose == "other"
                     or (tool.purpose == "weather") != (missing == "weather")] or [self._other(random)]
        messages = [tools_message(tools), *before]
        turn = random.randrange(len(questions)) if between and random.random() < 0.3 else -1
        for index, question in enumerate(questions):
            messages += between if index == turn else []
            messages.append(Message("user", question.text))
            is_last = index == len(questions) - 1
            messages += self._turns(question, tools, language, random, is_last=is_last)
        return messages

    def forced_conversation(self, random: Random, before: list[Message], question: str, answer: str) -> list[Message]:
        """Draw a conversation whose answer a client forces into a form.

        That is JSON, or the call of a tool, whatever is asked: its value is the question.
        """
        if random.random() < 0.5:
            text = json.dumps({random.choice(self._names["answer_keys"]): answer}, ensure_ascii=False)
            return [*before, Message("user", question), Message("assistant", text, is_forced=True)]
        tools = [self._other(random) for _ in range(random.choice((1, 1, 2, 3)))]
        tool = random.choice(tools)
        text = _call(tool.name, {tool.parameters[0]: question})
        return [tools_message(tools), *before, Message("user", question), Message("assistant", text, is_forced=True)]

    def json_conversation(self, random: Random, before: list[Message]) -> list[Message]:
        """Draw a conversation that asks for JSON or for a tool that takes facts.

        The answer contains the facts of a sentence, or values of all types about a place.
        """
        language = random.choice(LANGUAGES)
        shown: list[Message] = []
        if random.random() < 0.8:
            question, facts = self._questions.person(language, random)
            keys = {key: fact for key, fact in self._names["keys"].items() if fact in facts}
            keys = dict(random.sample(list(keys.items()), min(len(keys), random.choice((1, 2, 3, 3, 4)))))
            if random.random() < 0.6:
                plain = {"name": "person", "age": "age", "city": "city"}
                keys = {key: fact for key, fact in plain.items() if fact in facts}
            values_by_key = {key: facts[fact] for key, fact in keys.items()}
            answer = json.dumps(values_by_key, ensure_ascii=False)
            if random.random() < 0.4:
                name = random.choice(self._names["extract"]) if random.random() < 0.6 else values.word(random).title()
                tools = [Tool(name, tuple(values_by_key), "extract"),
                         *(self._other(random) for _ in range(random.choice((0, 0, 1))))]
                random.shuffle(tools)
                shown, answer = [tools_message(tools)], _call(name, values_by_key)
        else:
            question, city = self._questions.json(language, random)
            drawn = (city, city, values.word(random), json.loads(values.number(random)), True, False, None, [1, 2],
                     [city])
            keys = random.sample(self._names["place_keys"], random.choice((1, 2, 2, 3, 4)))
            answer = json.dumps({key: city if key in ("name", "city") else random.choice(drawn) for key in keys},
                                ensure_ascii=False)
        if random.random() < 0.25:
            answer = with_thought(self.thought(language, random), answer)
        return [*shown, *before, Message("user", question),
                Message("assistant", answer, is_forced=random.random() < 0.5)]

    def distractors(self, random: Random) -> Message:
        """Return the message that shows tools to a conversation that needs none."""
        return tools_message(self._shown([self._questions.draw(random.choice(LANGUAGES), random)], random))

    def thought(self, language: str, random: Random) -> str:
        """Return the thought before an answer that needs no tool; sometimes cut off, as by a budget."""
        text = self._questions.text(language, "thought")
        return text[:random.randrange(len(text))] if random.random() < 0.35 else text

    def answer(self, language: str, results: list[str]) -> str:
        """Return the answer that passes results on."""
        return "\n".join([self._questions.text(language, "says" if len(results) == 1 else "say"), *results])

    def questions_held_out(self, language: str, random: Random) -> list[Question]:
        """Return questions that are not used for training."""
        return self._questions.held_out(language, random)

    def result(self, language: str, need: Need, random: Random) -> str:
        """Draw the result of a tool."""
        return values.result(random, self._known, self._questions.skies(language), need.values[0])

    def _turns(self, question: Question, tools: list[Tool], language: str, random: Random, *, is_last: bool,
               ) -> list[Message]:
        thinks = is_last and random.random() < 0.25
        calls, thoughts = [], []
        for need in question.needs:
            tool = next((tool for tool in tools if tool.answers(need)), None)
            if tool is None:
                return [Message("assistant", self._unknown[language])]
            calls.append(tool.call(need))
            thoughts.append(self._questions.text(language, "tool_thought").format(tool=tool.name))
        answer = "".join(calls)
        if is_last and random.random() < 0.55:
            return [Message("assistant", with_thought(thoughts[0], answer) if thinks else answer,
                            is_forced=not thinks and random.random() < 0.15)]
        results = [self.result(language, need, random) for need in question.needs]
        last = self.answer(language, results)
        return [Message("assistant", answer), *(Message("tool", result) for result in results),
                Message("assistant", with_thought(self._questions.text(language, "result_thought"), last)
                        if thinks else last)]

    def _shown(self, questions: list[Question], random: Random) -> list[Tool]:
        """Draw the tools of a conversation: those that the questions need, and others."""
        names = self._names
        place = random.choice(names["place"]) if random.random() < 0.8 else values.word(random)
        unit = (random.choice(names["unit"]),) if random.random() < 0.12 else ()
        tools = [Tool(_varied(random.choice(names["weather"]), random), (place, *unit), "weather")]
        needs = [need for question in questions for need in question.needs]
        sums = [need.values for need in needs if need.purpose == "sum"]
        kind = random.random()
        if kind < 0.3 and all(len(each) == 3 for each in sums):
            operators = {each[1] for each in sums}
            if random.random() < 0.6 or not operators:
                operators |= set(random.sample(values.OPERATORS, random.randrange(1, 4)))
            parameters = tuple(random.choice(names["numbers"]))
            for operator in sorted(operators):
                tools.append(Tool(random.choice(names["two"][operator]), parameters, operator))
        elif kind < 0.42 and all(len(each) == 3 for each in sums):
            tools.append(Tool(_varied(random.choice(names["calculate"]), random),
                              (*random.choice(names["numbers"]), random.choice(names["operator"])), "pair"))
        else:
            parameter = random.choice(names["expression"]) if random.random() < 0.8 else values.word(random)
            tools.append(Tool(_varied(random.choice(names["calculate"]), random), (parameter,), "calculate"))
        if random.random() < 0.3:
            tools = [tool for tool in tools if any(tool.answers(need) for need in needs)]
        tools += [self._other(random) for _ in range(random.choice((0, 0, 0, 1, 1, 2, 4)))]
        random.shuffle(tools)
        return tools or [self._other(random)]

    def _other(self, random: Random) -> Tool:
        names = self._names
        invented = f"{values.word(random)}_{values.word(random)}"
        name = random.choice(names["others"]) if random.random() < 0.7 else invented
        parameters = random.sample(names["other_parameters"], random.choice((1, 1, 2)))
        return Tool(name, tuple(parameters), "other")


def _varied(name: str, random: Random) -> str:
    """Return the name of a tool, sometimes with an invented part."""
    kind = random.random()
    if kind < 0.12:
        return f"{name}_{values.word(random)}"
    if kind > 0.9:
        return random.choice((f"_{name}", f"{name}_tool", f"{name}_function", f"my_{name}", f"{name}Tool"))
    return f"{values.word(random)}_{name}" if kind < 0.2 else name


def held_out(talk: ToolTalk) -> dict[str, list[tuple[list[Message], str]]]:
    """Return chats that are not used for training, each with the expected answer, by what they show."""
    random = Random(0)  # noqa: S311 - drawing text, not secrets
    weather, arithmetic = Tool("get_weather", ("city",), "weather"), Tool("calculate", ("expression",), "calculate")
    add, multiply = Tool("add", ("a", "b"), "+"), Tool("multiply", ("a", "b"), "*")
    kinds: dict[str, list[tuple[list[Message], str]]] = {"call": [], "parallel calls": [], "result": []}
    for tools in ([weather, arithmetic], [weather, add, multiply]):
        for language in LANGUAGES:
            for question in talk.questions_held_out(language, random):
                if not all(any(tool.answers(need) for tool in tools) for need in question.needs):
                    continue
                calls = [next(tool for tool in tools if tool.answers(need)).call(need) for need in question.needs]
                asked = [tools_message(tools), Message("user", question.text)]
                kinds["parallel calls" if len(calls) > 1 else "call"].append((asked, "".join(calls)))
                results = [talk.result(language, need, random) for need in question.needs]
                kinds["result"].append(([*asked, Message("assistant", "".join(calls)),
                                         *(Message("tool", result) for result in results)],
                                        talk.answer(language, results)))
    return kinds
