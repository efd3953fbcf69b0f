"""Questions of `bench/quality.py`: arithmetic, facts and format following, each with one right and some wrong answers.

A model chooses the answer with the highest likelihood in its chat template, so even a small one can be measured.
"""

from __future__ import annotations

import random

Question = tuple[str, str, tuple[str, ...]]
"""Question, right answer, wrong answers."""

_FACTS = (("What is the capital of France?", "Paris", "Rome", "Madrid", "Vienna"),
          ("What is the capital of Japan?", "Tokyo", "Seoul", "Beijing", "Bangkok"),
          ("What is the capital of Egypt?", "Cairo", "Tunis", "Rabat", "Tripoli"),
          ("Which planet is closest to the sun?", "Mercury", "Venus", "Mars", "Jupiter"),
          ("Which metal is liquid at room temperature?", "Mercury", "Iron", "Copper", "Silver"),
          ("What do bees make?", "Honey", "Milk", "Silk", "Wool"),
          ("How many legs does a spider have?", "Eight", "Six", "Four", "Ten"),
          ("Which gas do plants absorb?", "Carbon dioxide", "Helium", "Neon", "Methane"),
          ("What is the largest ocean?", "The Pacific Ocean", "The Arctic Ocean", "The Indian Ocean", "The Baltic Sea"),
          ("At what temperature does water boil at sea level?", "100 degrees Celsius", "50 degrees Celsius",
           "10 degrees Celsius", "300 degrees Celsius"),
          ("Which animal is known as the king of the jungle?", "The lion", "The mouse", "The horse", "The cow"),
          ("What is the chemical symbol for gold?", "Au", "Ag", "Fe", "Pb"),
          ("How many days are in a week?", "Seven", "Five", "Nine", "Twelve"),
          ("Which language is spoken in Brazil?", "Portuguese", "German", "Russian", "Greek"),
          ("Who wrote Hamlet?", "William Shakespeare", "Charles Dickens", "Mark Twain", "Jane Austen"),
          ("What is frozen water called?", "Ice", "Steam", "Sand", "Smoke"),
          ("Which organ pumps blood?", "The heart", "The liver", "The lung", "The skin"),
          ("What is the opposite of hot?", "Cold", "Tall", "Loud", "Soft"),
          ("Which season comes after spring?", "Summer", "Winter", "Autumn", "Monday"),
          ("How many minutes are in an hour?", "Sixty", "Thirty", "Ninety", "Ten"))
_WORDS = ("river", "garden", "window", "music", "bridge", "letter", "winter", "market", "forest", "silver")


def questions() -> dict[str, list[Question]]:
    """Return the questions by kind; the same in every run."""
    numbers = random.Random(4)  # noqa: S311  # no secret
    arithmetic: list[Question] = []
    for _ in range(20):
        first, second = numbers.randint(2, 20), numbers.randint(2, 20)
        result = first + second
        wrong = tuple(str(result + change) for change in numbers.sample([-10, -3, -2, -1, 1, 2, 3, 10], 3))
        arithmetic.append((f"What is {first} + {second}? Answer with the number only.", str(result), wrong))
    facts: list[Question] = [(question, right, tuple(wrong)) for question, right, *wrong in _FACTS]
    formats: list[Question] = []
    for word in _WORDS:
        formats.append((f"Write the word {word} in capital letters. Answer with that word only.", word.upper(),
                        (word, word.capitalize(), f"The word is {word}.")))
        formats.append((f'Answer in JSON with the key "word" and the value {word}.', f'{{"word": "{word}"}}',
                        (word, f"word: {word}", f"The word is {word}.")))
    return {"arithmetic": arithmetic, "facts": facts, "format": formats}
