"""Domains with right answers and domains of markup, generated from a seed.

Every generator yields ``(key, text)``. The key decides the split, so it is the part that must not
be known from training: the operands of a sum, the letters of a string, the whole record or page.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

_MATH_LINES = 110_000
_STRING_LINES = 60_000
_JSON_DOCUMENTS = 9_000
_HTML_DOCUMENTS = 3_600

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
STRING_TASKS = ("copy", "reverse", "sort", "upper")

_NAMES = (
    "Ada Alan Barbara Claude Donald Edsger Emmy Evelyn Frances Grace Hedy Ida John Karen Leslie "
    "Margaret Mary Niklaus Radia Robin Sophie Tim"
).split()
_CITIES = "Bern Cairo Delhi Kyoto Lagos Lima Lyon Oslo Porto Quito Riga Turin".split()
_ITEMS = (
    "apple bolt brush candle chair cup fork jar kettle lamp ladder mirror needle pen plate ribbon "
    "rope shelf spoon table ticket umbrella wheel"
).split()
_COLOURS = "amber black blue brown green grey orange purple red silver white yellow".split()
_VERBS = "arrives breaks closes costs fits helps moves opens sells shines turns works".split()
_PLACES = "garden harbour kitchen library market museum office school station workshop".split()


def math_lines(seed: int) -> Iterator[tuple[str, str]]:
    """Two-digit additions (70 %) and subtractions without a negative result, ``23+48=71``.

    The key is the ordered pair with its sign: if 23+48 is held out, 48+23 need not be.
    """
    source = random.Random(f"math {seed}")
    for _ in range(_MATH_LINES):
        first, second = source.randint(10, 99), source.randint(10, 99)
        if source.random() < 0.7:
            yield sum_key(first, second), f"{first}+{second}={first + second}"
        else:
            first, second = max(first, second), min(first, second)
            yield f"math:{first}-{second}", f"{first}-{second}={first - second}"


def sum_key(first: int, second: int) -> str:
    """The key of an addition; tests use it to list all held-out pairs."""
    return f"math:{first}+{second}"


def string_answer(task: str, letters: list[str]) -> list[str]:
    """What the task makes of the letters."""
    if task == "copy":
        return letters
    if task == "reverse":
        return letters[::-1]
    if task == "sort":
        return sorted(letters)
    return [letter.upper() for letter in letters]


def string_lines(seed: int) -> Iterator[tuple[str, str]]:
    """Letter tasks, ``sort d b c = b c d``. The key is the row of letters, for all four tasks."""
    source = random.Random(f"strings {seed}")
    for _ in range(_STRING_LINES):
        task = source.choice(STRING_TASKS)
        letters = [source.choice(_LETTERS) for _ in range(source.randint(3, 6))]
        given = " ".join(letters)
        yield f"strings:{given}", f"{task} {given} = {' '.join(string_answer(task, letters))}"


def json_documents(seed: int) -> Iterator[tuple[str, str]]:
    """Records of four kinds, some in lists, some indented. The key is the document itself."""
    source = random.Random(f"json {seed}")
    makers = (_person, _order, _reading, _event)
    for _ in range(_JSON_DOCUMENTS):
        make = source.choice(makers)
        indent = source.choice((None, None, 2))
        if source.random() < 0.4:
            # One record per line, as log files have it.
            text = "\n".join(json.dumps(make(source)) for _ in range(source.randint(3, 6)))
        else:
            text = json.dumps([make(source) for _ in range(source.randint(1, 4))], indent=indent)
        yield f"json:{text}", text + "\n"


def _person(source: random.Random) -> dict[str, object]:
    name = source.choice(_NAMES)
    return {
        "id": source.randint(1, 999),
        "name": name,
        "email": f"{name.lower()}@{source.choice(_CITIES).lower()}.example",
        "city": source.choice(_CITIES),
        "active": source.random() < 0.5,
        "tags": source.sample(_COLOURS, source.randint(0, 3)),
    }


def _order(source: random.Random) -> dict[str, object]:
    items = [
        {"item": item, "count": source.randint(1, 9), "price": source.randint(50, 999) / 10}
        for item in source.sample(_ITEMS, source.randint(1, 3))
    ]
    return {
        "order": source.randint(1000, 9999),
        "customer": source.choice(_NAMES),
        "items": items,
        "paid": source.random() < 0.5,
    }


def _reading(source: random.Random) -> dict[str, object]:
    return {
        "sensor": f"{source.choice(_PLACES)}-{source.randint(1, 9)}",
        "time": _clock(source),
        "celsius": source.randint(-99, 399) / 10,
        "humidity": source.randint(10, 99),
        "error": None if source.random() < 0.8 else "timeout",
    }


def _event(source: random.Random) -> dict[str, object]:
    return {
        "level": source.choice(("debug", "info", "info", "warning", "error")),
        "time": _clock(source),
        "source": source.choice(_PLACES),
        "message": _sentence(source),
    }


def _clock(source: random.Random) -> str:
    return f"{source.randint(0, 23):02}:{source.randint(0, 59):02}:{source.randint(0, 59):02}"


def _sentence(source: random.Random) -> str:
    return (
        f"The {source.choice(_COLOURS)} {source.choice(_ITEMS)} {source.choice(_VERBS)} "
        f"in the {source.choice(_PLACES)}"
    )


def html_documents(seed: int) -> Iterator[tuple[str, str]]:
    """Small web pages of nested, always closed elements. The key is the page itself."""
    source = random.Random(f"html {seed}")
    for _ in range(_HTML_DOCUMENTS):
        text = _page(source)
        yield f"html:{text}", text


def _page(source: random.Random) -> str:
    title = f"{source.choice(_NAMES)}'s {source.choice(_PLACES)}"
    lines = ["<!DOCTYPE html>", '<html lang="en">', "<head>", f"  <title>{title}</title>"]
    if source.random() < 0.5:
        colours = source.sample(_COLOURS, 2)
        lines += [
            "  <style>",
            f"    body {{ color: {colours[0]}; background: {colours[1]}; }}",
            "  </style>",
        ]
    lines += ["</head>", "<body>", f"  <h1>{title}</h1>"]
    sections = (_paragraph, _list, _table, _form, _navigation)
    for number in range(1, source.randint(2, 5)):
        lines.append(f'  <section id="part-{number}">')
        lines += ["    " + line for line in source.choice(sections)(source)]
        lines.append("  </section>")
    return "\n".join([*lines, "</body>", "</html>"]) + "\n"


def _paragraph(source: random.Random) -> list[str]:
    name = source.choice(_ITEMS)
    return [
        f"<h2>About the {name}</h2>",
        f"<p>{_sentence(source)}, and the <em>{name}</em> {source.choice(_VERBS)}.</p>",
        f'<p class="{source.choice(_COLOURS)}">{_sentence(source)}.</p>',
    ]


def _list(source: random.Random) -> list[str]:
    tag = source.choice(("ul", "ol"))
    items = source.sample(_ITEMS, source.randint(2, 5))
    return [f"<{tag}>", *(f"  <li>{item}</li>" for item in items), f"</{tag}>"]


def _table(source: random.Random) -> list[str]:
    rows = [
        f"  <tr><td>{item}</td><td>{source.choice(_COLOURS)}</td><td>{source.randint(1, 99)}</td>"
        "</tr>"
        for item in source.sample(_ITEMS, source.randint(2, 4))
    ]
    head = "  <tr><th>Item</th><th>Colour</th><th>Count</th></tr>"
    return ['<table class="stock">', head, *rows, "</table>"]


def _form(source: random.Random) -> list[str]:
    fields = source.sample(("name", "email", "city", "colour", "count"), source.randint(1, 3))
    lines = [f'<form action="/{source.choice(_PLACES)}" method="post">']
    for name in fields:
        lines.append(f'  <label for="{name}">{name.title()}</label>')
        lines.append(f'  <input type="text" id="{name}" name="{name}">')
    return [*lines, '  <button type="submit">Send</button>', "</form>"]


def _navigation(source: random.Random) -> list[str]:
    places = source.sample(_PLACES, source.randint(2, 4))
    links = [f'  <a href="/{place}.html">{place.title()}</a>' for place in places]
    return ["<nav>", *links, "</nav>"]
